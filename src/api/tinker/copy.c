/*
 * copy_weights: a checkpoint becomes one of a new run, without copying bytes. The run's id is made
 * from the tenant and the idempotency key, so that a repeat finds the first copy, also after a
 * restart. An access token is a key of the tenant whose checkpoint it is. Thread: the loop's.
 */
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/clock.h"
#include "util/philox.h"

static void on_copied(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    struct tb_buf b;
    struct tb_json_out j;
    struct tb_http_request *req = tb_tinker_call_answer(arg, err, &b, &j);
    if (!req) return;
    tb_jout_str(&j, "tinker_path", row->path);
    tb_jout_str(&j, "type", "copy_weights");
    tb_jout_object_end(&j);
    tb_api_answer(req, 200, &b);
}

/* 16 characters of [0-9a-z] that depend on tenant, key and path, or on chance without a key. */
static void run_name(struct tb_http_request *req, const char *key, const char *path, char out[17])
{
    static const char digits[] = "0123456789abcdefghijklmnopqrstuvwxyz";
    if (!key) {
        tb_random_id(out, 16);
        return;
    }
    const char *who = tb_api_tenant(req);
    uint64_t h[2] = {tb_fnv1a(tb_arena_printf(&req->arena, "%s\n%s\n%s", who, key, path)),
                     tb_fnv1a(tb_arena_printf(&req->arena, "%s\n%s\n%s\ncopy", path, key, who))};
    for (int i = 0; i < 16; i++) {
        out[i] = digits[h[i / 8] % 36];
        h[i / 8] /= 36;
    }
    out[16] = '\0';
}

/* A slot of a live session, where no model is. */
static int check_slot(struct tb_core *c, struct tb_tenant *who, const char *session,
                      const char *run, struct tb_error *e)
{
    struct tb_model_answer m;
    int rc = tb_core_heartbeat(c, who, session, e);
    if (rc) return rc;
    struct tb_error none = {0};
    if (tb_core_model_info(c, who, run, &m, &none) == TB_ENOTFOUND) return 0;
    return tb_error_set(e, TB_EINVAL, "%s is a live model; copy to another model_seq_id", run);
}

/* Who may read the source: the owner of the access token, when there is one (the SDK sends it as a
 * header). */
static int reader_of(struct tb_api *a, struct tb_http_request *req, const struct tb_json *root,
                     const char **out, struct tb_error *e)
{
    struct tb_span token = tb_http_header_get(req, "X-Tinker-Weights-Access-Token");
    const char *text = NULL;
    int rc =
        tb_json_string(root, "weights_access_token", false, &req->arena, TB_MAX_TOKEN, &text, e);
    if (rc) return rc;
    if (text) token = tb_span_str(text);
    struct tb_tenant *t = token.n ? tb_api_key_tenant(a, &req->arena, token) : tb_api_who(req);
    if (!t) return tb_error_set(e, TB_EFORBIDDEN, "weights_access_token is no key of this server");
    *out = tb_tenant_name(t);
    return 0;
}

void tb_tinker_copy_weights(struct tb_api *a, struct tb_http_request *req,
                            const struct tb_route_match *m)
{
    struct tb_json_doc doc;
    struct tb_error e = {0};
    struct tb_tinker_path parsed;
    const char *path = NULL, *session = NULL, *project = NULL, *run, *reader = NULL;
    int64_t slot = -1, ttl = 0;
    char name[17];
    (void)m;
    if (tb_api_body(a, req, false, &doc)) return;
    const struct tb_json *root = &doc.root;
    struct tb_arena *ar = &req->arena;
    int rc = tb_json_string(root, "source_path", true, ar, 4096, &path, &e);
    if (rc == 0) rc = tb_json_id(root, "session_id", false, ar, &session, &e);
    if (rc == 0) rc = tb_json_int(root, "model_seq_id", false, 0, INT64_MAX, &slot, &e);
    if (rc == 0) rc = tb_json_id(root, "destination_project_id", false, ar, &project, &e);
    if (rc == 0) rc = tb_json_int(root, "ttl_seconds", false, TB_MIN_TTL, TB_MAX_TTL, &ttl, &e);
    if (rc == 0) rc = reader_of(a, req, root, &reader, &e);
    tb_json_free(&doc);
    if (rc == 0) rc = tb_tinker_path_parse(path, strlen(path), &parsed, &e);
    if (rc == 0 && !session != (slot < 0))
        rc = tb_error_set(&e, TB_EINVAL, "session_id and model_seq_id go together");
    if (rc == 0 && session) {
        run = tb_arena_printf(ar, "%s:train:%lld", session, (long long)slot);
        rc = check_slot(tb_api_core(a), tb_api_who(req), session, run, &e);
    } else if (rc == 0) {
        run_name(req, tb_api_idempotency_key(req), path, name);
        run = tb_arena_printf(ar, "copy-%s:train:0", name);
    }
    if (rc) {
        tb_api_error(req, &e);
        return;
    }
    struct tb_ckpt_copy copy = {.reader = reader,
                                .path = path,
                                .tenant = tb_api_tenant(req),
                                .run_id = run,
                                .session_id = session,
                                .project_id = project,
                                .ttl_seconds = ttl};
    tb_store_copy_ckpt(tb_core_store(tb_api_core(a)), &copy, on_copied, tb_tinker_call(a, req));
}
