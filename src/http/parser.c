/*
 * The only file that knows llhttp. Its callbacks append to one run of text in the exchange's arena
 * (URL first, then names and values) and note offsets, since a token may span reads and the text
 * may move; when the headers are complete the offsets become the request's spans.
 *
 * llhttp is stopped (HPE_PAUSED) after the headers, after the last chunk and after the message.
 * That is how we know which bytes were header bytes: those are counted, and scanned for a line that
 * begins with a space or a tab, a folded line, which llhttp accepts and we must not (request
 * smuggling, CVE-2024-27982).
 *
 * Owner: the connection. Thread: the loop's.
 */
#include "http/parser.h"

#include <llhttp.h>
#include <stdio.h>
#include <string.h>

#include "http/internal.h"

enum {
    TEXT_FIRST = 1024,
    HEADERS_FIRST = 24,
    BODY_IN_ARENA = 1024,
    BODY_FIRST = 64 * 1024,
    CHUNKED_FIRST = 4 * 1024,
    MAX_CHUNK_EXTENSIONS = 16 * 1024,
};

enum stage { STAGE_HEADERS, STAGE_BODY, STAGE_TRAILERS };
enum event { EVENT_NONE, EVENT_HEADERS, EVENT_LAST_CHUNK, EVENT_DONE };

struct field {
    uint32_t name, name_n, value, value_n; /* offsets and lengths in the text */
};

struct tb_http_parser {
    llhttp_t ll;
    struct tb_http_exchange *x;
    size_t max_body;
    char *text;
    size_t text_n, text_cap, url_n;
    struct field *fields;
    size_t n_fields, fields_cap;
    size_t header_bytes, extension_bytes;
    enum stage stage;
    enum event event;
    bool after_lf; /* the last header byte was a line feed */
    bool resumed;  /* llhttp may have something to say without a further byte */
    int status;
    const char *error;
    char too_big[128]; /* text of the error of a body */
};

static int refuse(struct tb_http_parser *p, int status, const char *text)
{
    if (!p->status) {
        p->status = status;
        p->error = text;
    }
    return -1;
}

/* `so_far`: n bytes have arrived or are announced, and more may come. */
static int refuse_body(struct tb_http_parser *p, uint64_t n, bool so_far)
{
    snprintf(p->too_big, sizeof(p->too_big),
             "request body of %s%llu bytes is too large: the limit is %zu",
             so_far ? "at least " : "", (unsigned long long)n, p->max_body);
    return refuse(p, 413, p->too_big);
}

static int text_append(struct tb_http_parser *p, const char *at, size_t n)
{
    struct tb_arena *arena = &p->x->req.arena;
    if (p->text_n + n > p->text_cap) {
        size_t cap = p->text_cap ? p->text_cap * 2 : TEXT_FIRST;
        while (cap < p->text_n + n)
            cap *= 2; /* bounded by TB_MAX_HEADER_BYTES and the read size */
        char *text = tb_arena_try_alloc(arena, cap);
        if (!text) return refuse(p, 503, "out of memory");
        if (p->text_n) memcpy(text, p->text, p->text_n);
        p->text = text;
        p->text_cap = cap;
    }
    if (n) memcpy(p->text + p->text_n, at, n);
    p->text_n += n;
    return 0;
}

static int on_url(llhttp_t *ll, const char *at, size_t n)
{
    struct tb_http_parser *p = ll->data;
    p->url_n += n;
    if (p->url_n > TB_MAX_URL) return refuse(p, 414, "request target is too long");
    return text_append(p, at, n);
}

static int on_field(llhttp_t *ll, const char *at, size_t n)
{
    struct tb_http_parser *p = ll->data;
    if (p->stage == STAGE_TRAILERS) return 0;
    /* A field is open from its first name byte to on_value_complete. */
    if (p->n_fields == p->fields_cap) {
        if (p->n_fields >= TB_MAX_HEADERS) return refuse(p, 431, "too many headers");
        size_t cap = p->fields_cap ? TB_MAX_HEADERS : HEADERS_FIRST;
        struct field *f = tb_arena_try_array(&p->x->req.arena, cap, sizeof(*f));
        if (!f) return refuse(p, 503, "out of memory");
        if (p->n_fields) memcpy(f, p->fields, p->n_fields * sizeof(*f));
        memset(f + p->n_fields, 0, (cap - p->n_fields) * sizeof(*f));
        p->fields = f;
        p->fields_cap = cap;
    }
    struct field *f = &p->fields[p->n_fields];
    if (f->name_n == 0) f->name = (uint32_t)p->text_n;
    f->name_n += (uint32_t)n;
    return text_append(p, at, n);
}

