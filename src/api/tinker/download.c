/*
 * Downloads of external weights: URLs with an unguessable token in the path, valid for an hour,
 * fetched without a key. A token names a checkpoint; which of its files a URL may fetch is fixed
 * here.
 *
 * Owner: the api object owns the tokens. Thread: the loop's.
 */
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/clock.h"
#include "util/mem.h"

enum {
    TOKEN_LEN = 40,
    LIFE_MS = 3600 * 1000,
    REUSE_MS = LIFE_MS / 2,
    MAX_DOWNLOADS = 4096 /* of a tenant */
};

static const char *const FILES[] = {"adapter_config.json", "adapter_model.safetensors"};
#define ARCHIVE "archive.tar"

struct tb_download {
    struct tb_list node; /* oldest first */
    uint64_t until_ms;
    int64_t until_us; /* the same moment on the wall */
    char token[TOKEN_LEN + 1];
    const struct tb_tenant *who;
    char *path; /* tinker://… */
};

static void drop(struct tb_api *a, struct tb_download *d)
{
    tb_map_del(&a->downloads, d->token, TOKEN_LEN);
    tb_list_del(&d->node);
    tb_free(d->path);
    tb_free(d);
}

static struct tb_download *oldest(struct tb_api *a)
{
    return tb_list_empty(&a->downloads_by_age)
               ? NULL
               : TB_LIST_ENTRY(a->downloads_by_age.next, struct tb_download, node);
}

void tb_tinker_downloads_fini(struct tb_api *a)
{
    struct tb_download *d;
    while ((d = oldest(a)))
        drop(a, d);
    tb_map_fini(&a->downloads);
}

/* A token of that path which lives long enough, else a new one; expired and surplus ones go. */
static struct tb_download *token_for(struct tb_api *a, const struct tb_tenant *who,
                                     const char *path)
{
    uint64_t now = tb_clock_ms();
    struct tb_download *d, *own = NULL; /* the oldest of who's */
    size_t n_own = 0;
    while ((d = oldest(a)) && d->until_ms <= now)
        drop(a, d);
    TB_LIST_FOREACH (it, &a->downloads_by_age) {
        d = TB_LIST_ENTRY(it, struct tb_download, node);
        if (d->who != who) continue;
        if (d->until_ms > now + REUSE_MS && strcmp(d->path, path) == 0) return d;
        if (n_own++ == 0) own = d;
    }
    if (n_own >= MAX_DOWNLOADS) drop(a, own);
    d = tb_calloc(1, sizeof(*d));
    d->who = who;
    d->until_ms = now + LIFE_MS;
    d->until_us = tb_clock_wall_us() + (int64_t)LIFE_MS * 1000;
    d->path = tb_strdup(path);
    tb_random_id(d->token, TOKEN_LEN);
    tb_list_push(&a->downloads_by_age, &d->node);
    tb_map_put(&a->downloads, d->token, TOKEN_LEN, d);
    return d;
}

static void on_ckpt(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    if (err->code) {
        tb_tinker_call_end(arg, err);
        return;
    }
    struct tb_api *a;
    struct tb_http_request *req = tb_tinker_call_request(arg, &a);
    struct tb_buf b;
    struct tb_json_out j;
    char expires[TB_TIME_TEXT], url[2048];
    const struct tb_download *d = token_for(a, tb_api_who(req), row->path);
    const char *base = tb_api_base_url(a, req);
    tb_clock_format(d->until_us, expires);
    tb_api_answer_begin(&b, &j);
    tb_jout_object(&j, "urls");
    for (size_t i = 0; i < TB_ARRAY_LEN(FILES); i++) {
        snprintf(url, sizeof(url), "%s/api/v1/downloads/%s/%s", base, d->token, FILES[i]);
        tb_jout_str(&j, FILES[i], url);
    }
    tb_jout_object_end(&j);
    tb_jout_str(&j, "expires", expires);
    tb_jout_object_end(&j);
    tb_tinker_call_end(arg, NULL);
    tb_api_answer(req, 200, &b);
}

void tb_tinker_external_urls(struct tb_api *a, struct tb_http_request *req,
                             const struct tb_route_match *m)
{
    const char *path =
        tb_tinker_route_path(req, m->params[0], TB_SPAN_LIT("external_weights"), m->params[1]);
    if (!path) return;
    tb_store_get_ckpt(tb_core_store(tb_api_core(a)), tb_api_tenant(req), path, on_ckpt,
                      tb_tinker_call(a, req));
}

static void on_archive_ckpt(void *arg, const struct tb_error *err, const struct tb_ckpt_row *row)
{
    if (err->code) {
        tb_tinker_call_end(arg, err);
        return;
    }
    struct tb_api *a;
    struct tb_http_request *req = tb_tinker_call_request(arg, &a);
    struct tb_buf b;
    struct tb_json_out j;
    char expires[TB_TIME_TEXT], date[TB_TIME_TEXT], url[2048];
    const struct tb_download *d = token_for(a, tb_api_who(req), row->path);
    snprintf(url, sizeof(url), "%s/api/v1/downloads/%s/" ARCHIVE, tb_api_base_url(a, req),
             d->token);
    tb_clock_format(d->until_us, expires);
    tb_clock_http_date(d->until_us, date);
    tb_api_answer_begin(&b, &j);
    tb_jout_str(&j, "url", url);
    tb_jout_str(&j, "expires", expires);
    tb_jout_object_end(&j);
    struct tb_http_field fields[] = {{"Location", url}, {"Expires", date}};
    tb_tinker_call_end(arg, NULL);
    size_t n;
    char *p = tb_buf_steal(&b, &n);
    tb_http_respond_owned(req, 302, "application/json", p, n, tb_free, p, fields, 2);
}

void tb_tinker_archive(struct tb_api *a, struct tb_http_request *req,
                       const struct tb_route_match *m)
{
    const char *path = tb_tinker_route_path(req, m->params[0], m->params[1], m->params[2]);
    if (!path) return;
    tb_store_get_ckpt(tb_core_store(tb_api_core(a)), tb_api_tenant(req), path, on_archive_ckpt,
                      tb_tinker_call(a, req));
}

void tb_tinker_download(struct tb_api *a, struct tb_http_request *req,
                        const struct tb_route_match *m)
{
    struct tb_error e = {0};
    char dir[4096];
    const struct tb_download *d = tb_map_get(&a->downloads, m->params[0].p, m->params[0].n);
    bool archive = tb_span_eq(m->params[1], ARCHIVE);
    const char *file = NULL;
    for (size_t i = 0; i < TB_ARRAY_LEN(FILES); i++)
        if (tb_span_eq(m->params[1], FILES[i])) file = FILES[i];
    if (!d || (!file && !archive) || d->until_ms <= tb_clock_ms()) {
        tb_error_set(&e, TB_ENOTFOUND, "this download does not exist or has expired");
        tb_api_error(req, &e);
        return;
    }
    if (tb_store_ckpt_dir(tb_core_store(tb_api_core(a)), d->path, dir, sizeof(dir), &e)) {
        tb_api_error(req, &e);
        return;
    }
    if (archive) {
        tb_tinker_send_archive(a, req, dir);
        return;
    }
    const char *path = tb_arena_printf(&req->arena, "%s/%s", dir, file);
    tb_http_respond_file(
        req, path, file == FILES[0] ? "application/json" : "application/octet-stream", NULL, 0);
}
