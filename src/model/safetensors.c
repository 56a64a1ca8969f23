/*
 * safetensors reader and writer; see safetensors.h. A file is mapped privately and read-only. Files
 * whose data does not begin at a multiple of 8 (old writers) are copied to memory, so that every
 * tensor is aligned for its elements.
 *
 * Owner: struct tb_st owns its mappings, names and table. Thread: any, after open.
 */
#include "model/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/arena.h"
#include "util/buf.h"
#include "util/map.h"
#include "util/mem.h"

#define TB_ST_MAX_HEADER (100u << 20)
#define TB_ST_MAX_SHARDS 4096

struct st_file {
    char *map;
    size_t map_len; /* 0: data was copied to the heap */
    char *heap;
    const char *data;
    size_t data_len;
};

struct tb_st {
    struct tb_arena arena; /* names */
    struct st_file *files;
    size_t n_files;
    struct tb_st_tensor *tensors;
    size_t n, cap;
    struct tb_map by_name;
    json_t *meta;
};

static const struct {
    const char *name;
    size_t size;
    bool readable;
    enum tb_dtype dtype;
} dtypes[] = {
    {"F32", 4, true, TB_F32}, {"BF16", 2, true, TB_BF16}, {"F16", 2, true, TB_F16},
    {"F64", 8, false, 0},     {"I64", 8, false, 0},       {"U64", 8, false, 0},
    {"I32", 4, false, 0},     {"U32", 4, false, 0},       {"I16", 2, false, 0},
    {"U16", 2, false, 0},     {"I8", 1, false, 0},        {"U8", 1, false, 0},
    {"BOOL", 1, false, 0},    {"F8_E4M3", 1, false, 0},   {"F8_E5M2", 1, false, 0},
};

static uint64_t le64(const unsigned char *p)
{
    uint64_t v = 0;
    for (int i = 7; i >= 0; i--)
        v = v << 8 | p[i];
    return v;
}

static int io_error(struct tb_error *err, const char *what, const char *path)
{
    int code = errno == ENOENT ? TB_ENOTFOUND : TB_EIO;
    return tb_error_set(err, code, "%s %s: %s", what, path, strerror(errno));
}

/* Maps path, or reads it to the heap when its data would be misaligned. header_len receives the
 * length of the JSON text; the text itself is at *header until the file is closed. */
static int map_file(struct st_file *f, const char *path, const char **header, size_t *header_len,
                    struct tb_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return io_error(err, "cannot open", path);
    struct stat sb;
    int rc = 0;
    if (fstat(fd, &sb)) {
        rc = io_error(err, "cannot stat", path);
        goto out;
    }
    if (!S_ISREG(sb.st_mode) || sb.st_size < 8 || (uint64_t)sb.st_size > SIZE_MAX / 2) {
        rc = tb_error_set(err, TB_ECORRUPT, "%s: not a safetensors file (%lld bytes)", path,
                          (long long)sb.st_size);
        goto out;
    }
    size_t size = (size_t)sb.st_size;
    void *map = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) {
        rc = io_error(err, "cannot map", path);
        goto out;
    }
    f->map = map;
    f->map_len = size;
    uint64_t h = le64(map);
    if (h < 2 || h > TB_ST_MAX_HEADER || h > size - 8) {
        rc = tb_error_set(err, TB_ECORRUPT,
                          "%s: header length %llu does not fit the file (%zu bytes)", path,
                          (unsigned long long)h, size);
        goto out;
    }
    *header = f->map + 8;
    *header_len = (size_t)h;
    f->data = f->map + 8 + h;
    f->data_len = size - 8 - (size_t)h;
    if (h % 8 == 0) goto out;
    f->heap = tb_try_malloc(TB_MAX(f->data_len, 1));
    if (!f->heap) {
        rc = tb_error_set(err, TB_ENOMEM, "%s: no memory for %zu bytes", path, f->data_len);
        goto out;
    }
    memcpy(f->heap, f->data, f->data_len);
    f->data = f->heap;
out:
    close(fd);
    return rc;
}