static bool field_open(const struct tb_http_parser *p)
{
    return p->n_fields < p->fields_cap && p->fields[p->n_fields].name_n > 0;
}

static int on_value(llhttp_t *ll, const char *at, size_t n)
{
    struct tb_http_parser *p = ll->data;
    if (p->stage == STAGE_TRAILERS) return 0;
    /* llhttp 8 accepts a line without a name, and then there was no on_field. */
    if (!field_open(p)) return refuse(p, 400, "malformed header");
    struct field *f = &p->fields[p->n_fields];
    if (f->value_n == 0) f->value = (uint32_t)p->text_n;
    f->value_n += (uint32_t)n;
    return text_append(p, at, n);
}

static int on_value_complete(llhttp_t *ll)
{
    struct tb_http_parser *p = ll->data;
    if (p->stage == STAGE_TRAILERS) return 0;
    if (!field_open(p)) return refuse(p, 400, "malformed header");
    p->n_fields++;
    return 0;
}

static int on_headers_complete(llhttp_t *ll)
{
    struct tb_http_parser *p = ll->data;
    /* We speak no other protocol: an offer to switch is ignored, as a server may. CONNECT is
     * refused when the event is handled. */
    ll->upgrade = 0;
    p->event = EVENT_HEADERS;
    return HPE_PAUSED;
}

static int on_chunk_header(llhttp_t *ll)
{
    struct tb_http_parser *p = ll->data;
    uint64_t n;
    if (__builtin_add_overflow(ll->content_length, p->x->req.body.n, &n)) n = UINT64_MAX;
    if (n > p->max_body) return refuse_body(p, n, true);
    if (ll->content_length > 0) return 0;
    p->event = EVENT_LAST_CHUNK;
    return HPE_PAUSED;
}

static int on_chunk_extension(llhttp_t *ll, const char *at, size_t n)
{
    struct tb_http_parser *p = ll->data;
    p->extension_bytes += n;
    if (p->extension_bytes > MAX_CHUNK_EXTENSIONS) {
        return refuse(p, 413, "chunk extensions are too long");
    }
    return 0;
}

/* The body is one run of memory. It grows by doubling what has arrived, up to the announced length,
 * so that an announcement alone costs nothing. */
static int on_body(llhttp_t *ll, const char *at, size_t n)
{
    struct tb_http_parser *p = ll->data;
    struct tb_http_exchange *x = p->x;
    size_t have = x->req.body.n, want;
    if (!tb_add_size(have, n, &want)) want = SIZE_MAX;
    if (want > p->max_body) return refuse_body(p, want, true);
    if (want > x->body_cap) {
        /* content_length is what is left of the body, or of this chunk. */
        bool chunked = ll->flags & F_CHUNKED;
        size_t total = chunked ? p->max_body : want + (size_t)ll->content_length;
        size_t cap = TB_MAX(want * 2, (size_t)(chunked ? CHUNKED_FIRST : BODY_FIRST));
        cap = TB_MAX(TB_MIN(cap, total), want);
        char *mem = NULL;
        if (have == 0 && cap <= BODY_IN_ARENA) {
            mem = tb_arena_try_alloc(&x->req.arena, cap);
        } else {
            /* A body that began in the arena moves out of it. */
            mem = tb_try_realloc(x->body_mem, cap);
            if (mem && have && !x->body_mem) memcpy(mem, x->req.body.p, have);
            if (mem) x->body_mem = mem;
        }
        if (!mem) return refuse(p, 503, "out of memory for the request body");
        x->body_cap = cap;
        x->req.body.p = mem;
    }
    memcpy((char *)(uintptr_t)x->req.body.p + have, at, n);
    x->req.body.n = want;
    return 0;
}

static int on_message_complete(llhttp_t *ll)
{
    struct tb_http_parser *p = ll->data;
    p->event = EVENT_DONE;
    return HPE_PAUSED;
}

static const llhttp_settings_t settings = {
    .on_url = on_url,
    .on_header_field = on_field,
    .on_header_value = on_value,
    .on_header_value_complete = on_value_complete,
    .on_headers_complete = on_headers_complete,
    .on_chunk_extension_name = on_chunk_extension,
    .on_chunk_extension_value = on_chunk_extension,
    .on_chunk_header = on_chunk_header,
    .on_body = on_body,
    .on_message_complete = on_message_complete,
};

struct tb_http_parser *tb_http_parser_create(size_t max_body)
{
    struct tb_http_parser *p = tb_calloc(1, sizeof(*p));
    p->max_body = max_body;
    return p;
}

