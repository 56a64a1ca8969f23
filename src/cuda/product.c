/*
 * Weights and matrix products by cuBLASLt: inputs of the activation type, float32 sums and results.
 *
 * A weight is one row-major copy [n_out, n_in], which serves both directions. cuBLASLt counts by
 * columns, so a row-major matrix is its own transpose there: y^T = W x^T, with x^T, y^T of T
 * columns, and dx^T = W^T dy^T.
 *
 * A plan is the algorithms for one shape of weight and one direction, chosen when the first such
 * weight is made: one for few rows, one for some and one for many, as none is fast for all. A row's
 * bits must not depend on the rows beside it, and the library promises no such thing, so each
 * candidate is tried on this device: rows are multiplied alone, among a few and among as many as
 * fill the device, and must come out the same bit for bit, whichever of the three algorithms has
 * them. Candidates that split K are not asked for. The first in the library's order that passes is
 * taken; nothing is timed, so the choice is the same at every start.
 *
 * Owner: struct tb_cuda owns the plans; a weight borrows its two. Thread: the backend's.
 */
#include <cublasLt.h>
#include <string.h>

#include "backend/number.h"
#include "cuda/host.h"
#include "util/log.h"

#define WORKSPACE    ((size_t)32 << 20)
#define MAX_ROWS     16384 /* of one call of the library, a power of two */
#define N_CANDIDATES 32
#define CONVERT      ((size_t)1 << 18) /* elements of a weight converted at once */
#define COMPARE      ((size_t)1 << 20) /* bytes compared at once */

enum size { FEW, SOME, MANY, N_SIZES };
static const struct {
    int least, typical, most; /* the library's candidates are for the typical one */
} sizes[N_SIZES] = {{1, 16, 32}, {33, 128, 256}, {257, 2048, MAX_ROWS}};

struct plan {
    struct plan *next;
    bool backward;
    int n_in, n_out;
    int ld;                     /* of the rows of the result that it was made for, and what */
    size_t align;               /* that is aligned to, in bytes: 4 to 16 */
    cublasLtMatmulDesc_t op[2]; /* without and with a bias */
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algo[N_SIZES];
};

struct tb_cuda_plans {
    cublasLtHandle_t lt;
    void *workspace;
    struct plan *first;
};

struct tb_weight {
    int n_in, n_out;
    void *data;
    size_t bytes;
    struct plan *fwd, *bwd;
};

/* ---- plans */

static int width_in(const struct plan *p)
{
    return p->backward ? p->n_out : p->n_in;
}

static int width_out(const struct plan *p)
{
    return p->backward ? p->n_in : p->n_out;
}

/* The largest power of two up to 16 that divides n. */
static size_t align_of(size_t n)
{
    size_t a = 16;
    while (n % a)
        a /= 2;
    return a;
}

