/*
 * Reads tokenizer.json into a table from token id to bytes. Two kinds of BPE are served: byte-level
 * (each byte is spelt as one printable character, the "byte map") and SentencePiece-style with byte
 * fallback ("▁" for a space, "<0x0A>" for a byte). Everything else is refused by name.
 *
 * The tokenizer owns its table and one pool of bytes. Thread: any, after creation.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tokenizer/internal.h"
#include "util/mem.h"

#define MAX_FILE   (256u << 20)
#define NOT_MAPPED 0xFFFF

/* Bytes 33-126, 161-172 and 174-255 are their own character; the other 68 follow from U+0100. */
static void init_byte_map(uint16_t map[TB_BYTE_MAP_MAX])
{
    unsigned next = 256;
    for (unsigned i = 0; i < TB_BYTE_MAP_MAX; i++)
        map[i] = NOT_MAPPED;
    for (unsigned b = 0; b < 256; b++) {
        bool plain = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        map[plain ? b : next++] = (uint16_t)b;
    }
}

/* Room for n more bytes in the pool; NULL when memory is out or the pool would pass 4 GiB. */
static char *pool_room(struct tb_tokenizer *t, size_t n)
{
    size_t need;
    if (!tb_add_size(t->pool_n, n, &need) || need > UINT32_MAX) return NULL;
    if (need > t->pool_cap || !t->pool) {
        size_t cap = TB_MAX(TB_MAX(need, t->pool_cap * 2), (size_t)4096);
        char *p = tb_try_realloc(t->pool, cap);
        if (!p) return NULL;
        t->pool = p;
        t->pool_cap = cap;
    }
    return t->pool + t->pool_n;
}

/* s holds valid UTF-8: jansson checked it. */
bool tb_tokenizer_unmap(const struct tb_tokenizer *t, const char *s, size_t n, char *out,
                        size_t *n_out)
{
    const unsigned char *u = (const unsigned char *)s;
    size_t k = 0;
    for (size_t i = 0; i < n;) {
        unsigned c;
        if (u[i] < 0x80) {
            c = u[i++];
        } else if ((u[i] & 0xE0) == 0xC0 && i + 1 < n) {
            c = (u[i] & 0x1Fu) << 6 | (u[i + 1] & 0x3Fu);
            i += 2;
        } else {
            return false;
        }
        if (c >= TB_BYTE_MAP_MAX || t->map[c] == NOT_MAPPED) return false;
        out[k++] = (char)t->map[c];
    }
    *n_out = k;
    return true;
}

static int hex(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return -1;
}

/* What a token decodes to; out has room for n bytes. */
static size_t decoded(const struct tb_tokenizer *t, const char *s, size_t n, char *out,
                      unsigned *flags)
{
    size_t k = 0;
    if (t->byte_level) {
        if (!tb_tokenizer_unmap(t, s, n, out, &k)) memcpy(out, s, k = n);
        return k;
    }
    if (n == 6 && memcmp(s, "<0x", 3) == 0 && s[5] == '>' && hex(s[3]) >= 0 && hex(s[4]) >= 0) {
        out[0] = (char)(hex(s[3]) * 16 + hex(s[4]));
        *flags |= TB_TOKEN_BYTE;
        return 1;
    }
    for (size_t i = 0; i < n;) {
        if (t->marks && n - i >= strlen(TB_MARK) && memcmp(s + i, TB_MARK, strlen(TB_MARK)) == 0) {
            out[k++] = ' ';
            i += strlen(TB_MARK);
        } else {
            out[k++] = s[i++];
        }
    }
    return k;
}

static int put_token(struct tb_tokenizer *t, int32_t id, const char *s, size_t n, unsigned flags)
{
    struct tb_token *tok = &t->tokens[id];
    char *p = pool_room(t, n);
    if (!p) return TB_ENOMEM;
    flags |= TB_TOKEN_USED;
    size_t k = decoded(t, s, n, p, &flags);
    *tok = (struct tb_token){(uint32_t)t->pool_n, (uint32_t)k, (uint8_t)flags};
    t->pool_n += k;
    return 0;
}

static int put_added(struct tb_tokenizer *t, int32_t i, int32_t id, const char *s, size_t n)
{
    char *p = pool_room(t, n);
    if (!p) return TB_ENOMEM;
    memcpy(p, s, n);
    t->added[i] = (struct tb_added){id, (uint32_t)t->pool_n, (uint32_t)n};
    t->pool_n += n;
    return 0;
}

