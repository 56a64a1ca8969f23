/*
 * Tensors of requests: shape rules, CSR to dense, finite floats. Pure; memory in the op's arena.
 * Shapes: [n] or [rows, cols]; no shape means [n] by length.
 */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "api/tinker/tinker.h"
#include "util/mem.h"

static int check_finite(const float *v, size_t n, struct tb_error *err)
{
    for (size_t i = 0; i < n; i++)
        if (!isfinite(v[i]))
            return tb_error_set(err, TB_ENONFINITE, "element %zu is %s; all must be finite", i,
                                isnan(v[i]) ? "NaN"
                                : v[i] > 0  ? "Infinity"
                                            : "-Infinity");
    return 0;
}

static int check_csr(const struct tb_raw_tensor *r, size_t rows, size_t cols, struct tb_error *err)
{
    if (r->n_crow != rows + 1)
        return tb_error_set(err, TB_EINVAL, "crow_indices has %zu entries; %zu rows need %zu",
                            r->n_crow, rows, rows + 1);
    if (r->n_col != r->n_values)
        return tb_error_set(err, TB_EINVAL, "col_indices has %zu entries for %zu values", r->n_col,
                            r->n_values);
    if (r->crow[0] != 0 || r->crow[rows] != (int64_t)r->n_values)
        return tb_error_set(err, TB_EINVAL,
                            "crow_indices runs from %" PRId64 " to %" PRId64
                            "; it must run from 0 to the number of values, %zu",
                            r->crow[0], r->crow[rows], r->n_values);
    for (size_t i = 0; i < rows; i++) {
        if (r->crow[i + 1] < r->crow[i] || r->crow[i + 1] > (int64_t)r->n_values)
            return tb_error_set(err, TB_EINVAL, "crow_indices[%zu] is %" PRId64 " after %" PRId64,
                                i + 1, r->crow[i + 1], r->crow[i]);
        for (int64_t k = r->crow[i]; k < r->crow[i + 1]; k++) {
            if (r->col[k] < 0 || r->col[k] >= (int64_t)cols)
                return tb_error_set(err, TB_EINVAL,
                                    "col_indices[%" PRId64 "] is %" PRId64 ", not in 0..%zu", k,
                                    r->col[k], cols - 1);
            if (k > r->crow[i] && r->col[k] <= r->col[k - 1])
                return tb_error_set(err, TB_EINVAL,
                                    "col_indices[%" PRId64 "] is %" PRId64 " after %" PRId64
                                    " in one row; they must rise",
                                    k, r->col[k], r->col[k - 1]);
        }
    }
    return 0;
}

static int densify(const struct tb_raw_tensor *r, struct tb_arena *a, struct tb_tensor *t,
                   struct tb_error *err)
{
    size_t rows = (size_t)t->shape[0], cols = (size_t)t->shape[1], n = (size_t)t->n;
    size_t size = t->type == TB_TENSOR_F32 ? sizeof(float) : sizeof(int64_t), bytes, total;
    if (!tb_mul_size(n, size, &bytes) || !tb_add_size(a->total, bytes, &total) ||
        total > TB_MAX_OP_BYTES)
        return tb_error_set(err, TB_ETOOBIG,
                            "sparse shape [%zu, %zu] brings the request beyond %zu bytes when made "
                            "dense",
                            rows, cols, TB_MAX_OP_BYTES);
    void *p = tb_arena_try_alloc(a, bytes);
    if (!p) return tb_error_set(err, TB_ENOMEM, "no memory for a tensor of %zu bytes", bytes);
    if (t->type == TB_TENSOR_F32) {
        float *f = p;
        for (size_t i = 0; i < n; i++)
            f[i] = (float)r->fill;
    } else {
        int64_t *v = p;
        for (size_t i = 0; i < n; i++)
            v[i] = r->fill;
    }
    for (size_t i = 0; i < rows; i++)
        for (int64_t k = r->crow[i]; k < r->crow[i + 1]; k++)
            memcpy((char *)p + (i * cols + (size_t)r->col[k]) * size,
                   (const char *)r->values + (size_t)k * size, size);
    if (t->type == TB_TENSOR_F32)
        t->data.f32 = p;
    else
        t->data.i64 = p;
    return 0;
}

