/*
 * Copies of checkpoints and the search of sessions, on a real store in a folder of its own.
 */
#include "unit/store/store_help.h"

#include "util/clock.h"

struct found {
    int done, n;
    bool more;
    int64_t ckpts, bytes, last_us;
    char ids[600], last[100];
};

static void on_found(void *arg, const struct tb_error *err, const struct tb_session_search *r)
{
    struct found *f = arg;
    size_t at = 0;
    if (err->code) fail_msg("%s", err->msg);
    f->done = 1;
    f->n = r->n;
    f->more = r->more;
    for (int i = 0; i < r->n; i++) {
        at += (size_t)snprintf(f->ids + at, sizeof(f->ids) - at, "%s ", r->rows[i].session.id);
        f->ckpts += r->rows[i].n_ckpts;
        f->bytes += r->rows[i].ckpt_bytes;
        f->last_us = r->rows[i].session.created_us;
        snprintf(f->last, sizeof(f->last), "%s", r->rows[i].session.id);
    }
}

static struct found search(uv_loop_t *loop, struct tb_store *s, struct tb_session_query q)
{
    struct found f = {0};
    if (!q.limit) q.limit = 10;
    if (!q.tenant) q.tenant = TB_TENANT_DEFAULT;
    tb_store_search_sessions(s, &q, on_found, &f);
    RUN_UNTIL(loop, f.done);
    return f;
}

static struct answer copy(uv_loop_t *loop, struct tb_store *s, const char *path, const char *run,
                          int64_t ttl)
{
    struct answer a = {0};
    struct tb_ckpt_copy c = {.reader = TB_TENANT_DEFAULT,
                             .path = path,
                             .tenant = TB_TENANT_DEFAULT,
                             .run_id = run,
                             .session_id = "sess-b",
                             .ttl_seconds = ttl};
    tb_store_copy_ckpt(s, &c, on_ckpt, &a);
    RUN_UNTIL(loop, a.done);
    return a;
}

static void remove_ckpt(uv_loop_t *loop, struct tb_store *s, const char *path)
{
    struct answer a = {0};
    tb_store_delete_ckpt(s, TB_TENANT_DEFAULT, path, on_done, &a);
    RUN_UNTIL(loop, a.done);
    assert_int_equal(a.err.code, 0);
}

static void test_copy(void **state)
{
    (void)state;
    uv_loop_t loop;
    uv_loop_init(&loop);
    char *dir = make_dir(), src[600], dst[600];
    struct tb_store *s = store_open(&loop, dir);
    struct tb_ckpt_write w = {.tenant = TB_TENANT_DEFAULT,
                              .run_id = "sess-a:train:0",
                              .name = "c1",
                              .kind = TB_CKPT_TRAINING,
                              .ttl_seconds = 7200,
                              .user_metadata_json = "{\"k\":\"v\"}"};
    struct answer saved = store_save(&loop, s, &w, make_state(4, 1, true));
    assert_int_equal(saved.err.code, 0);

    struct answer c = copy(&loop, s, saved.path, "copy-1:train:0", 0);
    if (c.err.code) fail_msg("%s", c.err.msg);
    assert_string_equal(c.path, "tinker://copy-1:train:0/weights/c1");
    assert_int_equal(c.row.expires_us, 0); /* not inherited */
    assert_int_equal(c.row.size_bytes, saved.row.size_bytes);
    assert_string_equal(c.metadata, "{\"k\":\"v\"}");
    struct answer again = copy(&loop, s, saved.path, "copy-1:train:0", 0);
    assert_int_equal(again.err.code, 0);
    assert_int_equal(again.row.time_us, c.row.time_us);

    struct stat st;
    struct tb_error err = {0};
    assert_int_equal(tb_store_ckpt_dir(s, c.path, dst, sizeof(dst), &err), 0);
    snprintf(src, sizeof(src), "%.500s/optimizer.safetensors", dst);
    assert_int_equal(stat(src, &st), 0);
    assert_int_equal(st.st_nlink, 2); /* no bytes were copied */

    /* the source changes and goes; the copy stays what it was, also after a restart */
    w.overwrite = true;
    assert_int_equal(store_save(&loop, s, &w, make_state(4, 2, true)).err.code, 0);
    remove_ckpt(&loop, s, saved.path);
    store_close(&loop, s);
    s = store_open(&loop, dir);
    struct answer got = store_load(&loop, s, c.path, true);
    if (got.err.code) fail_msg("%s", got.err.msg);
    struct tb_adapter_state *want = make_state(4, 1, true);
    assert_same_state(want, got.state, true);
    tb_adapter_state_destroy(want);
    tb_adapter_state_destroy(got.state);

    struct answer late = copy(&loop, s, c.path, "copy-2:train:0", 3600);
    assert_true(late.row.expires_us > tb_clock_wall_us());
    struct answer none = copy(&loop, s, saved.path, "copy-3:train:0", 0);
    assert_int_equal(none.err.code, TB_ENOTFOUND);
    assert_int_equal(copy(&loop, s, c.path, "../x", 0).err.code, TB_EINVAL);
    assert_int_equal(copy(&loop, s, "nonsense", "copy-3:train:0", 0).err.code, TB_EINVAL);
    store_close(&loop, s);
    assert_int_equal(uv_loop_close(&loop), 0);
    remove_dir(dir);
    tb_free(dir);
}

