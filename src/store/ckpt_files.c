/*
 * What a checkpoint's folder holds: tensors, PEFT's configuration, and checkpoint.json, which
 * repeats all that the database's row says and a checksum of every tensor file, so that a folder
 * stands for itself and damage is found when it is read. Everything read here is untrusted. Pool
 * threads.
 */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/safetensors.h"
#include "store/store_internal.h"
#include "util/clock.h"
#include "util/mem.h"
#include "util/span.h"

#define FORMAT      1
#define PREFIX      "base_model.model."
#define AVG         "exp_avg."
#define AVG_SQ      "exp_avg_sq."
#define UNEMBED     "model.unembed_tokens."
#define MAX_JSON    (4u << 20)
#define SUFFIX_A    ".lora_A.weight"
#define SUFFIX_B    ".lora_B.weight"
#define MAX_TENSORS 1000000

static bool ends_with(const char *s, const char *suffix)
{
    size_t n = strlen(s), k = strlen(suffix);
    return n >= k && memcmp(s + n - k, suffix, k) == 0;
}

/* ---- writing */

/* Tensor names in a file: Tinker's, or PEFT's where the head is lm_head, tied or not: PEFT has no
 * spelling for a head adapter on embed_tokens. */
static const char *file_name_of(struct tb_arena *a, const char *lead, const char *name, bool peft)
{
    if (peft && !strncmp(name, UNEMBED, sizeof(UNEMBED) - 1))
        return tb_arena_printf(a, "%s%slm_head.%s", lead, PREFIX, name + sizeof(UNEMBED) - 1);
    return tb_arena_printf(a, "%s%s%s", lead, PREFIX, name);
}

static int write_tensors(const char *path, const struct tb_st_out *t, size_t n,
                         struct tb_error *err)
{
    static const struct tb_st_meta meta[] = {{"format", "pt"}};
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return tb_error_set(err, TB_EIO, "cannot create %s: %s", path, strerror(errno));
    int rc = tb_st_write_fd(fd, t, n, meta, 1, err);
    if (rc) tb_error_prefix(err, "%s", path);
    if (!rc && fsync(fd))
        rc = tb_error_set(err, TB_EIO, "cannot sync %s: %s", path, strerror(errno));
    if (close(fd) && !rc)
        rc = tb_error_set(err, TB_EIO, "cannot close %s: %s", path, strerror(errno));
    return rc;
}

static int write_adapter(const char *path, const struct tb_adapter_state *st, bool peft,
                         struct tb_error *err)
{
    struct tb_arena a = {0};
    size_t n = (size_t)st->n_tensors;
    struct tb_st_out *t = tb_arena_try_array(&a, n + 1, sizeof(*t));
    int rc = t ? 0 : tb_error_set(err, TB_ENOMEM, "%s: no memory for the tensor list", path);
    for (size_t i = 0; i < n && !rc; i++) {
        const struct tb_state_tensor *s = &st->tensors[i];
        t[i] = (struct tb_st_out){file_name_of(&a, "", s->name, peft), s->rows, s->cols,
                                  st->p + s->offset};
    }
    if (!rc) rc = write_tensors(path, t, n, err);
    tb_arena_fini(&a);
    return rc;
}

static int write_optimizer(const char *path, const struct tb_adapter_state *st,
                           struct tb_error *err)
{
    struct tb_arena a = {0};
    size_t n = (size_t)st->n_tensors;
    struct tb_st_out *t = tb_arena_try_array(&a, 2 * n + 1, sizeof(*t));
    int rc = t ? 0 : tb_error_set(err, TB_ENOMEM, "%s: no memory for the tensor list", path);
    for (size_t i = 0; i < n && !rc; i++) {
        const struct tb_state_tensor *s = &st->tensors[i];
        t[i] = (struct tb_st_out){file_name_of(&a, AVG, s->name, false), s->rows, s->cols,
                                  st->m + s->offset};
        t[n + i] = (struct tb_st_out){file_name_of(&a, AVG_SQ, s->name, false), s->rows, s->cols,
                                      st->v + s->offset};
    }
    if (!rc) rc = write_tensors(path, t, 2 * n, err);
    tb_arena_fini(&a);
    return rc;
}

