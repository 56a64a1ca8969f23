/*
 * Who asks: API keys, the tenants that they belong to, and the tokens that SDKs exchange them for.
 *
 * Such a token has the form of a JWT, as the SDK reads its claims, and holds the key itself where a
 * signature would be. So it needs no secret and no table, is as good as the key for as long as the
 * server has that key, also after a restart, and gives away no more than the key in its header
 * does.
 *
 * Thread: the loop's.
 */
#include <stdio.h>
#include <string.h>

#include "api/internal.h"
#include "util/clock.h"
#include "util/mem.h"

enum { TOKEN_LIFE_S = 24 * 3600 };

struct tb_api_key {
    const char *key;
    struct tb_tenant *tenant;
};

/* ---- keys as the operator gives them */

int tb_api_key_split(const char *text, struct tb_span *key, struct tb_span *tenant,
                     struct tb_error *err)
{
    const char *eq = strrchr(text, '=');
    *key = eq ? (struct tb_span){text, (size_t)(eq - text)} : tb_span_str(text);
    *tenant = tb_span_str(eq ? eq + 1 : TB_TENANT_DEFAULT);
    if (!tb_span_starts(*key, "tml-") || key->n < 5 || key->n > TB_MAX_ID)
        return tb_error_set(err, TB_EINVAL,
                            "a key must begin with tml-, else the SDKs refuse to send it, and have "
                            "at most %d characters",
                            TB_MAX_ID);
    bool ok = tenant->n > 0 && tenant->n <= TB_MAX_TENANT;
    for (size_t i = 0; i < tenant->n && ok; i++) {
        char c = tenant->p[i];
        ok = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
             c == '.' || c == '_' || c == '-';
    }
    if (ok) return 0;
    return tb_error_set(
        err, TB_EINVAL,
        "behind the key's last = stands its tenant's name, 1 to %d letters, digits, "
        "'.', '_' or '-'",
        TB_MAX_TENANT);
}

int tb_api_keys_init(struct tb_api *a, const char *const *keys, int n, struct tb_error *err)
{
    a->keys = tb_arena_calloc(&a->strings, (size_t)n + 1, sizeof(*a->keys));
    for (int i = 0; i < n; i++) {
        struct tb_span key, name;
        int rc = tb_api_key_split(keys[i], &key, &name, err);
        if (rc) return rc;
        for (int k = 0; k < i; k++) {
            if (tb_span_eq(key, a->keys[k].key))
                return tb_error_set(err, TB_EINVAL, "an API key is given twice");
        }
        a->keys[i].key = tb_arena_strndup(&a->strings, key.p, key.n);
        a->keys[i].tenant = tb_core_tenant(a->core, tb_arena_strndup(&a->strings, name.p, name.n));
    }
    a->n_keys = n;
    if (n == 0) a->everyone = tb_core_tenant(a->core, TB_TENANT_DEFAULT);
    return 0;
}

/* ---- base64url, without padding */

static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

static const char *encode(struct tb_arena *a, const char *p, size_t n)
{
    char *out = tb_arena_alloc(a, n / 3 * 4 + 4), *to = out;
    for (size_t i = 0; i < n; i += 3) {
        unsigned char b[3] = {0};
        size_t k = TB_MIN(n - i, (size_t)3);
        memcpy(b, p + i, k);
        unsigned v = (unsigned)b[0] << 16 | (unsigned)b[1] << 8 | b[2];
        for (size_t c = 0; c <= k; c++)
            *to++ = digits[v >> (18 - 6 * c) & 63];
    }
    *to = '\0';
    return out;
}

/* False when it is not base64url. */
static bool decode(struct tb_arena *a, struct tb_span s, struct tb_span *out)
{
    char *to = tb_arena_alloc(a, s.n / 4 * 3 + 3);
    unsigned v = 0, bits = 0;
    *out = (struct tb_span){to, 0};
    for (size_t i = 0; i < s.n; i++) {
        const char *d = s.p[i] ? strchr(digits, s.p[i]) : NULL;
        if (!d) return false;
        v = v << 6 | (unsigned)(d - digits);
        bits += 6;
        if (bits < 8) continue;
        bits -= 8;
        to[out->n++] = (char)(v >> bits);
        v &= (1u << bits) - 1;
    }
    return true;
}

