/* Store: checkpoints' round trip and life, rows and lists, damage, names, the lock, and recovery.
 */
#include "unit/store/store_help.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <signal.h>
#include <sqlite3.h>
#include <sys/resource.h>

#include "model/safetensors.h"
#include "util/clock.h"

#define RUN "sess-0123456789abcdef:train:0"

struct env {
    uv_loop_t loop;
    char *dir;
    struct tb_store *s;
};

static int setup(void **state)
{
    struct env *e = tb_calloc(1, sizeof(*e));
    uv_loop_init(&e->loop);
    e->dir = make_dir();
    e->s = store_open(&e->loop, e->dir);
    *state = e;
    return 0;
}

static int teardown(void **state)
{
    struct env *e = *state;
    if (e->s) store_close(&e->loop, e->s);
    assert_int_equal(uv_loop_close(&e->loop), 0);
    remove_dir(e->dir);
    tb_free(e->dir);
    tb_free(e);
    return 0;
}

static void reopen(struct env *e)
{
    store_close(&e->loop, e->s);
    e->s = store_open(&e->loop, e->dir);
}

static struct tb_ckpt_write writing(const char *name, enum tb_ckpt_kind kind)
{
    return (struct tb_ckpt_write){
        .tenant = TB_TENANT_DEFAULT, .run_id = RUN, .name = name, .kind = kind};
}

static struct answer save(struct env *e, const char *name, enum tb_ckpt_kind kind, uint64_t seed)
{
    struct tb_ckpt_write w = writing(name, kind);
    return store_save(&e->loop, e->s, &w, make_state(4, seed, true));
}

static struct answer get(struct env *e, const char *path)
{
    struct answer a = {0};
    tb_store_get_ckpt(e->s, TB_TENANT_DEFAULT, path, on_ckpt, &a);
    RUN_UNTIL(&e->loop, a.done);
    return a;
}

static void assert_loads(struct env *e, const char *path, uint64_t seed, bool optimizer)
{
    struct answer a = store_load(&e->loop, e->s, path, optimizer);
    if (a.err.code) fail_msg("%s: %s", path, a.err.msg);
    struct tb_adapter_state *want = make_state(4, seed, true);
    assert_same_state(want, a.state, optimizer);
    tb_adapter_state_destroy(want);
    tb_adapter_state_destroy(a.state);
}

/* ---- tests */

static void test_round_trip(void **state)
{
    struct env *e = *state;
    struct tb_ckpt_write w = writing("c1", TB_CKPT_TRAINING);
    w.user_metadata_json = "{\"note\":\"caf\\u00e9\"}";
    w.ttl_seconds = 3600;
    int64_t before = tb_clock_wall_us();
    struct answer a = store_save(&e->loop, e->s, &w, make_state(4, 123, true));
    assert_int_equal(a.err.code, 0);
    assert_string_equal(a.path, "tinker://" RUN "/weights/c1");
    assert_true(a.row.has_optimizer);
    assert_int_equal(a.row.step, 123);
    assert_true(a.row.size_bytes > 0);
    assert_true(a.row.expires_us >= before + 3600 * INT64_C(1000000));
    assert_loads(e, a.path, 123, true);
    assert_loads(e, a.path, 123, false);
    reopen(e);
    assert_loads(e, a.path, 123, true);
    struct answer g = get(e, a.path);
    assert_int_equal(g.err.code, 0);
    assert_string_equal(g.metadata, "{\"note\":\"caf\\u00e9\"}");
    assert_int_equal(g.row.size_bytes, a.row.size_bytes);
    assert_int_equal(g.row.time_us, a.row.time_us);

    /* special values survive to the bit */
    struct tb_adapter_state *st = make_state(4, 5, true), *want = make_state(4, 5, true);
    static const uint32_t bits[] = {0x7f800000u, 0xff800000u, 0x7fc12345u, 0x80000000u, 1u};
    memcpy(st->p, bits, sizeof(bits));
    memcpy(want->p, bits, sizeof(bits));
    st->step = want->step = INT64_C(5000000000);
    w.name = "odd";
    a = store_save(&e->loop, e->s, &w, st);
    assert_int_equal(a.err.code, 0);
    struct answer r = store_load(&e->loop, e->s, a.path, true);
    assert_int_equal(r.err.code, 0);
    assert_same_state(want, r.state, true);
    tb_adapter_state_destroy(want);
    tb_adapter_state_destroy(r.state);
}

static void test_sampler_and_missing(void **state)
{
    struct env *e = *state;
    struct answer a = save(e, "s1", TB_CKPT_SAMPLER, 9);
    assert_int_equal(a.err.code, 0);
    assert_false(a.row.has_optimizer);
    assert_loads(e, "tinker://" RUN "/sampler_weights/s1", 9, false);
    a = store_load(&e->loop, e->s, "tinker://" RUN "/sampler_weights/s1", true);
    assert_int_equal(a.err.code, TB_EINVAL);
    a = store_load(&e->loop, e->s, "tinker://" RUN "/weights/s1", false);
    assert_int_equal(a.err.code, TB_ENOTFOUND);
    assert_non_null(strstr(a.err.msg, "tinker://" RUN "/weights/s1"));
    a = store_load(&e->loop, e->s, "tinker://nonsense", false);
    assert_int_equal(a.err.code, TB_EINVAL);
    a = get(e, "tinker://" RUN "/weights/none");
    assert_int_equal(a.err.code, TB_ENOTFOUND);
}