static int parse_tensor(struct tb_st *st, const struct st_file *f, const char *path,
                        const char *name, const json_t *v, struct tb_error *err)
{
    const json_t *jd = json_object_get(v, "dtype"), *js = json_object_get(v, "shape");
    const json_t *jo = json_object_get(v, "data_offsets");
    if (!json_is_string(jd) || !json_is_array(js) || !json_is_array(jo) ||
        json_array_size(jo) != 2 || !json_is_integer(json_array_get(jo, 0)) ||
        !json_is_integer(json_array_get(jo, 1)))
        return tb_error_set(err, TB_ECORRUPT, "%s: tensor %s: bad header entry", path, name);
    if (json_array_size(js) > TB_ST_MAX_DIMS)
        return tb_error_set(err, TB_ECORRUPT, "%s: tensor %s: more than %d dimensions", path, name,
                            TB_ST_MAX_DIMS);
    struct tb_st_tensor t = {.name = tb_arena_strdup(&st->arena, name)};
    t.dtype_name = tb_arena_strdup(&st->arena, json_string_value(jd));
    size_t elem = 0;
    for (size_t i = 0; i < TB_ARRAY_LEN(dtypes); i++)
        if (!strcmp(dtypes[i].name, t.dtype_name)) {
            elem = dtypes[i].size;
            t.readable = dtypes[i].readable;
            t.dtype = dtypes[i].dtype;
        }
    t.n_dims = (int)json_array_size(js);
    size_t n = 1;
    for (int i = 0; i < t.n_dims; i++) {
        const json_t *d = json_array_get(js, (size_t)i);
        t.shape[i] = json_is_integer(d) ? json_integer_value(d) : -1;
        if (t.shape[i] < 0 || !tb_mul_size(n, (size_t)t.shape[i], &n))
            return tb_error_set(err, TB_ECORRUPT, "%s: tensor %s: bad shape", path, name);
    }
    json_int_t b = json_integer_value(json_array_get(jo, 0));
    json_int_t e = json_integer_value(json_array_get(jo, 1));
    if (b < 0 || e < b || (uint64_t)e > f->data_len)
        return tb_error_set(
            err, TB_ECORRUPT,
            "%s: tensor %s: data_offsets [%lld, %lld] outside of the file's %zu bytes", path, name,
            (long long)b, (long long)e, f->data_len);
    t.bytes = (size_t)(e - b);
    size_t want;
    if (elem && (!tb_mul_size(n, elem, &want) || want != t.bytes))
        return tb_error_set(err, TB_ECORRUPT, "%s: tensor %s: %zu bytes do not match its shape",
                            path, name, t.bytes);
    if (t.readable && (size_t)b % elem)
        return tb_error_set(err, TB_ECORRUPT, "%s: tensor %s: data is not aligned", path, name);
    t.data = f->data + b;
    if (st->n == st->cap) {
        st->cap = st->cap ? st->cap * 2 : 64;
        st->tensors = tb_realloc(st->tensors, st->cap * sizeof(*st->tensors));
    }
    st->tensors[st->n++] = t;
    return 0;
}

static int add_file(struct tb_st *st, const char *path, struct tb_error *err)
{
    st->files = tb_realloc(st->files, (st->n_files + 1) * sizeof(*st->files));
    struct st_file *f = &st->files[st->n_files++];
    memset(f, 0, sizeof(*f));
    const char *header = NULL;
    size_t header_len = 0;
    int rc = map_file(f, path, &header, &header_len, err);
    if (rc) return rc;
    json_error_t je;
    json_t *root = json_loadb(header, header_len, JSON_REJECT_DUPLICATES, &je);
    if (!json_is_object(root)) {
        json_decref(root);
        return tb_error_set(err, TB_ECORRUPT, "%s: header is not a JSON object: %s", path,
                            root ? "wrong type" : je.text);
    }
    const char *name;
    json_t *v;
    json_object_foreach(root, name, v)
    {
        if (!strcmp(name, "__metadata__")) {
            if (!st->meta && json_is_object(v)) st->meta = json_incref(v);
            continue;
        }
        rc = parse_tensor(st, f, path, name, v, err);
        if (rc) break;
    }
    json_decref(root);
    return rc;
}

/* Tensors do not move any more: index them. The first of two with one name wins (shards may
 * overlap). */
static void index_names(struct tb_st *st)
{
    for (size_t i = 0; i < st->n; i++) {
        const char *name = st->tensors[i].name;
        if (!tb_map_get(&st->by_name, name, strlen(name)))
            tb_map_put(&st->by_name, name, strlen(name), &st->tensors[i]);
    }
}

static struct tb_st *st_new(void)
{
    struct tb_st *st = tb_calloc(1, sizeof(*st));
    tb_arena_init(&st->arena);
    tb_map_init(&st->by_name);
    return st;
}

int tb_st_open(struct tb_st **out, const char *path, struct tb_error *err)
{
    struct tb_st *st = st_new();
    int rc = add_file(st, path, err);
    if (rc) {
        tb_st_close(st);
        return rc;
    }
    index_names(st);
    *out = st;
    return 0;
}