void tb_http_parser_destroy(struct tb_http_parser *p)
{
    tb_free(p);
}

void tb_http_parser_begin(struct tb_http_parser *p, struct tb_http_exchange *x)
{
    size_t max_body = p->max_body;
    memset(p, 0, sizeof(*p));
    p->max_body = max_body;
    llhttp_init(&p->ll, HTTP_REQUEST, &settings);
    p->ll.data = p;
    p->x = x;
}

bool tb_http_parser_in_body(const struct tb_http_parser *p)
{
    return p->stage != STAGE_HEADERS;
}

int tb_http_parser_error(const struct tb_http_parser *p, const char **text)
{
    *text = p->error;
    return p->status;
}

static enum tb_http_method method_of(unsigned m)
{
    switch (m) {
    case HTTP_GET: return TB_HTTP_GET;
    case HTTP_HEAD: return TB_HTTP_HEAD;
    case HTTP_POST: return TB_HTTP_POST;
    case HTTP_PUT: return TB_HTTP_PUT;
    case HTTP_DELETE: return TB_HTTP_DELETE;
    case HTTP_PATCH: return TB_HTTP_PATCH;
    case HTTP_OPTIONS: return TB_HTTP_OPTIONS;
    default: return TB_HTTP_OTHER;
    }
}

static void spans_set(struct tb_http_parser *p)
{
    struct tb_http_request *req = &p->x->req;
    req->n_headers = p->n_fields;
    req->headers =
        tb_arena_alloc(&req->arena, TB_MAX(p->n_fields, (size_t)1) * sizeof(*req->headers));
    for (size_t i = 0; i < p->n_fields; i++) {
        const struct field *f = &p->fields[i];
        const char *value = p->text + f->value;
        size_t n = f->value_n;
        while (n > 0 && (value[n - 1] == ' ' || value[n - 1] == '\t'))
            n--;
        req->headers[i].name = (struct tb_span){p->text + f->name, f->name_n};
        req->headers[i].value = (struct tb_span){n ? value : "", n};
    }
}

/* A host is what a URL may hold there; anything else is a trick on whoever builds URLs from it. */
static bool host_ok(struct tb_span v)
{
    for (size_t i = 0; i < v.n; i++) {
        unsigned char c = (unsigned char)v.p[i];
        bool alnum = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        if (!alnum && !(c && strchr(".-_:[]%~!$&'()*+,;=", c))) return false;
    }
    return true;
}

/* Checks on the complete headers that llhttp leaves to us. */
static int headers_check(struct tb_http_parser *p, bool *expect)
{
    struct tb_http_exchange *x = p->x;
    struct tb_http_request *req = &x->req;
    unsigned version = p->ll.http_major * 10u + p->ll.http_minor, n_host = 0, n_te = 0;
    if (version != 10 && version != 11) return refuse(p, 505, "HTTP version is not supported");
    x->http10 = version == 10;
    x->head = p->ll.method == HTTP_HEAD;
    req->method = method_of(p->ll.method);
    req->keep_alive = llhttp_should_keep_alive(&p->ll) != 0;
    req->received_ms = tb_clock_ms();
    if (p->ll.method == HTTP_CONNECT) return refuse(p, 501, "CONNECT is not supported");
    spans_set(p);
    *expect = false;
    for (size_t i = 0; i < req->n_headers; i++) {
        struct tb_span name = req->headers[i].name, value = req->headers[i].value;
        switch (name.n) {
        case 4:
            if (!tb_span_ieq(name, "host")) break;
            if (++n_host > 1) return refuse(p, 400, "more than one Host header");
            if (!host_ok(value)) return refuse(p, 400, "invalid Host header");
            break;
        case 6:
            if (!tb_span_ieq(name, "expect") || x->http10) break;
            if (!tb_span_ieq(value, "100-continue")) {
                return refuse(p, 417, "expectation cannot be met");
            }
            *expect = true;
            break;
        case 17:
            if (!tb_span_ieq(name, "transfer-encoding")) break;
            if (x->http10) return refuse(p, 400, "Transfer-Encoding in an HTTP/1.0 request");
            if (++n_te > 1) return refuse(p, 400, "more than one Transfer-Encoding header");
            if (!tb_span_ieq(value, "chunked")) {
                return refuse(p, 501, "transfer coding is not supported");
            }
            break;
        default: break;
        }
    }
    if (n_host == 0 && !x->http10) return refuse(p, 400, "Host header is missing");
    const char *why = tb_http_target_set(req, p->text, p->url_n);
    if (why) return refuse(p, 400, why);
    bool chunked = p->ll.flags & F_CHUNKED;
    if (!chunked && p->ll.content_length > p->max_body)
        return refuse_body(p, p->ll.content_length, false);
    *expect = *expect && (chunked || p->ll.content_length > 0);
    return 0;
}