static void test_overwrite(void **state)
{
    struct env *e = *state;
    const char *path = "tinker://" RUN "/weights/c";
    assert_int_equal(save(e, "c", TB_CKPT_TRAINING, 1).err.code, 0);
    struct answer a = save(e, "c", TB_CKPT_TRAINING, 2);
    assert_int_equal(a.err.code, TB_EEXIST);
    assert_loads(e, path, 1, true);
    struct tb_ckpt_write w = writing("c", TB_CKPT_TRAINING);
    w.overwrite = true;
    w.user_metadata_json = "{\"k\":\"v\"}";
    a = store_save(&e->loop, e->s, &w, make_state(4, 3, true));
    assert_int_equal(a.err.code, 0);
    assert_loads(e, path, 3, true);
    assert_string_equal(get(e, path).metadata, "{\"k\":\"v\"}");
    w.user_metadata_json = NULL;
    a = store_save(&e->loop, e->s, &w, make_state(4, 4, true));
    assert_string_equal(get(e, path).metadata, "");
    reopen(e);
    assert_loads(e, path, 4, true);
    /* nothing is left over */
    char *tmp = tb_asprintf("%s/tmp", e->dir);
    assert_int_equal(rmdir(tmp), 0);
    assert_int_equal(mkdir(tmp, 0777), 0);
    tb_free(tmp);
}

static void count_cb(void *arg, const struct tb_error *err, const struct tb_ckpt_list *l)
{
    int64_t *out = arg;
    out[0] = err->code ? err->code : l->n;
    out[1] = l->page.total;
    out[2] = 1;
}

static int64_t n_listed(struct env *e, const char *run)
{
    int64_t got[3] = {0};
    tb_store_list_ckpts(e->s, TB_TENANT_DEFAULT, run, 0, 0, count_cb, got);
    RUN_UNTIL(&e->loop, got[2]);
    if (got[0] >= 0) assert_int_equal(got[0], got[1]);
    return got[0];
}

static struct answer simple(struct env *e,
                            void (*call)(struct tb_store *, const char *, struct answer *),
                            const char *path)
{
    struct answer a = {0};
    call(e->s, path, &a);
    RUN_UNTIL(&e->loop, a.done);
    return a;
}

static void call_delete(struct tb_store *s, const char *path, struct answer *a)
{
    tb_store_delete_ckpt(s, TB_TENANT_DEFAULT, path, on_done, a);
}
static void call_publish(struct tb_store *s, const char *path, struct answer *a)
{
    tb_store_publish_ckpt(s, TB_TENANT_DEFAULT, path, true, on_done, a);
}
static void call_unpublish(struct tb_store *s, const char *path, struct answer *a)
{
    tb_store_publish_ckpt(s, TB_TENANT_DEFAULT, path, false, on_done, a);
}
static void call_ttl(struct tb_store *s, const char *path, struct answer *a)
{
    tb_store_set_ckpt_ttl(s, TB_TENANT_DEFAULT, path, 7200, on_done, a);
}
static void call_no_ttl(struct tb_store *s, const char *path, struct answer *a)
{
    tb_store_set_ckpt_ttl(s, TB_TENANT_DEFAULT, path, 0, on_done, a);
}

static void put_run(struct env *e, const char *id, int64_t us)
{
    struct tb_run_row r = {.tenant = TB_TENANT_DEFAULT,
                           .id = id,
                           .session_id = "sess-0123456789abcdef",
                           .base_model = "m0",
                           .lora = {.rank = 8, .alpha = 32, .train_mlp = true},
                           .created_us = us,
                           .last_request_us = us};
    tb_store_put_run(e->s, &r);
}

static void set_expiry(struct env *e, const char *name, int64_t us)
{
    /* another connection stands for the passing of time */
    sqlite3 *db;
    char *path = tb_asprintf("%s/tinkerbell.db", e->dir);
    char *sql =
        tb_asprintf("UPDATE checkpoints SET expires_us = %" PRId64 " WHERE name = '%s'", us, name);
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(db);
    tb_free(sql);
    tb_free(path);
}

static void test_delete_publish_ttl(void **state)
{
    struct env *e = *state;
    const char *path = "tinker://" RUN "/weights/c", *none = "tinker://" RUN "/weights/x";
    char dir[512];
    put_run(e, RUN, 1);
    save(e, "c", TB_CKPT_TRAINING, 1);
    save(e, "d", TB_CKPT_SAMPLER, 1);
    assert_int_equal(simple(e, call_publish, path).err.code, 0);
    assert_true(get(e, path).row.is_public);
    assert_int_equal(simple(e, call_publish, path).err.code, 0);
    assert_int_equal(simple(e, call_unpublish, path).err.code, 0);
    assert_false(get(e, path).row.is_public);
    assert_int_equal(simple(e, call_ttl, path).err.code, 0);
    assert_true(get(e, path).row.expires_us > tb_clock_wall_us());
    assert_int_equal(simple(e, call_no_ttl, path).err.code, 0);
    assert_int_equal(get(e, path).row.expires_us, 0);
    assert_int_equal(simple(e, call_publish, none).err.code, TB_ENOTFOUND);
    assert_int_equal(simple(e, call_ttl, none).err.code, TB_ENOTFOUND);
    assert_int_equal(simple(e, call_delete, none).err.code, TB_ENOTFOUND);
    assert_int_equal(n_listed(e, RUN), 2);
    assert_int_equal(tb_store_ckpt_dir(e->s, path, dir, sizeof(dir), NULL), 0);
    assert_int_equal(access(dir, F_OK), 0);
    assert_int_equal(simple(e, call_delete, path).err.code, 0);
    assert_int_equal(access(dir, F_OK), -1);
    assert_int_equal(simple(e, call_delete, path).err.code, TB_ENOTFOUND);
    assert_int_equal(n_listed(e, RUN), 1);
    assert_int_equal(n_listed(e, "sess-0123456789abcdef:train:9"), TB_ENOTFOUND);
    reopen(e);
    assert_int_equal(n_listed(e, NULL), 1);
}