/* Opens every file that the index's weight_map names, each once. */
static int open_index(struct tb_st *st, const char *dir, const char *index_path,
                      struct tb_error *err)
{
    json_error_t je;
    json_t *root = json_load_file(index_path, JSON_REJECT_DUPLICATES, &je);
    if (!root)
        return tb_error_set(err, TB_ECORRUPT, "%s: line %d: %s", index_path, je.line, je.text);
    json_t *wm = json_object_get(root, "weight_map");
    int rc = 0;
    struct tb_map seen;
    tb_map_init(&seen);
    if (!json_is_object(wm)) {
        rc = tb_error_set(err, TB_ECORRUPT, "%s: weight_map is not an object", index_path);
        goto out;
    }
    const char *name;
    json_t *v;
    json_object_foreach(wm, name, v)
    {
        const char *file = json_string_value(v);
        if (!file || !*file || strchr(file, '/') || file[0] == '.') {
            rc = tb_error_set(err, TB_ECORRUPT, "%s: weight_map: %s has no usable file name",
                              index_path, name);
            goto out;
        }
        if (tb_map_get(&seen, file, strlen(file))) continue;
        if (st->n_files >= TB_ST_MAX_SHARDS) {
            rc = tb_error_set(err, TB_ECORRUPT, "%s: more than %d files", index_path,
                              TB_ST_MAX_SHARDS);
            goto out;
        }
        tb_map_put(&seen, file, strlen(file), st);
        char *path = tb_asprintf("%s/%s", dir, file);
        rc = add_file(st, path, err);
        tb_free(path);
        if (rc) goto out;
    }
out:
    tb_map_fini(&seen);
    json_decref(root);
    return rc;
}

int tb_st_open_dir(struct tb_st **out, const char *dir, struct tb_error *err)
{
    struct tb_st *st = st_new();
    char *index = tb_asprintf("%s/model.safetensors.index.json", dir);
    char *single = tb_asprintf("%s/model.safetensors", dir);
    int rc;
    if (access(index, F_OK) == 0)
        rc = open_index(st, dir, index, err);
    else if (access(single, F_OK) == 0)
        rc = add_file(st, single, err);
    else
        rc =
            tb_error_set(err, TB_ENOTFOUND,
                         "%s: has neither model.safetensors nor model.safetensors.index.json", dir);
    tb_free(index);
    tb_free(single);
    if (rc) {
        tb_st_close(st);
        return rc;
    }
    index_names(st);
    *out = st;
    return 0;
}

void tb_st_close(struct tb_st *st)
{
    if (!st) return;
    for (size_t i = 0; i < st->n_files; i++) {
        if (st->files[i].map) munmap(st->files[i].map, st->files[i].map_len);
        tb_free(st->files[i].heap);
    }
    tb_free(st->files);
    tb_free(st->tensors);
    tb_map_fini(&st->by_name);
    json_decref(st->meta);
    tb_arena_fini(&st->arena);
    tb_free(st);
}

size_t tb_st_count(const struct tb_st *st)
{
    return st->n;
}

const struct tb_st_tensor *tb_st_at(const struct tb_st *st, size_t i)
{
    return i < st->n ? &st->tensors[i] : NULL;
}

const struct tb_st_tensor *tb_st_find(const struct tb_st *st, const char *name)
{
    return tb_map_get(&st->by_name, name, strlen(name));
}

const char *tb_st_metadata(const struct tb_st *st, const char *key)
{
    return json_string_value(json_object_get(st->meta, key));
}

int tb_st_require(const struct tb_st *st, const char *name, int n_dims, int64_t rows, int64_t cols,
                  const struct tb_st_tensor **out, struct tb_error *err)
{
    const struct tb_st_tensor *t = tb_st_find(st, name);
    if (!t) return tb_error_set(err, TB_EINVAL, "tensor %s is missing", name);
    if (!t->readable)
        return tb_error_set(err, TB_EUNSUPPORTED,
                            "tensor %s has dtype %s; BF16, F16 and F32 are served", name,
                            t->dtype_name);
    bool ok = t->n_dims == n_dims && t->shape[0] == rows && (n_dims == 1 || t->shape[1] == cols);
    if (!ok) {
        char got[160];
        size_t n = 0;
        got[0] = 0;
        for (int i = 0; i < t->n_dims && n < sizeof(got) - 24; i++)
            n += (size_t)snprintf(got + n, sizeof(got) - n, "%s%lld", i ? ", " : "",
                                  (long long)t->shape[i]);
        if (n_dims == 1)
            return tb_error_set(err, TB_EINVAL, "tensor %s has shape [%s], expected [%lld]", name,
                                got, (long long)rows);
        return tb_error_set(err, TB_EINVAL, "tensor %s has shape [%s], expected [%lld, %lld]", name,
                            got, (long long)rows, (long long)cols);
    }
    *out = t;
    return 0;
}