/* True if a pre-tokenizer, or a member of its sequence, is of this type. */
static bool has_type(const json_t *o, const char *type)
{
    const char *own = json_string_value(json_object_get(o, "type"));
    if (own && strcmp(own, type) == 0) return true;
    const json_t *list = json_object_get(o, "pretokenizers");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *s = json_string_value(json_object_get(json_array_get(list, i), "type"));
        if (s && strcmp(s, type) == 0) return true;
    }
    return false;
}

/* Sets how tokens are spelt, or refuses the file. */
static int check_kind(struct tb_tokenizer *t, const char *name, const json_t *root,
                      const json_t *model, struct tb_error *e)
{
    const json_t *type = json_object_get(model, "type");
    if (type && !json_is_string(type))
        return tb_error_set(e, TB_ECORRUPT, "%s: model.type is not a string", name);
    if (type ? strcmp(json_string_value(type), "BPE") != 0 : !json_object_get(model, "merges"))
        return tb_error_set(e, TB_EUNSUPPORTED, "%s: model.type is %.64s; only BPE is served", name,
                            type ? json_string_value(type) : "missing");
    t->byte_level = has_type(json_object_get(root, "pre_tokenizer"), "ByteLevel");
    return tb_decoder_load(t, name, json_object_get(root, "decoder"), e);
}

static int check_id(const char *name, const char *where, const json_t *v, int32_t *highest,
                    struct tb_error *e)
{
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > TB_MAX_TOKEN_ID)
        return tb_error_set(e, TB_ECORRUPT, "%s: %s is not a token id (0 to %d)", name, where,
                            TB_MAX_TOKEN_ID);
    if (json_integer_value(v) > *highest) *highest = (int32_t)json_integer_value(v);
    return 0;
}

/* First pass: types, ids, and the highest id in t->n - 1. */
static int check_tokens(struct tb_tokenizer *t, const char *name, json_t *vocab,
                        const json_t *added, struct tb_error *e)
{
    int32_t highest = -1;
    const char *key;
    json_t *v;
    char where[128];
    json_object_foreach(vocab, key, v)
    {
        snprintf(where, sizeof(where), "model.vocab[\"%.64s\"]", key);
        int rc = check_id(name, where, v, &highest, e);
        if (rc) return rc;
    }
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *a = json_array_get(added, i), *special = json_object_get(a, "special");
        snprintf(where, sizeof(where), "added_tokens[%zu].id", i);
        int rc = check_id(name, where, json_object_get(a, "id"), &highest, e);
        if (rc) return rc;
        if (!json_is_string(json_object_get(a, "content")))
            return tb_error_set(e, TB_ECORRUPT, "%s: added_tokens[%zu].content is not a string",
                                name, i);
        if (special && !json_is_boolean(special))
            return tb_error_set(e, TB_ECORRUPT, "%s: added_tokens[%zu].special is not a boolean",
                                name, i);
    }
    if (highest < 0) return tb_error_set(e, TB_ECORRUPT, "%s: model.vocab is empty", name);
    t->n = highest + 1;
    t->n_added = (int32_t)json_array_size(added);
    return 0;
}

static int load_tokens(struct tb_tokenizer *t, const char *name, json_t *vocab, const json_t *added,
                       struct tb_error *e)
{
    const char *key;
    json_t *v;
    int rc = check_tokens(t, name, vocab, added, e);
    if (rc) return rc;
    t->tokens = tb_try_calloc((size_t)t->n, sizeof(*t->tokens));
    t->added = tb_try_calloc((size_t)t->n_added + 1, sizeof(*t->added));
    if (!t->tokens || !t->added) goto nomem;
    json_object_foreach(vocab, key, v)
    {
        int32_t id = (int32_t)json_integer_value(v);
        if (t->tokens[id].flags)
            return tb_error_set(e, TB_ECORRUPT, "%s: model.vocab has two tokens with id %d", name,
                                id);
        if (put_token(t, id, key, strlen(key), 0)) goto nomem;
    }
    for (int32_t i = 0; i < t->n_added; i++) {
        const json_t *a = json_array_get(added, (size_t)i), *c = json_object_get(a, "content");
        int32_t id = (int32_t)json_integer_value(json_object_get(a, "id"));
        unsigned special = json_is_true(json_object_get(a, "special")) ? TB_TOKEN_SPECIAL : 0;
        if (t->tokens[id].flags & TB_TOKEN_ADDED)
            return tb_error_set(e, TB_ECORRUPT, "%s: added_tokens has two tokens with id %d", name,
                                id);
        const char *text = json_string_value(c);
        size_t n = json_string_length(c);
        if (put_added(t, i, id, text, n) || put_token(t, id, text, n, TB_TOKEN_ADDED | special))
            goto nomem;
    }
    return 0;
nomem:
    return tb_error_set(e, TB_ENOMEM, "%s: out of memory for %d tokens", name, t->n);
}