static void test_expiry(void **state)
{
    struct env *e = *state;
    const char *path = "tinker://" RUN "/weights/c";
    char dir[512];
    put_run(e, RUN, 1);
    save(e, "c", TB_CKPT_TRAINING, 1);
    save(e, "d", TB_CKPT_TRAINING, 2);
    tb_store_ckpt_dir(e->s, path, dir, sizeof(dir), NULL);
    assert_int_equal(n_listed(e, RUN), 2);
    set_expiry(e, "c", tb_clock_wall_us() - 1);
    assert_int_equal(n_listed(e, RUN), 1);
    assert_int_equal(n_listed(e, NULL), 1);
    assert_int_equal(get(e, path).err.code, TB_ENOTFOUND);
    assert_int_equal(store_load(&e->loop, e->s, path, false).err.code, TB_ENOTFOUND);
    /* an expired name is free */
    assert_int_equal(save(e, "c", TB_CKPT_TRAINING, 3).err.code, 0);
    assert_loads(e, path, 3, true);
    set_expiry(e, "c", tb_clock_wall_us() - 1);
    assert_int_equal(access(dir, F_OK), 0);
    tb_store_sweep(e->s);
    assert_int_equal(n_listed(e, NULL), 1); /* in order behind the sweep */
    assert_int_equal(access(dir, F_OK), -1);
    assert_loads(e, "tinker://" RUN "/weights/d", 2, true);
}

static void test_names(void **state)
{
    struct env *e = *state;
    char longest[129], longer[130];
    memset(longest, 'a', 128);
    longest[128] = '\0';
    memset(longer, 'a', 129);
    longer[129] = '\0';
    static const char *const bad[] = {
        "..",  ".",   "/",           "a/b", ".hidden",          "",
        "a b", "a\n", "caf\xc3\xa9", "a:b", "../../etc/passwd", "a\\b"};
    for (size_t i = 0; i < TB_ARRAY_LEN(bad); i++) {
        struct answer a = save(e, bad[i], TB_CKPT_TRAINING, 1);
        assert_int_equal(a.err.code, TB_EINVAL);
    }
    assert_int_equal(save(e, longer, TB_CKPT_TRAINING, 1).err.code, TB_EINVAL);
    assert_int_equal(save(e, longest, TB_CKPT_TRAINING, 1).err.code, 0);
    assert_int_equal(save(e, "A-b_c.9", TB_CKPT_TRAINING, 1).err.code, 0);

    struct tb_tinker_path p;
    static const char *const bad_paths[] = {
        "",
        "tinker://",
        "tinker://a",
        "tinker://a/weights",
        "tinker://a/weights/",
        "tinker:///weights/x",
        "tinker://a/other/x",
        "tinker://a/weights/x/y",
        "tinker://../weights/x",
        "tinker://a/weights/..",
        "tinker://a/weights/.x",
        "http://a/weights/x",
        "tinker://a b/weights/x",
        "Tinker://a/weights/x",
    };
    for (size_t i = 0; i < TB_ARRAY_LEN(bad_paths); i++) {
        struct tb_error err = {0};
        assert_int_equal(tb_tinker_path_parse(bad_paths[i], strlen(bad_paths[i]), &p, &err),
                         TB_EINVAL);
        assert_non_null(strstr(err.msg, "tinker://RUN/KIND/NAME"));
    }
    const char *good = "tinker://s:train:0/external_weights/n.1";
    assert_int_equal(tb_tinker_path_parse(good, strlen(good), &p, NULL), 0);
    assert_string_equal(p.run, "s:train:0");
    assert_int_equal(p.kind, TB_CKPT_EXTERNAL);
    assert_string_equal(p.name, "n.1");
    /* a NUL inside of the text is no end of it */
    assert_int_equal(tb_tinker_path_parse("tinker://a/weights/x\0y", 22, &p, NULL), TB_EINVAL);
    char text[700];
    snprintf(text, sizeof(text), "tinker://%s%s%s/weights/x", longest, longest, longest);
    assert_int_equal(tb_tinker_path_parse(text, strlen(text), &p, NULL), TB_EINVAL);
}