/* The last part of each adapted module's name, in order of appearance, each once. */
static json_t *target_modules(const struct tb_adapter_state *st, bool peft)
{
    json_t *list = json_array(), *seen = json_object();
    for (int32_t i = 0; i < st->n_tensors; i++) {
        const char *name = st->tensors[i].name;
        if (!ends_with(name, SUFFIX_A)) continue;
        const char *end = name + strlen(name) - strlen(SUFFIX_A), *leaf = end;
        while (leaf > name && leaf[-1] != '.')
            leaf--;
        char *text = tb_strndup(leaf, (size_t)(end - leaf));
        const char *use = peft && !strcmp(text, "unembed_tokens") ? "lm_head" : text;
        if (!json_object_get(seen, use)) {
            json_object_set_new(seen, use, json_true());
            json_array_append_new(list, json_string(use));
        }
        tb_free(text);
    }
    json_decref(seen);
    return list;
}

static int write_json(const char *path, json_t *o, struct tb_error *err)
{
    char *text = json_dumps(o, JSON_INDENT(2) | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(17));
    if (!text) return tb_error_set(err, TB_ENOMEM, "cannot encode %s", path);
    int rc = tb_write_file(path, text, strlen(text), err);
    free(text); /* jansson's default allocator */
    return rc;
}

static int write_config(const char *path, const struct tb_adapter_state *st, bool peft,
                        const struct tb_ckpt_write *w, struct tb_error *err)
{
    const char *base = peft && w->model_dir ? w->model_dir : st->base_model;
    double alpha = (double)st->lora.alpha;
    json_t *ja = alpha >= 0 && alpha < 1e9 && alpha == (double)(int64_t)alpha
                     ? json_integer((json_int_t)alpha)
                     : json_real(alpha);
    json_t *o = json_pack(
        "{s:s, s:s, s:s?, s:i, s:o, s:f, s:s, s:b, s:b, s:b, s:n, s:{}, s:{}, s:o}", "peft_type",
        "LORA", "task_type", "CAUSAL_LM", "base_model_name_or_path", base, "r", st->lora.rank,
        "lora_alpha", ja, "lora_dropout", 0.0, "bias", "none", "fan_in_fan_out", 0,
        "inference_mode", 1, "init_lora_weights", 1, "modules_to_save", "rank_pattern",
        "alpha_pattern", "target_modules", target_modules(st, peft));
    if (!o) return tb_error_set(err, TB_EINVAL, "cannot describe the adapter (base model's name)");
    int rc = write_json(path, o, err);
    json_decref(o);
    return rc;
}

static json_t *file_entry(const char *path, int64_t *sum, struct tb_error *err)
{
    int64_t size;
    uint32_t crc;
    if (tb_file_crc(path, &size, &crc, err)) return NULL;
    *sum += size;
    return json_pack("{s:I, s:I}", "size", (json_int_t)size, "crc32", (json_int_t)crc);
}

static int write_description(const char *dir, const char *write_id, const struct tb_ckpt_row *row,
                             json_t *files, struct tb_error *err)
{
    json_t *meta = json_null();
    if (row->user_metadata_json) {
        meta = json_loads(row->user_metadata_json, JSON_REJECT_DUPLICATES, NULL);
        if (!json_is_object(meta)) {
            json_decref(meta);
            json_decref(files);
            return tb_error_set(err, TB_EINVAL, "user_metadata is not a JSON object");
        }
    }
    char seed[24];
    snprintf(seed, sizeof(seed), "%llu", (unsigned long long)row->lora.seed);
    json_t *o = json_pack(
        "{s:i, s:s, s:s, s:s, s:s, s:s, s:s, s:i, s:f, s:o, s:b, s:b, s:b, s:o, s:I, s:I, s:I, s:o, s:o}",
        "format", FORMAT, "write_id", write_id, "tenant", row->tenant, "run", row->run_id, "kind",
        tb_ckpt_kind_dir(row->kind), "name", row->name, "base_model", row->base_model, "rank",
        row->lora.rank, "alpha", (double)row->lora.alpha, "seed",
        row->lora.has_seed ? json_string(seed) : json_null(), "train_attn", row->lora.train_attn,
        "train_mlp", row->lora.train_mlp, "train_unembed", row->lora.train_unembed, "optimizer",
        row->has_optimizer ? json_string("adamw") : json_null(), "step", (json_int_t)row->step,
        "time_us", (json_int_t)row->time_us, "expires_us", (json_int_t)row->expires_us,
        "user_metadata", meta, "files", files);
    if (!o) return tb_error_set(err, TB_EINVAL, "cannot describe the checkpoint as JSON");
    char *path = tb_path_join(dir, TB_CKPT_JSON);
    int rc = write_json(path, o, err);
    tb_free(path);
    json_decref(o);
    return rc;
}

