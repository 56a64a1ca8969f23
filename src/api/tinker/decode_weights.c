/* The three saves and the two loads: JSON into ops. Pure; memory in the op's arena. */
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/clock.h"
#include "util/mem.h"

/* ---- saves */

/* A name when the client gave none: the op's number, which is unique in its run. */
static const char *own_name(struct tb_op *op)
{
    if (op->seq_id >= 0) return tb_arena_printf(&op->arena, "seq-%06lld", (long long)op->seq_id);
    char id[17];
    tb_random_id(id, 16);
    return tb_arena_printf(&op->arena, "save-%s", id);
}

static int decode_ttl(const struct tb_json *root, struct tb_save_weights *s, struct tb_error *err)
{
    struct tb_json n;
    s->has_ttl = tb_json_find(root, "ttl_seconds", &n);
    return tb_json_int(root, "ttl_seconds", false, TB_MIN_TTL, TB_MAX_TTL, &s->ttl_seconds, err);
}

static int decode_save(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_save_weights *s = &op->u.save_weights;
    struct tb_json n;
    s->sampling_session_seq_id = -1;
    int rc = tb_json_string(root, "path", false, &op->arena, 4096, &s->name, err);
    if (rc) return rc;
    if (s->name) {
        struct tb_error e = {0};
        tb_json_find(root, "path", &n);
        rc = tb_ckpt_name_check(s->name, &e);
        if (rc) return tb_json_fail(&n, err, rc, "%.384s", e.msg);
    }
    rc = decode_ttl(root, s, err);
    if (rc == 0) rc = tb_json_bool(root, "overwrite", false, &s->overwrite, err);
    if (rc == 0)
        rc = tb_json_metadata(root, "user_metadata", true, &op->arena, &s->user_metadata, err);
    return rc;
}

static int rest_save(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    int rc = decode_save(root, op, err);
    if (rc == 0 && !op->u.save_weights.name) op->u.save_weights.name = own_name(op);
    return rc;
}

int tb_tinker_decode_save_weights(const struct tb_body *b, struct tb_op **out, struct tb_error *err)
{
    return tb_json_op(b, TB_OP_SAVE_WEIGHTS, "save_weights", tb_json_address_model, rest_save, out,
                      err);
}

static int rest_save_sampler(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_save_weights *s = &op->u.save_weights;
    const char *kind = "snapshot";
    struct tb_json n;
    int rc = decode_save(root, op, err);
    if (rc == 0) rc = tb_json_string(root, "kind", false, &op->arena, 64, &kind, err);
    if (rc) return rc;
    s->inflight = strcmp(kind, "inflight") == 0;
    if (!s->inflight && strcmp(kind, "snapshot") != 0) {
        tb_json_find(root, "kind", &n);
        return tb_json_fail(&n, err, TB_EINVAL, "\"%s\" is neither \"snapshot\" nor \"inflight\"",
                            kind);
    }
    if (s->name) return 0; /* named: the counter of sampling sessions is not touched */
    rc = tb_json_int(root, "sampling_session_seq_id", false, 0, INT64_MAX,
                     &s->sampling_session_seq_id, err);
    /* SDK 0.1.5 gives neither and wants a path. */
    if (rc == 0 && s->sampling_session_seq_id < 0) s->name = own_name(op);
    return rc;
}

int tb_tinker_decode_save_sampler(const struct tb_body *b, struct tb_op **out, struct tb_error *err)
{
    return tb_json_op(b, TB_OP_SAVE_WEIGHTS_FOR_SAMPLER, "save_weights_for_sampler",
                      tb_json_address_model, rest_save_sampler, out, err);
}

static int rest_save_external(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_json n;
    int rc = tb_json_array(root, "age_encryption_recipients", false, &n, err);
    if (rc == 0 && tb_json_len(&n) > 0)
        rc = tb_json_fail(&n, err, TB_EUNSUPPORTED, "encryption is not supported");
    return rc ? rc : rest_save(root, op, err);
}

int tb_tinker_decode_save_external(const struct tb_body *b, struct tb_op **out,
                                   struct tb_error *err)
{
    return tb_json_op(b, TB_OP_SAVE_WEIGHTS_EXTERNAL, "save_weights_external",
                      tb_json_address_model, rest_save_external, out, err);
}

/* ---- loads: into a model that is there, or as a model's creation */

static int address_load(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_json n;
    if (tb_json_find(root, "model_id", &n)) return tb_json_address_model(root, op, err);
    if (!tb_json_find(root, "session_id", &n))
        return tb_error_set(err, TB_EINVAL,
                            "model_id, or session_id and model_seq_id: required, but absent");
    int rc = tb_json_id(root, "session_id", true, &op->arena, &op->session_id, err);
    return rc ? rc : tb_json_int(root, "model_seq_id", true, 0, INT64_MAX, &op->model_seq_id, err);
}

static int rest_load(const struct tb_json *root, struct tb_op *op, struct tb_error *err)
{
    struct tb_load_weights *l = &op->u.load_weights;
    struct tb_json n;
    int rc = tb_json_string(root, "path", true, &op->arena, 4096, &l->path, err);
    if (rc) return rc;
    struct tb_tinker_path path;
    struct tb_error e = {0};
    tb_json_find(root, "path", &n);
    rc = tb_tinker_path_parse(l->path, strlen(l->path), &path, &e);
    if (rc) return tb_json_fail(&n, err, rc, "%.384s", e.msg);
    rc = tb_json_bool(root, "optimizer", false, &l->optimizer, err);
    if (rc == 0)
        rc = tb_json_string(root, "weights_access_token", false, &op->arena, TB_MAX_TOKEN,
                            &l->access_token, err);
    if (rc == 0) rc = tb_json_object(root, "optimizer_config", false, &n, err);
    if (rc) return rc;
    if (n.v) {
        const char *type = "adamw";
        if (l->optimizer)
            return tb_json_fail(
                &n, err, TB_EINVAL,
                "goes only with optimizer: false; with true the checkpoint's is restored");
        rc = tb_json_string(&n, "type", false, &op->arena, 64, &type, err);
        if (rc == 0 && strcmp(type, "adamw") != 0)
            rc = tb_json_fail(&n, err, TB_EUNSUPPORTED,
                              "type \"%s\" is not supported, only \"adamw\"", type);
        if (rc) return rc;
        l->optimizer_type = "adamw";
    }
    if (op->model_id) return 0;
    rc = tb_json_id(root, "base_model", false, &op->arena, &l->base_model, err);
    if (rc == 0)
        rc = tb_json_metadata(root, "user_metadata", false, &op->arena, &l->user_metadata, err);
    return rc;
}

int tb_tinker_decode_load_weights(const struct tb_body *b, struct tb_op **out, struct tb_error *err)
{
    return tb_json_op(b, TB_OP_LOAD_WEIGHTS, "load_weights", address_load, rest_load, out, err);
}