static void test_peft_export(void **state)
{
    struct env *e = *state;
    struct tb_ckpt_write w = writing("e1", TB_CKPT_EXTERNAL);
    w.model_dir = "/models/base";
    struct answer a = store_save(&e->loop, e->s, &w, make_state(4, 1, false));
    assert_int_equal(a.err.code, 0);
    char dir[512], path[600];
    assert_int_equal(tb_store_ckpt_dir(e->s, a.path, dir, sizeof(dir), NULL), 0);
    snprintf(path, sizeof(path), "%s/adapter_config.json", dir);
    json_t *o = json_load_file(path, 0, NULL);
    assert_non_null(o);
    assert_string_equal(json_string_value(json_object_get(o, "peft_type")), "LORA");
    assert_string_equal(json_string_value(json_object_get(o, "base_model_name_or_path")),
                        "/models/base");
    assert_int_equal(json_integer_value(json_object_get(o, "r")), 4);
    assert_int_equal(json_integer_value(json_object_get(o, "lora_alpha")), 32);
    json_t *t = json_object_get(o, "target_modules");
    assert_int_equal(json_array_size(t), 3);
    assert_string_equal(json_string_value(json_array_get(t, 0)), "q_proj");
    assert_string_equal(json_string_value(json_array_get(t, 2)), "lm_head");
    json_decref(o);
    snprintf(path, sizeof(path), "%s/adapter_model.safetensors", dir);
    struct tb_st *st;
    assert_int_equal(tb_st_open(&st, path, NULL), 0);
    assert_int_equal(tb_st_count(st), 6);
    assert_non_null(tb_st_find(st, "base_model.model.lm_head.lora_A.weight"));
    assert_non_null(
        tb_st_find(st, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"));
    tb_st_close(st);
    /* it is a download, not something to load */
    assert_int_equal(store_load(&e->loop, e->s, a.path, false).err.code, TB_EINVAL);

    a = save(e, "t", TB_CKPT_TRAINING, 1);
    tb_store_ckpt_dir(e->s, a.path, dir, sizeof(dir), NULL);
    snprintf(path, sizeof(path), "%s/adapter_model.safetensors", dir);
    assert_int_equal(tb_st_open(&st, path, NULL), 0);
    assert_non_null(tb_st_find(st, "base_model.model.model.unembed_tokens.lora_A.weight"));
    tb_st_close(st);
}

static char *slurp(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    char *p = tb_malloc(*n + 1);
    assert_int_equal(fread(p, 1, *n, f), *n);
    p[*n] = '\0';
    fclose(f);
    return p;
}

static void spit(const char *path, const char *p, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(p, 1, n, f), n);
    fclose(f);
}

static void expect_corrupt(struct env *e, const char *path, const char *file)
{
    struct answer a = store_load(&e->loop, e->s, path, true);
    if (a.err.code != TB_ECORRUPT) fail_msg("%s: code %d, %s", file, a.err.code, a.err.msg);
    assert_non_null(strstr(a.err.msg, file));
}

/* Every kind of damage to every file that is read gives an error that names the file. */
static void test_damage(void **state)
{
    struct env *e = *state;
    struct answer a = save(e, "c", TB_CKPT_TRAINING, 1);
    char dir[512], path[600], link[700];
    tb_store_ckpt_dir(e->s, a.path, dir, sizeof(dir), NULL);
    static const char *const files[] = {"adapter_model.safetensors", "optimizer.safetensors",
                                        "checkpoint.json"};
    for (int i = 0; i < 3; i++) {
        size_t n;
        snprintf(path, sizeof(path), "%s/%s", dir, files[i]);
        char *good = slurp(path, &n);
        spit(path, good, n / 2);
        expect_corrupt(e, a.path, files[i]);
        spit(path, good, 0);
        expect_corrupt(e, a.path, files[i]);
        spit(path, "garbage", 7);
        expect_corrupt(e, a.path, files[i]);
        snprintf(link, sizeof(link), "%s.away", path);
        assert_int_equal(rename(path, link), 0);
        expect_corrupt(e, a.path, files[i]);
        assert_int_equal(rename(link, path), 0);
        if (i < 2) {
            static const size_t where[] = {0, 3, 9, 60};
            for (size_t k = 0; k < 5; k++) {
                size_t at = k < 4 ? where[k] : n - 1;
                char *bad = tb_malloc(n);
                memcpy(bad, good, n);
                bad[at] ^= 0x10;
                spit(path, bad, n);
                expect_corrupt(e, a.path, files[i]);
                tb_free(bad);
            }
        }
        spit(path, good, n);
        tb_free(good);
        assert_loads(e, a.path, 1, true);
    }
    /* the folder is gone under us */
    snprintf(link, sizeof(link), "%s.away", dir);
    assert_int_equal(rename(dir, link), 0);
    expect_corrupt(e, a.path, "checkpoint.json");
}

/* A file that is whole but does not fit: its checksum is right, its contents are not. */
static void test_foreign_tensors(void **state)
{
    struct env *e = *state;
    static const float zeros[64];
    static const struct tb_st_out odd[][2] = {
        {{"base_model.model.a.lora_A.weight", 4, 0, zeros},
         {"base_model.model.a.lora_B.weight", 4, 4, zeros}},
        {{"base_model.model.a.lora_A.weight", 5, 4, zeros},
         {"base_model.model.a.lora_B.weight", 4, 4, zeros}},
        {{"a.lora_A.weight", 4, 4, zeros}, {"base_model.model.a.lora_B.weight", 4, 4, zeros}},
        {{"base_model.model.a.weight", 4, 4, zeros},
         {"base_model.model.a.lora_B.weight", 4, 4, zeros}},
    };
    struct answer a = save(e, "c", TB_CKPT_TRAINING, 1);
    char dir[512], path[600], desc[600];
    tb_store_ckpt_dir(e->s, a.path, dir, sizeof(dir), NULL);
    snprintf(path, sizeof(path), "%s/adapter_model.safetensors", dir);
    snprintf(desc, sizeof(desc), "%s/checkpoint.json", dir);
    for (size_t i = 0; i < TB_ARRAY_LEN(odd); i++) {
        assert_int_equal(tb_st_write_path(path, odd[i], 2, NULL, 0, NULL), 0);
        size_t n;
        char *bytes = slurp(path, &n);
        uint32_t crc = 0xffffffffu; /* CRC-32, bit by bit */
        for (size_t k = 0; k < n; k++) {
            crc ^= (unsigned char)bytes[k];
            for (int b = 0; b < 8; b++)
                crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
        }
        tb_free(bytes);
        json_t *o = json_load_file(desc, 0, NULL);
        json_t *f = json_object_get(json_object_get(o, "files"), "adapter_model.safetensors");
        json_object_set_new(f, "size", json_integer((json_int_t)n));
        json_object_set_new(f, "crc32", json_integer((json_int_t)(crc ^ 0xffffffffu)));
        assert_int_equal(json_dump_file(o, desc, 0), 0);
        json_decref(o);
        expect_corrupt(e, a.path, "adapter_model.safetensors");
    }
}

static void test_lock(void **state)
{
    struct env *e = *state;
    struct tb_store *other = NULL;
    struct tb_error err = {0};
    assert_int_equal(tb_store_open(&other, &e->loop, e->dir, &err), TB_EBUSY);
    assert_non_null(strstr(err.msg, e->dir));
    assert_null(other);
}

static void test_unwritable(void **state)
{
    struct env *e = *state;
    struct tb_store *other = NULL;
    struct tb_error err = {0};
    assert_int_equal(tb_store_open(&other, &e->loop, "/dev/null/data", &err), TB_EIO);
    assert_non_null(strstr(err.msg, "/dev/null"));
    /* a full or broken disk at save: a file stands where the folder of new checkpoints should be */
    char *tmp = tb_asprintf("%s/tmp", e->dir), *away = tb_asprintf("%s/away", e->dir);
    assert_int_equal(rename(tmp, away), 0);
    spit(tmp, "x", 1);
    struct answer a = save(e, "c", TB_CKPT_TRAINING, 1);
    assert_int_equal(a.err.code, TB_EIO);
    assert_non_null(strstr(a.err.msg, tmp));
    assert_int_equal(unlink(tmp), 0);
    assert_int_equal(rename(away, tmp), 0);
    assert_int_equal(get(e, "tinker://" RUN "/weights/c").err.code, TB_ENOTFOUND);
    assert_int_equal(save(e, "c", TB_CKPT_TRAINING, 1).err.code, 0);
    tb_free(tmp);
    tb_free(away);
}

/* The file size limit makes write() fail in the middle, as a full disk does. */
static void test_disk_full(void **state)
{
    struct env *e = *state;
    /* /dev/full through a link in place of a file cannot be arranged from here, so the limit does
     * it; the database is small and stays below it */
    struct tb_ckpt_write w = writing("big", TB_CKPT_TRAINING);
    struct tb_adapter_state *st = make_state(4096, 1, true);
    struct rlimit old, lim;
    void (*sig)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    lim = old;
    lim.rlim_cur = 1 << 20;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &lim), 0);
    struct answer a = store_save(&e->loop, e->s, &w, st);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    signal(SIGXFSZ, sig);
    assert_int_equal(a.err.code, TB_EIO);
    assert_non_null(strstr(a.err.msg, "adapter_model.safetensors"));
    assert_int_equal(n_listed(e, NULL), 0);
    char *tmp = tb_asprintf("%s/tmp", e->dir);
    assert_int_equal(rmdir(tmp), 0); /* empty */
    mkdir(tmp, 0777);
    tb_free(tmp);
}