int tb_ckpt_write_files(const char *dir, const char *write_id, struct tb_ckpt_row *row,
                        const struct tb_ckpt_write *w, const struct tb_adapter_state *state,
                        struct tb_error *err)
{
    bool peft = row->kind == TB_CKPT_EXTERNAL;
    char *adapter = tb_path_join(dir, TB_CKPT_ADAPTER), *config = tb_path_join(dir, TB_CKPT_CONFIG);
    char *optim = tb_path_join(dir, TB_CKPT_OPTIM);
    json_t *files = json_object(), *e;
    int64_t sum = 0;

    int rc = write_adapter(adapter, state, peft, err);
    if (!rc) rc = write_config(config, state, peft, w, err);
    if (!rc && row->has_optimizer) rc = write_optimizer(optim, state, err);
    const char *paths[] = {adapter, config, row->has_optimizer ? optim : NULL};
    static const char *const names[] = {TB_CKPT_ADAPTER, TB_CKPT_CONFIG, TB_CKPT_OPTIM};
    for (int i = 0; i < 3 && paths[i] && !rc; i++) {
        if ((e = file_entry(paths[i], &sum, err)))
            json_object_set_new(files, names[i], e);
        else
            rc = err->code;
    }
    if (rc) goto out;
    row->size_bytes = sum;
    rc = write_description(dir, write_id, row, files, err);
    files = NULL;
    if (!rc) rc = tb_fsync_path(dir, err);
out:
    json_decref(files);
    tb_free(adapter);
    tb_free(config);
    tb_free(optim);
    return rc;
}

/* ---- reading */

static int corrupt(struct tb_error *err, const char *path, const char *what)
{
    return tb_error_set(err, TB_ECORRUPT, "%s: %s", path, what);
}

static int load_json(const char *dir, json_t **out, struct tb_error *err)
{
    char *path = tb_path_join(dir, TB_CKPT_JSON), *text = NULL;
    size_t n = 0;
    int rc = tb_read_file(path, MAX_JSON, &text, &n, err);
    if (rc == TB_EIO && access(path, F_OK) && errno == ENOENT)
        rc = corrupt(err, path, "is missing");
    if (!rc) {
        json_error_t je;
        *out = json_loadb(text, n, JSON_REJECT_DUPLICATES, &je);
        if (!json_is_object(*out)) {
            json_decref(*out);
            *out = NULL;
            rc = corrupt(err, path, "is not a JSON object");
        } else if (json_integer_value(json_object_get(*out, "format")) != FORMAT) {
            json_decref(*out);
            *out = NULL;
            rc = corrupt(err, path, "has an unknown format");
        }
    }
    tb_free(text);
    tb_free(path);
    return rc;
}

int tb_ckpt_link_files(const char *from, const char *to, const char *write_id,
                       const struct tb_ckpt_row *row, struct tb_error *err)
{
    static const char *const names[] = {TB_CKPT_ADAPTER, TB_CKPT_CONFIG, TB_CKPT_OPTIM};
    json_t *o = NULL;
    int rc = load_json(from, &o, err);
    if (rc) return rc;
    json_t *files = json_object_get(o, "files");
    for (size_t i = 0; i < TB_ARRAY_LEN(names) && !rc; i++) {
        if (!json_object_get(files, names[i])) continue;
        char *a = tb_path_join(from, names[i]), *b = tb_path_join(to, names[i]);
        rc = tb_link_or_copy(a, b, err);
        tb_free(b);
        tb_free(a);
    }
    if (!rc) rc = write_description(to, write_id, row, json_deep_copy(files), err);
    if (!rc) rc = tb_fsync_path(to, err);
    json_decref(o);
    return rc;
}

static bool get_text(json_t *o, struct tb_arena *a, const char *key, const char **out)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_string(v)) return false;
    *out = tb_arena_strndup(a, json_string_value(v), json_string_length(v));
    return true;
}

static bool get_int(json_t *o, const char *key, int64_t *out)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_integer(v)) return false;
    *out = json_integer_value(v);
    return true;
}

static bool get_bool(json_t *o, const char *key, bool *out)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_boolean(v)) return false;
    *out = json_is_true(v);
    return true;
}

