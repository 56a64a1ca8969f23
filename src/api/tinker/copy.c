/*
 * copy_weights: a checkpoint becomes one of a new run, without copying bytes. The run's id is made
 * from the idempotency key, so that a repeat finds the first copy, also after a restart. Projects
 * and access tokens are taken and mean nothing to a server with one owner. Thread: the loop's.
 */
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/clock.h"
#include "util/philox.h"

static void on_copied(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    struct tb_http_request *req = tb_tinker_call_end(arg, err);
    struct tb_buf b;
    struct tb_json_out j;
    if (!req) return;
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "tinker_path", row->path);
    tb_jout_str(&j, "type", "copy_weights");
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

/* 16 characters of [0-9a-z] that depend on key and path, or on chance without a key. */
static void run_name(struct tb_http_request *req, const char *key, const char *path, char out[17])
{
    static const char digits[] = "0123456789abcdefghijklmnopqrstuvwxyz";
    if (!key) {
        tb_random_id(out, 16);
        return;
    }
    uint64_t h[2] = {tb_fnv1a(tb_arena_printf(&req->arena, "%s\n%s", key, path)),
                     tb_fnv1a(tb_arena_printf(&req->arena, "%s\n%s\ncopy", path, key))};
    for (int i = 0; i < 16; i++) {
        out[i] = digits[h[i / 8] % 36];
        h[i / 8] /= 36;
    }
    out[16] = '\0';
}

/* A slot of a live session, where no model is. */
static int check_slot(struct tb_core *c, const char *session, const char *run, struct tb_error *e)
{
    struct tb_model_answer m;
    int rc = tb_core_heartbeat(c, session, e);
    if (rc) return rc;
    struct tb_error none = {0};
    if (tb_core_model_info(c, run, &m, &none) == TB_ENOTFOUND) return 0;
    return tb_error_set(e, TB_EINVAL, "%s is a live model; copy to another model_seq_id", run);
}

void tb_tinker_copy_weights(struct tb_api *a, struct tb_http_request *req,
                            const struct tb_route_match *m)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    struct tb_tinker_path parsed;
    const char *path = NULL, *session = NULL, *ignored = NULL, *run;
    int64_t slot = -1, ttl = 0;
    char name[17];
    (void)m;
    if (tb_api_body(a, req, false, &doc)) return;
    const struct tb_json *root = &doc.root;
    struct tb_arena *ar = &req->arena;
    int rc = tb_json_string(root, "source_path", true, ar, 4096, &path, &e);
    if (rc == 0) rc = tb_json_id(root, "session_id", false, ar, &session, &e);
    if (rc == 0) rc = tb_json_int(root, "model_seq_id", false, 0, INT64_MAX, &slot, &e);
    if (rc == 0) rc = tb_json_id(root, "destination_project_id", false, ar, &ignored, &e);
    if (rc == 0) rc = tb_json_int(root, "ttl_seconds", false, TB_MIN_TTL, TB_MAX_TTL, &ttl, &e);
    tb_json_free(&doc);
    if (rc == 0) rc = tb_tinker_path_parse(path, strlen(path), &parsed, &e);
    if (rc == 0 && !session != (slot < 0))
        rc = tb_error_set(&e, TB_EINVAL, "session_id and model_seq_id go together");
    if (rc == 0 && session) {
        run = tb_arena_printf(ar, "%s:train:%lld", session, (long long)slot);
        rc = check_slot(tb_api_core(a), session, run, &e);
    } else if (rc == 0) {
        run_name(req, tb_api_idempotency_key(req), path, name);
        run = tb_arena_printf(ar, "copy-%s:train:0", name);
    }
    if (rc)
        tb_api_error(req, &e);
    else
        tb_store_copy_ckpt(tb_core_store(tb_api_core(a)), path, run, session, ttl, on_copied,
                           tb_tinker_call(a, req));
}