/* ---- lists */

struct list {
    int done, code, n, n_runs, n_samplers;
    int64_t total;
    char first[80], last[80], ckpt[400], sampler[400], text[100];
};

static void on_runs(void *arg, const struct tb_error *err, const struct tb_run_list *l)
{
    struct list *o = arg;
    o->done = 1;
    o->code = err->code;
    o->n = l->n;
    o->total = l->page.total;
    if (l->n == 0) return;
    snprintf(o->first, sizeof(o->first), "%s", l->rows[0].id);
    snprintf(o->last, sizeof(o->last), "%s", l->rows[l->n - 1].id);
    if (l->last_ckpt[0]) snprintf(o->ckpt, sizeof(o->ckpt), "%s", l->last_ckpt[0]->path);
    if (l->last_sampler[0])
        snprintf(o->sampler, sizeof(o->sampler), "%s", l->last_sampler[0]->path);
}

static void on_sessions(void *arg, const struct tb_error *err, const struct tb_session_list *l)
{
    struct list *o = arg;
    o->done = 1;
    o->code = err->code;
    o->n = l->n;
    o->total = l->page.total;
    o->n_runs = l->n_runs;
    o->n_samplers = l->n_samplers;
    if (l->n == 0) return;
    snprintf(o->first, sizeof(o->first), "%s", l->rows[0].id);
    snprintf(o->last, sizeof(o->last), "%s", l->rows[l->n - 1].id);
    snprintf(o->text, sizeof(o->text), "%s/%s/%s", l->rows[0].status,
             l->rows[0].finish_reason ? l->rows[0].finish_reason : "-",
             l->rows[0].project_id ? l->rows[0].project_id : "-");
}

static void on_sampler(void *arg, const struct tb_error *err, const struct tb_sampler_row *r)
{
    struct list *o = arg;
    o->done = 1;
    o->code = err->code;
    if (r)
        snprintf(o->text, sizeof(o->text), "%s %s %s", r->id, r->base_model,
                 r->model_path ? r->model_path : "-");
}

static struct list list_runs(struct env *e, int64_t offset, int64_t limit)
{
    struct list l = {0};
    tb_store_list_runs(e->s, TB_TENANT_DEFAULT, NULL, offset, limit, on_runs, &l);
    RUN_UNTIL(&e->loop, l.done);
    return l;
}

static struct list list_sessions(struct env *e, int64_t offset, int64_t limit)
{
    struct list l = {0};
    tb_store_list_sessions(e->s, TB_TENANT_DEFAULT, offset, limit, on_sessions, &l);
    RUN_UNTIL(&e->loop, l.done);
    return l;
}

static struct list get_session(struct env *e, const char *id)
{
    struct list l = {0};
    tb_store_get_session(e->s, TB_TENANT_DEFAULT, id, on_sessions, &l);
    RUN_UNTIL(&e->loop, l.done);
    return l;
}