static cudaDataType_t act_type(const struct tb_cuda *c)
{
    return c->be.act == TB_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

static cublasStatus_t make_op(cublasLtMatmulDesc_t *out, bool backward, bool bias)
{
    cublasOperation_t trans = backward ? CUBLAS_OP_N : CUBLAS_OP_T;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    cublasStatus_t s = cublasLtMatmulDescCreate(out, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (!s)
        s = cublasLtMatmulDescSetAttribute(*out, CUBLASLT_MATMUL_DESC_TRANSA, &trans,
                                           sizeof(trans));
    if (!s && bias)
        s = cublasLtMatmulDescSetAttribute(*out, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                           sizeof(epilogue));
    return s;
}

static cublasStatus_t set_bias(cublasLtMatmulDesc_t op, const void *bias)
{
    return cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                          sizeof(bias));
}

static cublasStatus_t set_rows(const struct plan *p, int rows, int ld)
{
    uint64_t n = (uint64_t)rows;
    int64_t stride = ld;
    cublasStatus_t s =
        cublasLtMatrixLayoutSetAttribute(p->x, CUBLASLT_MATRIX_LAYOUT_COLS, &n, sizeof(n));
    if (!s) s = cublasLtMatrixLayoutSetAttribute(p->y, CUBLASLT_MATRIX_LAYOUT_COLS, &n, sizeof(n));
    if (!s)
        s = cublasLtMatrixLayoutSetAttribute(p->y, CUBLASLT_MATRIX_LAYOUT_LD, &stride,
                                             sizeof(stride));
    return s;
}

static cublasStatus_t describe_plan(const struct tb_cuda *c, struct plan *p)
{
    uint64_t in = (uint64_t)width_in(p), out = (uint64_t)width_out(p);
    cublasStatus_t s = make_op(&p->op[0], p->backward, false);
    if (!s) s = make_op(&p->op[1], p->backward, true);
    /* Only where it lies matters, until a product has its own. */
    if (!s) s = set_bias(p->op[1], c->plans->workspace);
    if (!s)
        s = cublasLtMatrixLayoutCreate(&p->w, act_type(c), (uint64_t)p->n_in, (uint64_t)p->n_out,
                                       p->n_in);
    if (!s) s = cublasLtMatrixLayoutCreate(&p->x, act_type(c), in, 1, (int64_t)in);
    if (!s) s = cublasLtMatrixLayoutCreate(&p->y, CUDA_R_32F, out, 1, p->ld);
    return s;
}

static void plan_free(struct plan *p)
{
    for (int i = 0; i < 2; i++)
        if (p->op[i]) (void)cublasLtMatmulDescDestroy(p->op[i]);
    if (p->w) (void)cublasLtMatrixLayoutDestroy(p->w);
    if (p->x) (void)cublasLtMatrixLayoutDestroy(p->x);
    if (p->y) (void)cublasLtMatrixLayoutDestroy(p->y);
    tb_free(p);
}

/* The library's candidates for that many rows, best first. */
static cublasStatus_t list_candidates(const struct tb_cuda *c, const struct plan *p, enum size size,
                                      cublasLtMatmulHeuristicResult_t *out, int *n)
{
    const struct tb_cuda_plans *all = c->plans;
    size_t e = tb_dtype_size(c->be.act), workspace = WORKSPACE;
    uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_NONE, align_w = (uint32_t)TB_CUDA_ALIGN,
             align_x = (uint32_t)align_of((size_t)width_in(p) * e), align_y = (uint32_t)p->align;
    const struct {
        cublasLtMatmulPreferenceAttributes_t which;
        const void *value;
        size_t size;
    } set[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(workspace)},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme, sizeof(scheme)},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_w, sizeof(align_w)},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_x, sizeof(align_x)},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_y, sizeof(align_y)},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_y, sizeof(align_y)},
    };
    cublasLtMatmulPreference_t pref;
    *n = 0;
    cublasStatus_t s = cublasLtMatmulPreferenceCreate(&pref);
    if (s) return s;
    for (size_t i = 0; i < TB_ARRAY_LEN(set) && !s; i++)
        s = cublasLtMatmulPreferenceSetAttribute(pref, set[i].which, set[i].value, set[i].size);
    if (!s) s = set_rows(p, sizes[size].typical, p->ld);
    if (!s)
        s = cublasLtMatmulAlgoGetHeuristic(all->lt, p->op[0], p->w, p->x, p->y, p->y, pref,
                                           N_CANDIDATES, out, n);
    (void)cublasLtMatmulPreferenceDestroy(pref);
    return s;
}

static enum size size_of(int rows)
{
    int i = FEW;
    while (rows > sizes[i].most)
        i++;
    return (enum size)i;
}

static cublasStatus_t multiply(struct tb_cuda *c, const struct plan *p, const void *w,
                               const void *x, int T, const float *bias, float *y, int ldy,
                               bool accumulate)
{
    const struct tb_cuda_plans *all = c->plans;
    const float one = 1, beta = accumulate ? 1 : 0;
    size_t row = (size_t)width_in(p) * tb_dtype_size(c->be.act);
    cublasStatus_t s = bias ? set_bias(p->op[1], bias) : CUBLAS_STATUS_SUCCESS;
    for (int t = 0, n; t < T && !s; t += n) {
        n = TB_MIN(T - t, MAX_ROWS);
        float *to = y + (size_t)t * (size_t)ldy;
        s = set_rows(p, n, ldy);
        if (!s)
            s = cublasLtMatmul(all->lt, p->op[bias != NULL], &one, w, p->w,
                               (const char *)x + (size_t)t * row, p->x, &beta, to, p->y, to, p->y,
                               &p->algo[size_of(n)], all->workspace, WORKSPACE, c->stream);
    }
    return s;
}