static bool row_from_json(json_t *o, struct tb_arena *a, struct tb_ckpt_row *r)
{
    const char *kind = NULL;
    int64_t rank = 0;
    bool ok = get_text(o, a, "run", &r->run_id) && get_text(o, a, "name", &r->name) &&
              get_text(o, a, "kind", &kind) && get_text(o, a, "base_model", &r->base_model) &&
              get_int(o, "rank", &rank) && get_int(o, "step", &r->step) &&
              get_int(o, "time_us", &r->time_us) && get_int(o, "expires_us", &r->expires_us) &&
              get_bool(o, "train_attn", &r->lora.train_attn) &&
              get_bool(o, "train_mlp", &r->lora.train_mlp) &&
              get_bool(o, "train_unembed", &r->lora.train_unembed) &&
              json_is_number(json_object_get(o, "alpha"));
    if (!ok || tb_ckpt_kind_parse(kind, strlen(kind), &r->kind)) return false;
    if (rank < 1 || rank > 65536 || r->step < 0) return false;
    r->lora.rank = (int32_t)rank;
    r->lora.alpha = (float)json_number_value(json_object_get(o, "alpha"));
    const char *seed = json_string_value(json_object_get(o, "seed"));
    r->lora.has_seed = seed != NULL;
    if (seed && !tb_span_u64(tb_span_str(seed), &r->lora.seed)) return false;
    r->has_optimizer = json_is_string(json_object_get(o, "optimizer"));
    if (!get_text(o, a, "tenant", &r->tenant)) r->tenant = TB_TENANT_DEFAULT;
    const json_t *meta = json_object_get(o, "user_metadata");
    if (json_is_object(meta)) {
        char *text = json_dumps(meta, JSON_COMPACT | JSON_PRESERVE_ORDER);
        if (!text) return false;
        r->user_metadata_json = tb_arena_strdup(a, text);
        free(text); /* jansson's default allocator */
    }
    r->path = tb_arena_printf(a, "tinker://%s/%s/%s", r->run_id, kind, r->name);
    return true;
}

int tb_ckpt_read_json(const char *dir, struct tb_arena *a, struct tb_ckpt_row *row, char *write_id,
                      struct tb_error *err)
{
    json_t *o = NULL;
    int rc = load_json(dir, &o, err);
    if (rc) return rc;
    memset(row, 0, sizeof(*row));
    const char *id = json_string_value(json_object_get(o, "write_id"));
    if (!row_from_json(o, a, row) || !id || strlen(id) > TB_WRITE_ID) {
        char *path = tb_path_join(dir, TB_CKPT_JSON);
        rc = corrupt(err, path, "lacks a field or has a bad one");
        tb_free(path);
    } else {
        if (write_id) memcpy(write_id, id, strlen(id) + 1);
        const char *file;
        json_t *v;
        json_object_foreach(json_object_get(o, "files"), file, v)
        {
            row->size_bytes += json_integer_value(json_object_get(v, "size"));
        }
    }
    json_decref(o);
    return rc;
}

/* Opens a tensor file after comparing its size and checksum with checkpoint.json. */
static int open_checked(const char *path, const json_t *files, const char *name, struct tb_st **out,
                        struct tb_error *err)
{
    const json_t *e = json_object_get(files, name);
    const json_t *js = json_object_get(e, "size"), *jc = json_object_get(e, "crc32");
    if (!json_is_integer(js) || !json_is_integer(jc))
        return corrupt(err, path, "checkpoint.json has no checksum of it");
    int64_t size = 0;
    uint32_t crc = 0;
    if (access(path, F_OK) && errno == ENOENT) return corrupt(err, path, "is missing");
    int rc = tb_file_crc(path, &size, &crc, err);
    if (rc) return rc;
    if (size != json_integer_value(js))
        return tb_error_set(err, TB_ECORRUPT, "%s: has %lld bytes instead of %lld", path,
                            (long long)size, (long long)json_integer_value(js));
    if ((json_int_t)crc != json_integer_value(jc))
        return corrupt(err, path, "its checksum does not match checkpoint.json");
    return tb_st_open(out, path, err);
}

/* Checks a tensor of the adapter against the rank; side 'A' is [rank, in], 'B' is [out, rank]. */
static int add_tensor(struct tb_adapter_state *s, const struct tb_st_tensor *t, const char *path,
                      struct tb_error *err)
{
    bool a = ends_with(t->name, SUFFIX_A), b = ends_with(t->name, SUFFIX_B);
    bool named = (a || b) && !strncmp(t->name, PREFIX, sizeof(PREFIX) - 1);
    if (!named || !t->readable || t->dtype != TB_F32 || t->n_dims != 2 || t->shape[0] < 1 ||
        t->shape[1] < 1 || t->shape[0] > INT32_MAX || t->shape[1] > INT32_MAX ||
        t->shape[a ? 0 : 1] != s->lora.rank)
        return tb_error_set(err, TB_ECORRUPT, "%s: tensor %.200s is not part of a rank %d adapter",
                            path, t->name, s->lora.rank);
    int64_t n = t->shape[0] * t->shape[1];
    struct tb_state_tensor *o = &s->tensors[s->n_tensors++];
    o->name = tb_arena_strdup(&s->arena, t->name + sizeof(PREFIX) - 1);
    o->rows = (int32_t)t->shape[0];
    o->cols = (int32_t)t->shape[1];
    o->offset = s->n_floats;
    if (__builtin_add_overflow(s->n_floats, n, &s->n_floats))
        return corrupt(err, path, "has more elements than can be counted");
    return 0;
}