static void test_rows(void **state)
{
    struct env *e = *state;
    char id[80];
    for (int i = 0; i < 5; i++) {
        snprintf(id, sizeof(id), "sess-%d", i);
        struct tb_session_row r = {
            .tenant = TB_TENANT_DEFAULT, .id = id, .created_us = 100 + i, .status = "active"};
        tb_store_put_session(e->s, &r);
        snprintf(id, sizeof(id), "sess-0123456789abcdef:train:%d", i);
        put_run(e, id, 1000 + i);
    }
    struct list l = list_sessions(e, 1, 2);
    assert_int_equal(l.n, 2);
    assert_int_equal(l.total, 5);
    assert_string_equal(l.first, "sess-3");
    assert_string_equal(l.last, "sess-2");
    l = list_sessions(e, 10, 2);
    assert_int_equal(l.n, 0);
    assert_int_equal(l.total, 5);

    /* the first end wins */
    tb_store_end_session(e->s, "sess-4", "client_finished", "success", NULL);
    tb_store_end_session(e->s, "sess-4", "cancelled", NULL, NULL);
    struct answer a = {0};
    tb_store_set_session_project(e->s, TB_TENANT_DEFAULT, "sess-4", "proj", on_done, &a);
    RUN_UNTIL(&e->loop, a.done);
    assert_int_equal(a.err.code, 0);
    assert_string_equal(get_session(e, "sess-4").text, "client_finished/success/proj");
    a.done = 0;
    tb_store_set_session_project(e->s, TB_TENANT_DEFAULT, "none", "proj", on_done, &a);
    RUN_UNTIL(&e->loop, a.done);
    assert_int_equal(a.err.code, TB_ENOTFOUND);
    assert_int_equal(get_session(e, "none").code, TB_ENOTFOUND);

    l = list_runs(e, 0, 3);
    assert_int_equal(l.n, 3);
    assert_int_equal(l.total, 5);
    assert_string_equal(l.first, "sess-0123456789abcdef:train:4");
    assert_string_equal(l.ckpt, "");
    save(e, "a", TB_CKPT_TRAINING, 1);
    save(e, "b", TB_CKPT_TRAINING, 1);
    save(e, "s", TB_CKPT_SAMPLER, 1);
    l = (struct list){0};
    tb_store_get_run(e->s, TB_TENANT_DEFAULT, RUN, on_runs, &l);
    RUN_UNTIL(&e->loop, l.done);
    assert_int_equal(l.n, 1);
    assert_string_equal(l.ckpt, "tinker://" RUN "/weights/b");
    assert_string_equal(l.sampler, "tinker://" RUN "/sampler_weights/s");

    struct tb_sampler_row sp = {.tenant = TB_TENANT_DEFAULT,
                                .id = "sp",
                                .session_id = "sess-0123456789abcdef",
                                .base_model = "m0",
                                .created_us = 1};
    tb_store_put_sampler(e->s, &sp);
    struct tb_session_row r = {.tenant = TB_TENANT_DEFAULT,
                               .id = "sess-0123456789abcdef",
                               .created_us = 7,
                               .status = "active"};
    tb_store_put_session(e->s, &r);
    l = get_session(e, "sess-0123456789abcdef");
    assert_int_equal(l.n_runs, 5);
    assert_int_equal(l.n_samplers, 1);
    l = (struct list){0};
    tb_store_get_sampler(e->s, TB_TENANT_DEFAULT, "sp", on_sampler, &l);
    RUN_UNTIL(&e->loop, l.done);
    assert_string_equal(l.text, "sp m0 -");
    l = (struct list){0};
    tb_store_get_sampler(e->s, TB_TENANT_DEFAULT, "none", on_sampler, &l);
    RUN_UNTIL(&e->loop, l.done);
    assert_int_equal(l.code, TB_ENOTFOUND);

    tb_store_touch_run(e->s, RUN, 5000);
    tb_store_touch_run(e->s, RUN, 6000);
    reopen(e); /* closing flushes; sessions that lived are over */
    assert_string_equal(get_session(e, "sess-0").text, "cancelled/-/-");
    assert_string_equal(get_session(e, "sess-4").text, "client_finished/success/proj");
    assert_int_equal(list_runs(e, 0, 10).n, 5);
}