/* ---- which candidates: the first whose rows are the same in every batch */

#define REFERENCE 200 /* rows, which are multiplied once among themselves */
#define SHIFT     37  /* a batch begins with this one: rows lie elsewhere than in the reference */

struct trial {
    int n_ref, most; /* rows of the reference and of the largest batch that there is memory for */
    size_t x_bytes, y_bytes;
    char *x; /* the reference's rows, again and again */
    float *y, *again;
    char *a, *b; /* host, COMPARE bytes each */
};

static void trial_free(struct tb_cuda *c, struct trial *t)
{
    if (t->x) tb_cuda_pool_give(c->pool, t->x, t->x_bytes);
    if (t->y) tb_cuda_pool_give(c->pool, t->y, t->y_bytes);
    tb_free(t->a);
    tb_free(t->b);
}

/* Inputs that are the same at every start: uniform in [-1, 1). */
static void *random_rows(enum tb_dtype act, size_t n)
{
    char *p = tb_try_malloc(n * tb_dtype_size(act));
    uint32_t r = 1;
    for (size_t i = 0; i < n && p; i++) {
        r = r * 1664525u + 1013904223u;
        tb_store(act, p, i, (float)(int32_t)r * 0x1p-31f);
    }
    return p;
}

/* The largest batch is cut into more tiles than there are multiprocessors. */
static int trial_init(struct tb_cuda *c, const struct plan *p, struct trial *t,
                      struct tb_error *err)
{
    size_t row = (size_t)width_in(p) * tb_dtype_size(c->be.act), out = (size_t)width_out(p);
    *t = (struct trial){0};
    for (t->most = TB_MAX(16 * c->n_sm, sizes[MANY].least); t->most; t->most /= 2) {
        trial_free(c, t);
        t->n_ref = TB_MIN(t->most, REFERENCE);
        t->x_bytes = (size_t)(SHIFT + t->most) * row;
        t->y_bytes = (size_t)(t->n_ref + t->most) * out * sizeof(float);
        t->x = tb_cuda_pool_take(c->pool, t->x_bytes);
        t->y = t->x ? tb_cuda_pool_take(c->pool, t->y_bytes) : NULL;
        if (t->y) break;
    }
    t->a = tb_malloc(COMPARE);
    t->b = tb_malloc(COMPARE);
    char *host = random_rows(c->be.act, (size_t)t->n_ref * (size_t)width_in(p));
    if (!t->y || !host) {
        tb_free(host);
        trial_free(c, t);
        return tb_error_set(err, TB_ENOMEM, "no memory to try the products of a weight [%d, %d]",
                            p->n_out, p->n_in);
    }
    t->again = t->y + (size_t)t->n_ref * out;
    for (size_t at = 0, n; at < t->x_bytes; at += n) {
        n = TB_MIN((size_t)t->n_ref * row, t->x_bytes - at);
        c->ops.upload(&c->be, t->x + at, host, n);
    }
    tb_free(host);
    return 0;
}

/* Can the algorithm do any number of rows of that size? */
static bool takes(const struct tb_cuda *c, const struct plan *p, enum size size)
{
    cublasLtMatmulHeuristicResult_t r;
    for (int rows = sizes[size].least; rows <= sizes[size].most; rows *= 2)
        for (int bias = 0; bias <= !p->backward; bias++)
            if (set_rows(p, rows, p->ld) ||
                cublasLtMatmulAlgoCheck(c->plans->lt, p->op[bias], p->w, p->x, p->y, p->y,
                                        &p->algo[size], &r) ||
                r.workspaceSize > WORKSPACE)
                return false;
    return true;
}