static json_t *parse(const char *name, struct tb_span text, struct tb_error *e)
{
    json_error_t je;
    json_t *root = json_loadb(text.p, text.n, JSON_ALLOW_NUL | JSON_REJECT_DUPLICATES, &je);
    if (!root)
        tb_error_set(e, TB_ECORRUPT, "%s: not JSON: %s (line %d, column %d)", name, je.text,
                     je.line, je.column);
    return root;
}

/* A file whose text steps are not served can still decode; the reason is kept for who wants to
 * encode. */
static int load_encoder(struct tb_tokenizer *t, const char *name, json_t *root, const json_t *model,
                        struct tb_error *e)
{
    struct tb_error why = {0};
    int rc = tb_encoder_create(t, name, root, &t->encoder, &why);
    if (!rc) rc = tb_bpe_create(t, name, model, &t->bpe, &why);
    if (rc == TB_EUNSUPPORTED) {
        t->no_encode = tb_strdup(why.msg);
        return 0;
    }
    return rc ? tb_error_set(e, rc, "%s", why.msg) : 0;
}

int tb_tokenizer_create_from_json(const char *name, struct tb_span json, struct tb_tokenizer **out,
                                  struct tb_error *e)
{
    *out = NULL;
    json_t *root = parse(name, json, e);
    if (!root) return TB_ECORRUPT;
    struct tb_tokenizer *t = tb_calloc(1, sizeof(*t));
    const json_t *model = json_object_get(root, "model"),
                 *added = json_object_get(root, "added_tokens");
    json_t *vocab = json_object_get(model, "vocab");
    int rc;
    t->eos = -1;
    init_byte_map(t->map);
    if (!json_is_object(model)) {
        rc = tb_error_set(e, TB_ECORRUPT, "%s: model is not an object", name);
        goto out;
    }
    if ((rc = check_kind(t, name, root, model, e))) goto out;
    if (!json_is_object(vocab)) {
        rc = tb_error_set(e, TB_ECORRUPT, "%s: model.vocab is not an object", name);
        goto out;
    }
    if (added && !json_is_null(added) && !json_is_array(added)) {
        rc = tb_error_set(e, TB_ECORRUPT, "%s: added_tokens is not an array", name);
        goto out;
    }
    if ((rc = load_tokens(t, name, vocab, added, e))) goto out;
    if ((rc = load_encoder(t, name, root, model, e))) goto out;
    *out = t;
    t = NULL;
out:
    json_decref(root);
    tb_tokenizer_destroy(t);
    return rc;
}

/* The file's bytes in *out (tb_free). TB_ENOTFOUND if there is no such file. */
static int read_file(const char *path, struct tb_buf *out, struct tb_error *e)
{
    int rc = 0;
    size_t got;
    FILE *f = fopen(path, "rbe");
    if (!f)
        return tb_error_set(e, errno == ENOENT || errno == ENOTDIR ? TB_ENOTFOUND : TB_EIO,
                            "%s: %s", path, strerror(errno));
    tb_buf_init(out, MAX_FILE);
    do {
        if (tb_buf_reserve(out, 1 << 16)) {
            rc = tb_error_set(e, TB_ECORRUPT, "%s: larger than %u bytes", path, MAX_FILE);
            break;
        }
        got = fread(out->p + out->n, 1, 1 << 16, f);
        out->n += got;
    } while (got > 0);
    if (!rc && ferror(f)) rc = tb_error_set(e, TB_EIO, "%s: %s", path, strerror(errno));
    fclose(f);
    if (rc) tb_buf_fini(out);
    return rc;
}