int tb_tensor_finish(const struct tb_raw_tensor *r, struct tb_arena *a, struct tb_tensor *t,
                     struct tb_error *err)
{
    t->type = r->type;
    if (r->n_shape > 2)
        return tb_error_set(err, TB_EINVAL, "shape has %zu dimensions; at most 2 are supported",
                            r->n_shape);
    if (r->sparse && r->n_shape != 2)
        return tb_error_set(err, TB_EINVAL,
                            "a sparse tensor needs a shape of 2 dimensions, not %zu", r->n_shape);
    int64_t n = 1;
    for (size_t i = 0; i < r->n_shape; i++) {
        int64_t limit = i == 0 ? TB_MAX_DATUM_TOKENS : TB_MAX_TARGETS_K;
        if (r->shape[i] < 0 || r->shape[i] > limit)
            return tb_error_set(err, TB_EINVAL, "shape[%zu] is %" PRId64 ", not in 0..%" PRId64, i,
                                r->shape[i], limit);
        t->shape[i] = r->shape[i];
        n *= r->shape[i]; /* < 2^32 */
    }
    t->n_dims = (int32_t)r->n_shape;
    if (r->n_shape == 0) {
        if (r->n_values > TB_MAX_DATUM_TOKENS)
            return tb_error_set(err, TB_EINVAL, "%zu elements, more than the limit of %d",
                                r->n_values, TB_MAX_DATUM_TOKENS);
        n = (int64_t)r->n_values;
        t->n_dims = 1;
        t->shape[0] = n;
    }
    t->n = n;
    int rc = r->type == TB_TENSOR_F32 ? check_finite(r->values, r->n_values, err) : 0;
    if (rc) return rc;
    if (r->sparse) {
        if (n == 0 && r->n_values > 0)
            return tb_error_set(err, TB_EINVAL, "%zu values in an empty shape", r->n_values);
        rc = check_csr(r, (size_t)t->shape[0], (size_t)t->shape[1], err);
        return rc ? rc : densify(r, a, t, err);
    }
    if ((size_t)n != r->n_values) {
        if (r->n_shape == 2)
            return tb_error_set(err, TB_EINVAL,
                                "%zu elements do not fill the shape [%" PRId64 ", %" PRId64 "]",
                                r->n_values, t->shape[0], t->shape[1]);
        return tb_error_set(err, TB_EINVAL, "%zu elements do not fill the shape [%" PRId64 "]",
                            r->n_values, n);
    }
    if (r->type == TB_TENSOR_F32)
        t->data.f32 = r->values;
    else
        t->data.i64 = r->values;
    return 0;
}

/* {"data": […], "dtype": "float32"|"int64", "shape"?, "sparse_crow_indices"?,
 * "sparse_col_indices"?} */
int tb_json_tensor(const struct tb_json *n, struct tb_arena *a, int64_t fill, struct tb_tensor *out,
                   struct tb_error *err)
{
    struct tb_raw_tensor raw = {.fill = fill};
    const char *dtype = NULL;
    struct tb_json data, m;
    int rc = tb_json_string(n, "dtype", true, a, 64, &dtype, err);
    if (rc == 0) rc = tb_json_array(n, "data", true, &data, err);
    if (rc) return rc;
    if (strcmp(dtype, "float32") == 0) {
        float *v = NULL;
        raw.type = TB_TENSOR_F32;
        rc = tb_json_as_f32s(&data, a, &v, &raw.n_values, err);
        raw.values = v;
    } else if (strcmp(dtype, "int64") == 0) {
        int64_t *v = NULL;
        raw.type = TB_TENSOR_I64;
        rc = tb_json_as_i64s(&data, a, &v, &raw.n_values, err);
        raw.values = v;
    } else {
        tb_json_find(n, "dtype", &m);
        return tb_json_fail(&m, err, TB_EUNSUPPORTED,
                            "\"%s\" is not supported (\"float32\" and \"int64\" are)", dtype);
    }
    if (rc) return rc;
    int64_t *v = NULL;
    rc = tb_json_array(n, "shape", false, &m, err);
    if (rc) return rc;
    if (m.v) {
        rc = tb_json_as_i64s(&m, a, &v, &raw.n_shape, err);
        raw.shape = v;
        if (rc) return rc;
    }
    struct tb_json crow, col;
    rc = tb_json_array(n, "sparse_crow_indices", false, &crow, err);
    if (rc == 0) rc = tb_json_array(n, "sparse_col_indices", false, &col, err);
    if (rc) return rc;
    if (!crow.v != !col.v)
        return tb_json_fail(n, err, TB_EINVAL,
                            "sparse_crow_indices and sparse_col_indices go together");
    if (crow.v) {
        raw.sparse = true;
        rc = tb_json_as_i64s(&crow, a, &v, &raw.n_crow, err);
        raw.crow = v;
        if (rc == 0) rc = tb_json_as_i64s(&col, a, &v, &raw.n_col, err);
        raw.col = v;
        if (rc) return rc;
    }
    struct tb_error e = {0};
    rc = tb_tensor_finish(&raw, a, out, &e);
    return rc ? tb_json_fail(n, err, rc, "%.384s", e.msg) : 0;
}