static bool same_bytes(struct tb_cuda *c, const struct trial *t, const void *x, const void *y,
                       size_t bytes)
{
    for (size_t at = 0, n; at < bytes; at += n) {
        n = TB_MIN(COMPARE, bytes - at);
        tb_cuda_fetch(c, t->a, (const char *)x + at, n);
        tb_cuda_fetch(c, t->b, (const char *)y + at, n);
        if (memcmp(t->a, t->b, n) != 0) return false;
    }
    return true;
}

/* Are the rows of a batch those of the reference? */
static bool batch_agrees(struct tb_cuda *c, const struct plan *p, const struct trial *t,
                         const void *w, int rows)
{
    size_t in = (size_t)width_in(p), out = (size_t)width_out(p), e = tb_dtype_size(c->be.act);
    if (multiply(c, p, w, t->x + SHIFT * in * e, rows, NULL, t->again, (int)out, false))
        return false;
    for (int i = 0, n; i < rows; i += n) {
        int ref = (SHIFT + i) % t->n_ref;
        n = TB_MIN(rows - i, t->n_ref - ref);
        if (!same_bytes(c, t, t->y + (size_t)ref * out, t->again + (size_t)i * out,
                        (size_t)n * out * sizeof(float)))
            return false;
    }
    return true;
}

static bool rows_agree(struct tb_cuda *c, const struct plan *p, const struct trial *t,
                       const void *w, enum size size)
{
    const int batches[] = {1, 7, 64, t->most};
    if (!takes(c, p, size)) return false;
    for (size_t i = 0; i < TB_ARRAY_LEN(batches); i++)
        if (size_of(batches[i]) == size && batches[i] <= t->most &&
            !batch_agrees(c, p, t, w, batches[i]))
            return false;
    return true;
}

static void log_choice(const struct tb_cuda *c, const struct plan *p, enum size size)
{
    int32_t id = -1;
    uint32_t tile = 0;
    const cublasLtMatmulAlgo_t *algo = &p->algo[size];
    (void)cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_ID, &id, sizeof(id),
                                               NULL);
    (void)cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile,
                                               sizeof(tile), NULL);
    tb_log(TB_LOG_DEBUG, "cuda", "device %d: %s of [%d, %d], up to %d rows: algorithm %d, tile %u",
           c->device, p->backward ? "backward product" : "product", p->n_out, p->n_in,
           sizes[size].most, (int)id, (unsigned)tile);
}

/* For rows of that size the first candidate that has the reference's bits, or else the one that
 * made it. */
static bool choose_for(struct tb_cuda *c, struct plan *p, const struct trial *t, const void *w,
                       enum size size)
{
    cublasLtMatmulHeuristicResult_t found[N_CANDIDATES];
    int n = 0;
    if (t->most < sizes[size].least || list_candidates(c, p, size, found, &n)) n = 0;
    for (int i = 0; i <= n && !c->lost.code; i++) {
        if (i < n && found[i].state) continue;
        p->algo[size] = i < n ? found[i].algo : p->algo[SOME];
        if (rows_agree(c, p, t, w, size)) return true;
    }
    return false;
}

static int choose(struct tb_cuda *c, struct plan *p, const void *w, struct tb_error *err)
{
    cublasLtMatmulHeuristicResult_t found[N_CANDIDATES];
    struct trial t;
    int n;
    cublasStatus_t s = list_candidates(c, p, SOME, found, &n);
    int rc = trial_init(c, p, &t, err);
    if (rc) return rc;
    bool good = false;
    for (int i = 0; i < n && !s && !good && !c->lost.code; i++) {
        for (int size = 0; size < N_SIZES; size++)
            p->algo[size] = found[i].algo;
        good = !found[i].state &&
               !multiply(c, p, w, t.x, t.n_ref, NULL, t.y, width_out(p), false) &&
               rows_agree(c, p, &t, w, SOME) && choose_for(c, p, &t, w, FEW) &&
               choose_for(c, p, &t, w, MANY);
    }
    for (int size = 0; size < N_SIZES && good; size++)
        log_choice(c, p, (enum size)size);
    rc = c->ops.sync(&c->be, err);
    trial_free(c, &t);
    if (rc || good) return rc;
    return tb_error_set(err, TB_EUNSUPPORTED,
                        "CUDA device %d (%s): cuBLASLt has no %s %s of a weight [%d, %d] whose "
                        "rows do not depend on the batch (%d candidates%s%s)",
                        c->device, c->name, c->be.act == TB_BF16 ? "bf16" : "f32",
                        p->backward ? "backward product" : "product", p->n_out, p->n_in, n,
                        s ? ": " : "", s ? cublasLtGetStatusString(s) : "");
}