static void put(struct tb_store *s, const char *id, int64_t us, const char *name,
                const char *project, const char *metadata)
{
    struct tb_session_row r = {.tenant = TB_TENANT_DEFAULT,
                               .id = id,
                               .created_us = us,
                               .last_seen_us = us,
                               .display_name = name,
                               .project_id = project,
                               .user_metadata_json = metadata,
                               .status = "active"};
    tb_store_put_session(s, &r);
}

static void test_search(void **state)
{
    (void)state;
    uv_loop_t loop;
    uv_loop_init(&loop);
    char *dir = make_dir();
    struct tb_store *s = store_open(&loop, dir);
    put(s, "sess-a", 100, "Big Run one", NULL, "{\"k\":\"v\",\"n\":\"1\"}");
    put(s, "sess-b", 200, "run two", "p", "{\"k\":\"v\"}");
    put(s, "sess-c", 200, NULL, "p", NULL);
    put(s, "sess-d", 300, "other", "q", NULL);
    tb_store_end_session(s, "sess-d", "client_finished", "errored", "x");
    struct tb_ckpt_write w = {.tenant = TB_TENANT_DEFAULT,
                              .run_id = "sess-x:train:0",
                              .name = "c",
                              .kind = TB_CKPT_TRAINING};
    struct answer saved = store_save(&loop, s, &w, make_state(4, 1, false));
    assert_int_equal(copy(&loop, s, saved.path, "copy-1:train:0", 0).err.code, 0);

    struct tb_session_query q = {.limit = 2};
    struct found f = search(&loop, s, q);
    assert_string_equal(f.ids, "sess-d sess-c ");
    assert_true(f.more);
    q.before_us = f.last_us;
    q.before_id = f.last;
    struct found g = search(&loop, s, q);
    assert_string_equal(g.ids, "sess-b sess-a ");
    assert_false(g.more);
    assert_int_equal(g.ckpts, 1); /* the copy is sess-b's */
    assert_int_equal(g.bytes, saved.row.size_bytes);

    assert_string_equal(search(&loop, s, (struct tb_session_query){.display_name = "RUN"}).ids,
                        "sess-b sess-a ");
    q = (struct tb_session_query){.display_name = "one big"};
    assert_string_equal(search(&loop, s, q).ids, "sess-a ");
    q.session_id = "sess-d";
    assert_string_equal(search(&loop, s, q).ids, "sess-d sess-a ");
    q = (struct tb_session_query){.user_metadata_json = "{\"k\":\"v\"}"};
    assert_string_equal(search(&loop, s, q).ids, "sess-b sess-a ");
    q.user_metadata_json = "{\"k\":\"v\",\"n\":\"1\"}";
    assert_string_equal(search(&loop, s, q).ids, "sess-a ");
    const char *projects[] = {"q", "default"}, *status[] = {"client_finished:errored"};
    q = (struct tb_session_query){.project_ids = projects, .n_project_ids = 2};
    assert_string_equal(search(&loop, s, q).ids, "sess-d sess-a ");
    q = (struct tb_session_query){.statuses = status, .n_statuses = 1};
    assert_string_equal(search(&loop, s, q).ids, "sess-d ");
    status[0] = "active";
    assert_string_equal(search(&loop, s, q).ids, "sess-c sess-b sess-a ");
    status[0] = "client_finished:success";
    assert_int_equal(search(&loop, s, q).n, 0);
    store_close(&loop, s);
    assert_int_equal(uv_loop_close(&loop), 0);
    remove_dir(dir);
    tb_free(dir);
}