void tb_st_drop_pages(const struct tb_st *st, const struct tb_st_tensor *t)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i < st->n_files; i++) {
        const struct st_file *f = &st->files[i];
        uintptr_t lo = (uintptr_t)f->map, p = (uintptr_t)t->data;
        if (!f->map || p < lo || p >= lo + f->map_len) continue;
        uintptr_t a = (p + page - 1) / page * page, b = (p + t->bytes) / page * page;
        if (b > a) madvise((void *)a, b - a, MADV_DONTNEED);
        return;
    }
}

static float half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 1023, bits;
    if (exp == 31)
        bits = sign | 0x7f800000u | man << 13;
    else if (exp)
        bits = sign | (exp + 112) << 23 | man << 13;
    else {
        float f = (float)man * 0x1p-24f;
        return sign ? -f : f;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

void tb_st_to_float(const struct tb_st_tensor *t, float *out, size_t n)
{
    if (t->dtype == TB_F32) {
        memcpy(out, t->data, n * 4);
        return;
    }
    const uint16_t *h = t->data;
    for (size_t i = 0; i < n; i++) {
        if (t->dtype == TB_BF16) {
            uint32_t b = (uint32_t)h[i] << 16;
            memcpy(&out[i], &b, 4);
        } else {
            out[i] = half_to_float(h[i]);
        }
    }
}

/* ---- writer */

static int write_all(int fd, const void *p, size_t n, struct tb_error *err)
{
    const char *c = p;
    while (n) {
        ssize_t w = write(fd, c, TB_MIN(n, (size_t)1 << 30));
        if (w < 0 && errno == EINTR) continue;
        if (w < 0) return tb_error_set(err, TB_EIO, "cannot write: %s", strerror(errno));
        c += w;
        n -= (size_t)w;
    }
    return 0;
}

static int make_header(const struct tb_st_out *tensors, size_t n, const struct tb_st_meta *meta,
                       size_t n_meta, char **out, struct tb_error *err)
{
    json_t *root = json_object();
    size_t at = 0;
    int bad = 0;
    if (n_meta) {
        json_t *m = json_object();
        for (size_t i = 0; i < n_meta; i++)
            bad |= json_object_set_new(m, meta[i].key, json_string(meta[i].value));
        bad |= json_object_set_new(root, "__metadata__", m);
    }
    for (size_t i = 0; i < n && !bad; i++) {
        const struct tb_st_out *t = &tensors[i];
        size_t bytes;
        if (t->rows < 0 || t->cols < 0 ||
            !tb_mul_size((size_t)t->rows, t->cols ? (size_t)t->cols : 1, &bytes) ||
            !tb_mul_size(bytes, 4, &bytes) || bytes > (size_t)INT64_MAX - at) {
            json_decref(root);
            return tb_error_set(err, TB_EINVAL, "tensor %s: bad shape", t->name);
        }
        json_t *shape = t->cols ? json_pack("[i,i]", t->rows, t->cols) : json_pack("[i]", t->rows);
        json_t *o = json_pack("{s:s,s:o,s:[I,I]}", "dtype", "F32", "shape", shape, "data_offsets",
                              (json_int_t)at, (json_int_t)(at + bytes));
        bad |= json_object_set_new(root, t->name, o);
        at += bytes;
    }
    *out = bad ? NULL : json_dumps(root, JSON_COMPACT | JSON_PRESERVE_ORDER);
    json_decref(root);
    return *out ? 0 : tb_error_set(err, TB_ENOMEM, "cannot build a safetensors header");
}

int tb_st_write_fd(int fd, const struct tb_st_out *tensors, size_t n, const struct tb_st_meta *meta,
                   size_t n_meta, struct tb_error *err)
{
    char *header = NULL;
    int rc = make_header(tensors, n, meta, n_meta, &header, err);
    if (rc) return rc;
    static const char spaces[8] = "        ";
    size_t len = strlen(header), pad = (8 - len % 8) % 8;
    unsigned char le[8];
    for (int i = 0; i < 8; i++)
        le[i] = (unsigned char)((uint64_t)(len + pad) >> (8 * i));
    rc = write_all(fd, le, 8, err);
    if (!rc) rc = write_all(fd, header, len, err);
    if (!rc) rc = write_all(fd, spaces, pad, err);
    for (size_t i = 0; i < n && !rc; i++) {
        size_t cols = tensors[i].cols ? (size_t)tensors[i].cols : 1;
        rc = write_all(fd, tensors[i].data, (size_t)tensors[i].rows * cols * 4, err);
    }
    free(header); /* jansson's default allocator */
    return rc;
}

int tb_st_write_path(const char *path, const struct tb_st_out *tensors, size_t n,
                     const struct tb_st_meta *meta, size_t n_meta, struct tb_error *err)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return io_error(err, "cannot create", path);
    int rc = tb_st_write_fd(fd, tensors, n, meta, n_meta, err);
    if (close(fd) && !rc) rc = io_error(err, "cannot close", path);
    return rc;
}