/* The plan for products with w's shape into rows of stride ld; w is multiplied by to find it. */
static int plan_get(struct tb_cuda *c, const struct tb_weight *w, bool backward, int ld,
                    struct plan **out, struct tb_error *err)
{
    size_t align = align_of((size_t)ld * sizeof(float));
    for (struct plan *p = c->plans->first; p; p = p->next) {
        if (p->backward == backward && p->n_in == w->n_in && p->n_out == w->n_out &&
            p->align == align) {
            *out = p;
            return 0;
        }
    }
    if (c->capturing) /* trials wait for results; the step is asked for again, plainly */
        return tb_error_set(err, TB_EDEVICE, "a new product in a captured step");
    struct plan *p = tb_calloc(1, sizeof(*p));
    *p = (struct plan){
        .backward = backward, .n_in = w->n_in, .n_out = w->n_out, .ld = ld, .align = align};
    cublasStatus_t s = describe_plan(c, p);
    int rc = s ? tb_error_set(err, TB_EDEVICE, "CUDA device %d (%s): cuBLASLt: %s", c->device,
                              c->name, cublasLtGetStatusString(s))
               : choose(c, p, w->data, err);
    if (rc) {
        plan_free(p);
        return rc;
    }
    p->next = c->plans->first;
    c->plans->first = p;
    *out = p;
    return 0;
}

int tb_cuda_plans_create(struct tb_cuda *c, struct tb_error *err)
{
    struct tb_cuda_plans *all = c->plans = tb_calloc(1, sizeof(*all));
    cublasStatus_t s = cublasLtCreate(&all->lt);
    if (s) {
        all->lt = NULL;
        return tb_error_set(err, TB_EUNSUPPORTED, "CUDA device %d (%s): cuBLASLt: %s", c->device,
                            c->name, cublasLtGetStatusString(s));
    }
    all->workspace = tb_cuda_alloc(&c->be, WORKSPACE);
    return all->workspace ? 0
                          : tb_backend_no_memory(&c->be, err, WORKSPACE, "cuBLASLt's workspace");
}

void tb_cuda_plans_destroy(struct tb_cuda *c)
{
    struct tb_cuda_plans *all = c->plans;
    if (!all) return;
    for (struct plan *p = all->first, *next; p; p = next) {
        next = p->next;
        plan_free(p);
    }
    if (all->lt) (void)cublasLtDestroy(all->lt);
    tb_cuda_free(&c->be, all->workspace, WORKSPACE);
    tb_free(all);
    c->plans = NULL;
}

/* ---- weights */

/* n elements of a part, from element `first` of the weight on. */
static int upload_part(struct tb_cuda *c, struct tb_weight *w, size_t first, const void *part,
                       enum tb_dtype dtype, size_t n, struct tb_error *err)
{
    enum tb_dtype act = c->be.act;
    size_t e = tb_dtype_size(act);
    char *to = (char *)w->data + first * e;
    if (dtype == act) {
        c->ops.upload(&c->be, to, part, n * e);
        return 0;
    }
    char *host = tb_try_malloc(TB_MIN(n, CONVERT) * e);
    if (!host) return tb_error_set(err, TB_ENOMEM, "no memory to convert a weight");
    for (size_t done = 0, k; done < n; done += k) {
        k = TB_MIN(n - done, CONVERT);
        for (size_t i = 0; i < k; i++)
            tb_store(act, host, i, tb_load(dtype, part, done + i));
        c->ops.upload(&c->be, to + done * e, host, k * e);
    }
    tb_free(host);
    return 0;
}