static int alloc_floats(float **out, int64_t n, const char *path, struct tb_error *err)
{
    size_t bytes;
    *out = tb_mul_size((size_t)n, sizeof(float), &bytes) ? tb_try_malloc(TB_MAX(bytes, 1)) : NULL;
    if (!*out)
        return tb_error_set(err, TB_ENOMEM, "%s: no memory for %lld numbers", path, (long long)n);
    return 0;
}

static int read_adapter(struct tb_adapter_state *s, const struct tb_st *st, const char *path,
                        struct tb_error *err)
{
    size_t n = tb_st_count(st);
    if (n == 0 || n % 2 || n > MAX_TENSORS) return corrupt(err, path, "is not a LoRA adapter");
    s->tensors = tb_arena_calloc(&s->arena, n, sizeof(*s->tensors));
    int rc = 0;
    for (size_t i = 0; i < n && !rc; i++)
        rc = add_tensor(s, tb_st_at(st, i), path, err);
    if (!rc) rc = alloc_floats(&s->p, s->n_floats, path, err);
    for (size_t i = 0; i < n && !rc; i++) {
        const struct tb_state_tensor *t = &s->tensors[i];
        tb_st_to_float(tb_st_at(st, i), s->p + t->offset, (size_t)t->rows * (size_t)t->cols);
    }
    return rc;
}

static int read_moments(struct tb_adapter_state *s, const struct tb_st *st, const char *path,
                        struct tb_error *err)
{
    int rc = alloc_floats(&s->m, s->n_floats, path, err);
    if (!rc) rc = alloc_floats(&s->v, s->n_floats, path, err);
    if (!rc && tb_st_count(st) != 2 * (size_t)s->n_tensors)
        rc = corrupt(err, path, "does not match the adapter");
    struct tb_arena a = {0};
    for (int32_t i = 0; i < s->n_tensors && !rc; i++) {
        const struct tb_state_tensor *t = &s->tensors[i];
        for (int k = 0; k < 2 && !rc; k++) {
            const char *name = file_name_of(&a, k ? AVG_SQ : AVG, t->name, false);
            const struct tb_st_tensor *x = tb_st_find(st, name);
            if (!x || !x->readable || x->dtype != TB_F32 || x->n_dims != 2 ||
                x->shape[0] != t->rows || x->shape[1] != t->cols)
                rc = tb_error_set(err, TB_ECORRUPT, "%s: tensor %.200s is missing or misshapen",
                                  path, name);
            else
                tb_st_to_float(x, (k ? s->v : s->m) + t->offset, (size_t)t->rows * (size_t)t->cols);
        }
    }
    tb_arena_fini(&a);
    return rc;
}

int tb_ckpt_read_files(const char *dir, bool with_optimizer, struct tb_adapter_state **out,
                       struct tb_error *err)
{
    struct tb_adapter_state *s = tb_adapter_state_create();
    char *adapter = tb_path_join(dir, TB_CKPT_ADAPTER), *optim = tb_path_join(dir, TB_CKPT_OPTIM);
    struct tb_st *st = NULL;
    json_t *o = NULL;
    struct tb_ckpt_row row = {0};

    int rc = load_json(dir, &o, err);
    if (!rc && !row_from_json(o, &s->arena, &row)) rc = corrupt(err, dir, "bad " TB_CKPT_JSON);
    if (rc) goto out;
    s->base_model = row.base_model;
    s->lora = row.lora;
    s->step = row.step;
    const json_t *files = json_object_get(o, "files");
    rc = open_checked(adapter, files, TB_CKPT_ADAPTER, &st, err);
    if (!rc) rc = read_adapter(s, st, adapter, err);
    if (rc || !with_optimizer) goto out;
    tb_st_close(st);
    st = NULL;
    rc = open_checked(optim, files, TB_CKPT_OPTIM, &st, err);
    if (!rc) rc = read_moments(s, st, optim, err);
out:
    tb_st_close(st);
    json_decref(o);
    tb_free(adapter);
    tb_free(optim);
    if (rc)
        tb_adapter_state_destroy(s);
    else
        *out = s;
    return rc;
}