/* Header bytes: counts them and looks for folded lines. */
static int headers_scan(struct tb_http_parser *p, const char *data, size_t n)
{
    p->header_bytes += n;
    if (p->header_bytes > TB_MAX_HEADER_BYTES) return refuse(p, 431, "headers are too large");
    if (n == 0) return 0;
    const char *end = data + n;
    if (p->after_lf && (*data == ' ' || *data == '\t')) return refuse(p, 400, "folded header line");
    for (const char *lf = data; (lf = memchr(lf, '\n', (size_t)(end - lf))) && ++lf < end;) {
        if (*lf == ' ' || *lf == '\t') return refuse(p, 400, "folded header line");
    }
    p->after_lf = end[-1] == '\n';
    return 0;
}

static enum tb_http_parse fail(struct tb_http_parser *p, llhttp_errno_t rc)
{
    if (p->status) return TB_HTTP_PARSE_ERROR;
    const char *why = llhttp_get_error_reason(&p->ll);
    switch (rc) {
    case HPE_INVALID_VERSION:
        if (why && strcmp(why, "Invalid HTTP version") == 0) {
            refuse(p, 505, "HTTP version is not supported");
        } else {
            refuse(p, 400, "malformed HTTP version");
        }
        break;
    case HPE_PAUSED_H2_UPGRADE: refuse(p, 505, "HTTP version is not supported"); break;
    case HPE_INVALID_METHOD: refuse(p, 400, "unknown method"); break;
    case HPE_INVALID_URL: refuse(p, 400, "malformed request target"); break;
    case HPE_INVALID_CONTENT_LENGTH:
    case HPE_UNEXPECTED_CONTENT_LENGTH: refuse(p, 400, "invalid Content-Length"); break;
    case HPE_INVALID_TRANSFER_ENCODING: refuse(p, 400, "invalid Transfer-Encoding"); break;
    case HPE_INVALID_CHUNK_SIZE: refuse(p, 400, "invalid chunk size"); break;
    case HPE_INVALID_HEADER_TOKEN: refuse(p, 400, "malformed header"); break;
    default: refuse(p, 400, "malformed HTTP request"); break;
    }
    return TB_HTTP_PARSE_ERROR;
}

enum tb_http_parse tb_http_parser_feed(struct tb_http_parser *p, const char *data, size_t n,
                                       size_t *used)
{
    *used = 0;
    while (*used < n || p->resumed) {
        const char *at = data + *used;
        size_t take = n - *used;
        bool header = p->stage != STAGE_BODY;
        /* Never more than one byte beyond the limit, so that the limit holds for every split. */
        if (header) take = TB_MIN(take, TB_MAX_HEADER_BYTES + 1 - p->header_bytes);
        p->resumed = false;
        llhttp_errno_t rc = llhttp_execute(&p->ll, at, take);
        size_t done = rc == HPE_OK ? take : (size_t)(llhttp_get_error_pos(&p->ll) - at);
        if (rc != HPE_OK && rc != HPE_PAUSED) {
            /* What is wrong first is said, however the bytes were split. */
            int status = p->status;
            p->status = 0;
            if (header && headers_scan(p, at, TB_MIN(done, take))) return TB_HTTP_PARSE_ERROR;
            p->status = status;
            return fail(p, rc);
        }
        TB_BUG_ON(done > take);
        *used += done;
        if (header && headers_scan(p, at, done)) return TB_HTTP_PARSE_ERROR;
        if (rc == HPE_OK) continue;

        llhttp_resume(&p->ll);
        p->resumed = true;
        enum event event = p->event;
        p->event = EVENT_NONE;
        bool expect;
        switch (event) {
        case EVENT_HEADERS:
            if (headers_check(p, &expect)) return TB_HTTP_PARSE_ERROR;
            p->stage = STAGE_BODY;
            /* A client that already sends its body does not wait. */
            if (expect && *used == n) return TB_HTTP_PARSE_CONTINUE;
            break;
        case EVENT_LAST_CHUNK:
            p->stage = STAGE_TRAILERS;
            p->after_lf = true;
            break;
        case EVENT_DONE: p->resumed = false; return TB_HTTP_PARSE_DONE;
        case EVENT_NONE: return fail(p, HPE_INTERNAL);
        }
    }
    return TB_HTTP_PARSE_MORE;
}