static void weight_free(struct tb_backend *be, struct tb_weight *w)
{
    if (!w) return;
    tb_cuda_free(be, w->data, w->bytes);
    tb_free(w);
}

static int weight_create(struct tb_backend *be, int n_parts, const void *const *parts,
                         const enum tb_dtype *dtypes, const int *rows, int n_in,
                         struct tb_weight **out, struct tb_error *err)
{
    struct tb_cuda *c = tb_cuda(be);
    struct tb_weight *w = tb_calloc(1, sizeof(*w));
    size_t at = 0;
    int rc = 0;
    *out = NULL;
    w->n_in = n_in;
    for (int i = 0; i < n_parts; i++)
        w->n_out += rows[i];
    w->bytes = (size_t)w->n_out * (size_t)n_in * tb_dtype_size(be->act);
    w->data = tb_cuda_alloc(be, w->bytes);
    if (!w->data) rc = tb_backend_no_memory(be, err, w->bytes, "a weight");
    for (int i = 0; i < n_parts && !rc; i++) {
        size_t n = (size_t)rows[i] * (size_t)n_in;
        rc = upload_part(c, w, at, parts[i], dtypes[i], n, err);
        at += n;
    }
    if (!rc) rc = plan_get(c, w, false, w->n_out, &w->fwd, err);
    if (!rc) rc = plan_get(c, w, true, w->n_in, &w->bwd, err);
    if (rc) {
        weight_free(be, w);
        return rc;
    }
    *out = w;
    return 0;
}

static size_t weight_bytes(const struct tb_weight *w)
{
    return w->bytes;
}

/* The one copy serves both directions. */
static int weight_prepare_bwd(struct tb_backend *be, struct tb_weight *w, int n_parts,
                              const void *const *parts, const enum tb_dtype *dtypes,
                              const int *rows, struct tb_error *err)
{
    return 0;
}

/* ---- products */

static void product(struct tb_backend *be, const struct tb_weight *w, const struct plan *plan,
                    const void *x, int T, const float *bias, float *y, int ld, bool accumulate)
{
    struct tb_cuda *c = tb_cuda(be);
    struct plan *other = NULL;
    struct tb_error err = {0};
    if (T == 0 || !tb_cuda_ok(c, cudaSuccess, "a product")) return;
    if (align_of((size_t)ld * sizeof(float)) < plan->align) {
        if (plan_get(c, w, plan->backward, ld, &other, &err)) {
            tb_cuda_fail(c, "a product", err.msg);
            return;
        }
        plan = other;
    }
    const size_t what[] = {(size_t)plan, (size_t)w->data, (size_t)x,  (size_t)T,
                           (size_t)bias, (size_t)y,       (size_t)ld, accumulate};
    tb_cuda_note(c, what, sizeof(what));
    if (c->comparing) return;
    cublasStatus_t s = multiply(c, plan, w->data, x, T, bias, y, ld, accumulate);
    if (s) tb_cuda_fail(c, "a product", cublasLtGetStatusString(s));
}

static void matmul(struct tb_backend *be, const struct tb_weight *w, const void *x, int T,
                   const float *bias, float *y, int ldy, bool accumulate)
{
    product(be, w, w->fwd, x, T, bias, y, ldy, accumulate);
}

static void matmul_bwd(struct tb_backend *be, const struct tb_weight *w, const void *dy, int T,
                       float *dx, int ld_dx, bool accumulate)
{
    product(be, w, w->bwd, dy, T, NULL, dx, ld_dx, accumulate);
}

void tb_cuda_product_ops(struct tb_backend_ops *o)
{
    o->weight_create = weight_create;
    o->weight_free = weight_free;
    o->weight_bytes = weight_bytes;
    o->weight_prepare_bwd = weight_prepare_bwd;
    o->matmul = matmul;
    o->matmul_bwd = matmul_bwd;
}