static void test_many_rows(void **state)
{
    struct env *e = *state;
    enum { N = 100000 };
    sqlite3 *db;
    char *path = tb_asprintf("%s/tinkerbell.db", e->dir);
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    char sql[1200];
    snprintf(
        sql, sizeof(sql),
        "BEGIN; WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < %d)"
        " INSERT INTO checkpoints(run_id, kind, name, base_model, rank, alpha, has_optimizer, step,"
        " time_us, size_bytes) SELECT 'run-' || (i / 100), i %% 2, 'c' || i, 'm0', 8, 32, 1, i, i, 1000"
        " FROM n; WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < %d)"
        " INSERT INTO runs(id, session_id, base_model, rank, alpha, created_us, last_request_us)"
        " SELECT 'run-' || i, 's', 'm0', 8, 32, i, i FROM n; WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL"
        " SELECT i + 1 FROM n WHERE i < %d) INSERT INTO sessions(id, created_us, status)"
        " SELECT 's' || i, i, 'active' FROM n; COMMIT;",
        N - 1, N - 1, N - 1);
    assert_int_equal(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(db);
    tb_free(path);
    uint64_t t0 = tb_clock_ns();
    struct list l = list_runs(e, 0, 20);
    uint64_t t1 = tb_clock_ns();
    assert_int_equal(l.total, N);
    assert_string_equal(l.first, "run-99999");
    l = list_runs(e, 90000, 20);
    uint64_t t2 = tb_clock_ns();
    assert_string_equal(l.first, "run-9999");
    l = list_sessions(e, 99990, 20);
    uint64_t t3 = tb_clock_ns();
    assert_int_equal(l.n, 10);
    int64_t got[3] = {0};
    tb_store_list_ckpts(e->s, TB_TENANT_DEFAULT, NULL, 50000, 100, count_cb, got);
    RUN_UNTIL(&e->loop, got[2]);
    uint64_t t4 = tb_clock_ns();
    assert_int_equal(got[0], 100);
    assert_int_equal(got[1], N);
    got[2] = 0;
    tb_store_list_ckpts(e->s, TB_TENANT_DEFAULT, "run-7", 0, 0, count_cb, got);
    RUN_UNTIL(&e->loop, got[2]);
    uint64_t t5 = tb_clock_ns();
    assert_int_equal(got[0], 100);
    print_message("100,000 rows: runs %.1f ms, runs at 90,000 %.1f ms, sessions at 99,990 %.1f ms, "
                  "checkpoints at 50,000 %.1f ms, of one run %.1f ms\n",
                  (double)(t1 - t0) / 1e6, (double)(t2 - t1) / 1e6, (double)(t3 - t2) / 1e6,
                  (double)(t4 - t3) / 1e6, (double)(t5 - t4) / 1e6);
}

/* ---- databases of earlier versions */

static void run_sql(struct env *e, const char *sql)
{
    sqlite3 *db;
    char *path = tb_asprintf("%s/tinkerbell.db", e->dir);
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    if (sqlite3_exec(db, sql, NULL, NULL, NULL) != SQLITE_OK) fail_msg("%s", sqlite3_errmsg(db));
    sqlite3_close(db);
    tb_free(path);
}

/* Version 1, before there were tenants. */
static const char version_1[] =
    "CREATE TABLE sessions(id TEXT PRIMARY KEY, tags TEXT, user_metadata TEXT, sdk_version TEXT,"
    " project_id TEXT, display_name TEXT, created_us INTEGER NOT NULL, last_seen_us INTEGER,"
    " status TEXT NOT NULL, finish_reason TEXT, finish_detail TEXT);"
    "CREATE INDEX sessions_time ON sessions(created_us);"
    "CREATE INDEX sessions_active ON sessions(status) WHERE status = 'active';"
    "CREATE TABLE runs(id TEXT PRIMARY KEY, session_id TEXT, base_model TEXT NOT NULL,"
    " rank INTEGER, alpha REAL, has_seed INTEGER, seed INTEGER, train_attn INTEGER,"
    " train_mlp INTEGER, train_unembed INTEGER, user_metadata TEXT, created_us INTEGER NOT NULL,"
    " last_request_us INTEGER, corrupted INTEGER NOT NULL DEFAULT 0);"
    "CREATE INDEX runs_time ON runs(created_us);"
    "CREATE INDEX runs_session ON runs(session_id, created_us);"
    "CREATE TABLE samplers(id TEXT PRIMARY KEY, session_id TEXT, base_model TEXT NOT NULL,"
    " model_path TEXT, created_us INTEGER NOT NULL);"
    "CREATE INDEX samplers_session ON samplers(session_id, created_us);"
    "CREATE TABLE checkpoints(run_id TEXT NOT NULL, kind INTEGER NOT NULL, name TEXT NOT NULL,"
    " base_model TEXT NOT NULL, rank INTEGER, alpha REAL, has_seed INTEGER, seed INTEGER,"
    " train_attn INTEGER, train_mlp INTEGER, train_unembed INTEGER, has_optimizer INTEGER,"
    " step INTEGER, time_us INTEGER NOT NULL, size_bytes INTEGER NOT NULL,"
    " expires_us INTEGER NOT NULL DEFAULT 0, public INTEGER NOT NULL DEFAULT 0,"
    " user_metadata TEXT, PRIMARY KEY(run_id, kind, name));"
    "CREATE INDEX ckpts_time ON checkpoints(time_us, expires_us);"
    "CREATE INDEX ckpts_run ON checkpoints(run_id, time_us, expires_us);"
    "CREATE INDEX ckpts_kind ON checkpoints(run_id, kind, time_us, expires_us);"
    "CREATE INDEX ckpts_expires ON checkpoints(expires_us) WHERE expires_us > 0;"
    "CREATE TABLE pending(write_id TEXT PRIMARY KEY, run_id TEXT, kind INTEGER, name TEXT,"
    " tmp TEXT);"
    "INSERT INTO sessions(id, created_us, status, project_id) VALUES('s', 1, 'cancelled', 'p');"
    "INSERT INTO runs(id, session_id, base_model, rank, created_us) VALUES('" RUN "', 's', 'm0',"
    " 8, 2);"
    "INSERT INTO samplers(id, session_id, base_model, created_us) VALUES('sp', 's', 'm0', 3);"
    "PRAGMA user_version = 1;";

static void test_migration(void **state)
{
    struct env *e = *state;
    const char *path = "tinker://" RUN "/weights/c";
    save(e, "c", TB_CKPT_TRAINING, 1); /* its folder; the row is adopted */
    store_close(&e->loop, e->s);
    char *db = tb_asprintf("%s/tinkerbell.db", e->dir);
    assert_int_equal(remove(db), 0);
    run_sql(e, version_1);
    for (int i = 0; i < 2; i++) { /* the second time there is nothing to do */
        e->s = store_open(&e->loop, e->dir);
        assert_string_equal(get_session(e, "s").text, "cancelled/-/p");
        assert_int_equal(get_session(e, "s").n_runs, 1);
        assert_int_equal(list_runs(e, 0, 10).total, 1);
        assert_loads(e, path, 1, true);
        struct list l = {0};
        tb_store_get_sampler(e->s, TB_TENANT_DEFAULT, "sp", on_sampler, &l);
        RUN_UNTIL(&e->loop, l.done);
        assert_string_equal(l.text, "sp m0 -");
        l = (struct list){0};
        tb_store_list_runs(e->s, "them", NULL, 0, 10, on_runs, &l);
        RUN_UNTIL(&e->loop, l.done);
        assert_int_equal(l.total, 0);
        l = (struct list){0};
        tb_store_list_runs(e->s, TB_TENANT_DEFAULT, i ? "p" : "q", 0, 10, on_runs, &l);
        RUN_UNTIL(&e->loop, l.done);
        assert_int_equal(l.total, i);
        assert_int_equal(l.n, i);
        store_close(&e->loop, e->s);
    }
    run_sql(e, "PRAGMA user_version = 99");
    struct tb_store *none;
    struct tb_error err;
    assert_int_equal(tb_store_open(&none, &e->loop, e->dir, &err), TB_EINVAL);
    assert_non_null(strstr(err.msg, "99"));
    assert_int_equal(remove(db), 0);
    tb_free(db);
    e->s = store_open(&e->loop, e->dir);
}

/* ---- recovery of what a crash or a person leaves */

static void test_recovery(void **state)
{
    struct env *e = *state;
    const char *path = "tinker://" RUN "/weights/c";
    char dir[512], away[600];
    save(e, "c", TB_CKPT_TRAINING, 1);
    tb_store_ckpt_dir(e->s, path, dir, sizeof(dir), NULL);

    /* a lost row is found again from the folder */
    store_close(&e->loop, e->s);
    run_sql(e, "DELETE FROM checkpoints");
    e->s = store_open(&e->loop, e->dir);
    assert_loads(e, path, 1, true);
    assert_int_equal(n_listed(e, RUN), 1); /* and its run */

    /* a lost folder takes its row along */
    store_close(&e->loop, e->s);
    snprintf(away, sizeof(away), "%s/away", e->dir);
    assert_int_equal(rename(dir, away), 0);
    e->s = store_open(&e->loop, e->dir);
    assert_int_equal(get(e, path).err.code, TB_ENOTFOUND);

    /* a folder that is not what its name says, or cannot be read, is left alone */
    store_close(&e->loop, e->s);
    char wrong[600];
    snprintf(wrong, sizeof(wrong), "%s/checkpoints/%s/weights/other", e->dir, RUN);
    assert_int_equal(rename(away, wrong), 0);
    e->s = store_open(&e->loop, e->dir);
    assert_int_equal(n_listed(e, NULL), 0);
    assert_int_equal(access(wrong, F_OK), 0);

    /* a save that had all its files but not its place; the place is free: finished */
    char id[64] = "";
    char desc[700];
    snprintf(desc, sizeof(desc), "%s/checkpoint.json", wrong);
    json_t *o = json_load_file(desc, 0, NULL);
    snprintf(id, sizeof(id), "%s", json_string_value(json_object_get(o, "write_id")));
    json_decref(o);
    store_close(&e->loop, e->s);
    char tmp[600], sql[400];
    snprintf(tmp, sizeof(tmp), "%s/tmp/new-1", e->dir);
    assert_int_equal(rename(wrong, tmp), 0);
    snprintf(sql, sizeof(sql), "INSERT INTO pending VALUES('%s', '" RUN "', 0, 'c', 'new-1')", id);
    run_sql(e, sql);
    e->s = store_open(&e->loop, e->dir);
    assert_loads(e, path, 1, true);

    /* the same with an older checkpoint in place: the save had not happened */
    store_close(&e->loop, e->s);
    assert_int_equal(mkdir(tmp, 0777), 0);
    snprintf(sql, sizeof(sql), "INSERT INTO pending VALUES('another', '" RUN "', 0, 'c', 'new-1')");
    run_sql(e, sql);
    e->s = store_open(&e->loop, e->dir);
    assert_loads(e, path, 1, true);
    assert_int_equal(access(tmp, F_OK), -1);

    /* in place, but the row is still the old one's */
    store_close(&e->loop, e->s);
    snprintf(sql, sizeof(sql),
             "INSERT INTO pending VALUES('%s', '" RUN
             "', 0, 'c', 'new-1'); UPDATE checkpoints SET step = 77",
             id);
    run_sql(e, sql);
    e->s = store_open(&e->loop, e->dir);
    assert_int_equal(get(e, path).row.step, 1);
}

/* Jobs queued before close are finished, their callbacks made. */
static void test_close_with_queue(void **state)
{
    struct env *e = *state;
    struct answer a[8];
    char name[8][8];
    memset(a, 0, sizeof(a));
    for (int i = 0; i < 8; i++) {
        snprintf(name[i], sizeof(name[i]), "c%d", i);
        struct tb_ckpt_write w = writing(name[i], TB_CKPT_TRAINING);
        tb_store_write_ckpt(e->s, &w, make_state(4, (uint64_t)i, true), on_ckpt, &a[i]);
        put_run(e, name[i], i);
    }
    store_close(&e->loop, e->s);
    for (int i = 0; i < 8; i++) {
        assert_int_equal(a[i].done, 1);
        assert_int_equal(a[i].err.code, 0);
    }
    e->s = store_open(&e->loop, e->dir);
    assert_int_equal(n_listed(e, NULL), 8);
    assert_int_equal(list_runs(e, 0, 100).n, 8);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_round_trip),
        T(test_sampler_and_missing),
        T(test_overwrite),
        T(test_delete_publish_ttl),
        T(test_expiry),
        T(test_names),
        T(test_peft_export),
        T(test_damage),
        T(test_foreign_tensors),
        T(test_lock),
        T(test_unwritable),
        T(test_disk_full),
        T(test_rows),
        T(test_many_rows),
        T(test_migration),
        T(test_recovery),
        T(test_close_with_queue),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