/* eos_token is a string or an added token's object; a name that is no token is ignored, as by
 * others. */
static int read_eos(struct tb_tokenizer *t, const char *path, struct tb_error *e)
{
    struct tb_buf text;
    int rc = read_file(path, &text, e);
    if (rc == TB_ENOTFOUND) return 0;
    if (rc) return rc;
    json_t *root = parse(path, (struct tb_span){text.p, text.n}, e);
    tb_buf_fini(&text);
    if (!root) return TB_ECORRUPT;
    const json_t *eos = json_object_get(root, "eos_token");
    if (json_is_object(eos)) eos = json_object_get(eos, "content");
    if (json_is_string(eos)) {
        struct tb_span want = {json_string_value(eos), json_string_length(eos)};
        t->eos = tb_tokenizer_added_id(t, want);
        for (int32_t id = 0; id < t->n && t->eos < 0; id++) {
            struct tb_span s;
            if (tb_tokenizer_token_bytes(t, id, &s) == 0 && s.n == want.n &&
                memcmp(s.p, want.p, s.n) == 0)
                t->eos = id;
        }
    }
    json_decref(root);
    return 0;
}

/* A folder with another kind of tokenizer: names the file and what makes a tokenizer.json of it. */
static int refuse_others(const char *dir, struct tb_error *e)
{
    static const char *const others[] = {"tokenizer.model", "tiktoken.model", "vocab.json"};
    for (size_t i = 0; i < TB_ARRAY_LEN(others); i++) {
        char *path = tb_asprintf("%s/%s", dir, others[i]);
        bool there = access(path, F_OK) == 0;
        if (there)
            tb_error_set(e, TB_EUNSUPPORTED,
                         "%s is not read; make a tokenizer.json of it, with transformers' "
                         "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
                         path);
        tb_free(path);
        if (there) return TB_EUNSUPPORTED;
    }
    return TB_ENOTFOUND;
}

int tb_tokenizer_create(const char *dir, struct tb_tokenizer **out, struct tb_error *e)
{
    struct tb_buf text;
    char *path = tb_asprintf("%s/tokenizer.json", dir);
    char *config = tb_asprintf("%s/tokenizer_config.json", dir);
    *out = NULL;
    int rc = read_file(path, &text, e);
    if (rc == TB_ENOTFOUND) rc = refuse_others(dir, e);
    if (rc) goto out;
    rc = tb_tokenizer_create_from_json(path, (struct tb_span){text.p, text.n}, out, e);
    tb_buf_fini(&text);
    if (rc) goto out;
    if ((rc = read_eos(*out, config, e))) {
        tb_tokenizer_destroy(*out);
        *out = NULL;
    }
out:
    tb_free(path);
    tb_free(config);
    return rc;
}

void tb_tokenizer_destroy(struct tb_tokenizer *t)
{
    if (!t) return;
    tb_free(t->tokens);
    tb_free(t->added);
    tb_free(t->pool);
    tb_free(t->no_encode);
    tb_bpe_destroy(t->bpe);
    tb_encoder_destroy(t->encoder);
    tb_free(t);
}

int32_t tb_tokenizer_vocab_size(const struct tb_tokenizer *t)
{
    return t->n;
}

int tb_tokenizer_token_bytes(const struct tb_tokenizer *t, int32_t id, struct tb_span *out)
{
    *out = (struct tb_span){"", 0};
    if (id < 0 || id >= t->n || !t->tokens[id].flags) return TB_ENOTFOUND;
    *out = (struct tb_span){t->pool + t->tokens[id].at, t->tokens[id].n};
    return 0;
}

bool tb_tokenizer_is_special(const struct tb_tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n && (t->tokens[id].flags & TB_TOKEN_SPECIAL);
}

bool tb_tokenizer_is_byte(const struct tb_tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n && (t->tokens[id].flags & TB_TOKEN_BYTE);
}

int32_t tb_tokenizer_added_id(const struct tb_tokenizer *t, struct tb_span content)
{
    for (int32_t i = 0; i < t->n_added; i++) {
        const struct tb_added *a = &t->added[i];
        if (a->n == content.n && (a->n == 0 || memcmp(t->pool + a->at, content.p, a->n) == 0))
            return a->id;
    }
    return -1;
}

int32_t tb_tokenizer_eos_id(const struct tb_tokenizer *t)
{
    return t->eos;
}