/* ---- requests */

static bool is_token(struct tb_span s)
{
    return tb_span_starts(s, "eyJ");
}

/* The key in a token; what is no token is the key itself. */
static struct tb_span key_of(struct tb_arena *a, struct tb_span given)
{
    const char *dot = is_token(given) ? memrchr(given.p, '.', given.n) : NULL;
    if (!dot) return given;
    struct tb_span last = {dot + 1, given.n - (size_t)(dot + 1 - given.p)}, key;
    return decode(a, last, &key) ? key : given;
}

/* Takes the time of what was given, wherever they differ. */
static bool same_key(struct tb_span given, const char *key)
{
    size_t n = strlen(key);
    unsigned diff = given.n != n;
    for (size_t i = 0; i < given.n; i++)
        diff |= (unsigned)((unsigned char)given.p[i] ^ (unsigned char)(n ? key[i % n] : 0));
    return diff == 0;
}

static const struct tb_api_key *find(const struct tb_api *a, struct tb_arena *arena,
                                     struct tb_span given)
{
    const struct tb_api_key *found = NULL;
    struct tb_span key = key_of(arena, given);
    for (int i = 0; i < a->n_keys; i++) {
        if (same_key(key, a->keys[i].key)) found = &a->keys[i];
    }
    return found;
}

struct tb_tenant *tb_api_key_tenant(const struct tb_api *a, struct tb_arena *arena,
                                    struct tb_span given)
{
    if (a->n_keys == 0) return a->everyone;
    const struct tb_api_key *k = find(a, arena, given);
    return k ? k->tenant : NULL;
}

/* X-API-Key, else Authorization: Bearer. */
static struct tb_span presented(const struct tb_http_request *req)
{
    struct tb_span given = tb_http_header_get(req, "X-API-Key");
    if (given.p) return given;
    given = tb_http_header_get(req, "Authorization");
    struct tb_span scheme = {given.p, TB_MIN(given.n, (size_t)7)};
    if (!tb_span_ieq(scheme, "Bearer ")) return (struct tb_span){NULL, 0};
    given.p += 7;
    given.n -= 7;
    while (given.n && *given.p == ' ') {
        given.p++;
        given.n--;
    }
    return given;
}

bool tb_api_authorize(const struct tb_api *a, struct tb_http_request *req)
{
    req->client = tb_api_key_tenant(a, &req->arena, presented(req));
    return req->client != NULL;
}

void tb_api_refuse_key(struct tb_http_request *req, const struct tb_face *face)
{
    struct tb_error e = {0};
    struct tb_http_field again = {"WWW-Authenticate", "Bearer error=\"invalid_token\""};
    struct tb_span given = presented(req);
    tb_error_set(&e, TB_EAUTH, "%s",
                 given.p ? "this API key is not accepted"
                         : "no API key: send X-API-Key, or Authorization: Bearer");
    if (face && face->error) {
        face->error(req, &e);
        return;
    }
    tb_api_error_with(req, &e, &again, is_token(given)); /* the SDK then exchanges its key anew */
}

const char *tb_api_token(struct tb_http_request *req)
{
    struct tb_arena *ar = &req->arena;
    struct tb_span key = key_of(ar, presented(req));
    const char *name = tb_api_tenant(req);
    long long now = (long long)(tb_clock_wall_us() / 1000000);
    static const char header[] = "{\"alg\":\"none\",\"typ\":\"JWT\"}";
    const char *claims = tb_arena_printf(
        ar, "{\"sub\":\"tml:user:%s\",\"org_id\":\"%s\",\"email\":\"\",\"iat\":%lld,\"exp\":%lld}",
        name, name, now, now + TOKEN_LIFE_S);
    return tb_arena_printf(ar, "%s.%s.%s", encode(ar, header, sizeof(header) - 1),
                           encode(ar, claims, strlen(claims)), encode(ar, key.p, key.n));
}

int tb_api_key_number(const struct tb_api *a, struct tb_http_request *req)
{
    const struct tb_api_key *k = find(a, &req->arena, presented(req));
    return k ? (int)(k - a->keys) : 0;
}