/* ---- tenants */

static struct answer get_as(uv_loop_t *loop, struct tb_store *s, const char *who, const char *path)
{
    struct answer a = {0};
    tb_store_get_ckpt(s, who, path, on_ckpt, &a);
    RUN_UNTIL(loop, a.done);
    return a;
}

static int publish_as(uv_loop_t *loop, struct tb_store *s, const char *who, const char *path,
                      bool is_public)
{
    struct answer a = {0};
    tb_store_publish_ckpt(s, who, path, is_public, on_done, &a);
    RUN_UNTIL(loop, a.done);
    return a.err.code;
}

static struct answer copy_as(uv_loop_t *loop, struct tb_store *s, const char *reader,
                             const char *who, const char *path, const char *run)
{
    struct answer a = {0};
    struct tb_ckpt_copy c = {.reader = reader, .path = path, .tenant = who, .run_id = run};
    tb_store_copy_ckpt(s, &c, on_ckpt, &a);
    RUN_UNTIL(loop, a.done);
    return a;
}

static void test_tenants(void **state)
{
    (void)state;
    uv_loop_t loop;
    uv_loop_init(&loop);
    char *dir = make_dir();
    struct tb_store *s = store_open(&loop, dir);
    const char *path = "tinker://sess-a:train:0/weights/c";
    struct tb_ckpt_write w = {
        .tenant = "us", .run_id = "sess-a:train:0", .name = "c", .kind = TB_CKPT_TRAINING};
    assert_int_equal(store_save(&loop, s, &w, make_state(4, 1, true)).err.code, 0);
    assert_int_equal(get_as(&loop, s, "us", path).err.code, 0);
    assert_int_equal(get_as(&loop, s, "them", path).err.code, TB_ENOTFOUND);
    assert_int_equal(copy_as(&loop, s, "them", "them", path, "b").err.code, TB_ENOTFOUND);
    assert_int_equal(publish_as(&loop, s, "them", path, true), TB_ENOTFOUND);
    struct answer a = {0};
    tb_store_delete_ckpt(s, "them", path, on_done, &a);
    RUN_UNTIL(&loop, a.done);
    assert_int_equal(a.err.code, TB_ENOTFOUND);

    /* with a token of the owner's */
    assert_int_equal(copy_as(&loop, s, "us", "them", path, "b").err.code, 0);
    assert_int_equal(get_as(&loop, s, "them", "tinker://b/weights/c").err.code, 0);
    assert_int_equal(get_as(&loop, s, "us", "tinker://b/weights/c").err.code, TB_ENOTFOUND);
    /* an id that meets another tenant's takes nothing from them */
    assert_int_equal(copy_as(&loop, s, "us", "us", path, "b").err.code, TB_EEXIST);
    assert_int_equal(get_as(&loop, s, "them", "tinker://b/weights/c").err.code, 0);
    /* published: read by all, changed by its owner */
    assert_int_equal(publish_as(&loop, s, "us", path, true), 0);
    assert_int_equal(get_as(&loop, s, "them", path).err.code, 0);
    assert_int_equal(publish_as(&loop, s, "them", path, false), TB_ENOTFOUND);
    assert_int_equal(publish_as(&loop, s, "us", path, false), 0);
    /* a lost database loses no owner */
    store_close(&loop, s);
    char *db = tb_asprintf("%s/tinkerbell.db", dir);
    assert_int_equal(remove(db), 0);
    tb_free(db);
    s = store_open(&loop, dir);
    assert_int_equal(get_as(&loop, s, "us", path).err.code, 0);
    assert_int_equal(get_as(&loop, s, "them", path).err.code, TB_ENOTFOUND);
    assert_int_equal(get_as(&loop, s, "them", "tinker://b/weights/c").err.code, 0);
    store_close(&loop, s);
    assert_int_equal(uv_loop_close(&loop), 0);
    remove_dir(dir);
    tb_free(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_copy),
        cmocka_unit_test(test_search),
        cmocka_unit_test(test_tenants),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
