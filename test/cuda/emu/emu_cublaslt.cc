/*
 * The emulation's cuBLASLt: one reference product in float32, each sum in the order of K or, where
 * emu_vary_products says so, the reverse; see emu.h. There are two algorithms; the first asks for a
 * workspace, so that callers have one.
 */
#include "cublasLt.h"

#include <string.h>

#include <vector>

#include "cuda_runtime.h"

struct cublasLtContext {
    int unused;
};
struct emu_matmul_desc {
    int32_t trans_a, trans_b, epilogue, bias_type;
    const void *bias;
};
struct emu_matrix_layout {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld;
    int32_t order;
    uint64_t at(uint64_t row, uint64_t col) const
    {
        return order == CUBLASLT_ORDER_COL ? col * (uint64_t)ld + row : row * (uint64_t)ld + col;
    }
};
struct emu_preference {
    uint64_t workspace;
};

#define ALGO_WORKSPACE ((size_t)4096)

static int n_varying = 1;

void emu_vary_products(int n)
{
    n_varying = n;
}

static float load(cudaDataType type, const void *p, uint64_t i)
{
    if (type == CUDA_R_32F) return ((const float *)p)[i];
    return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}
static void store(cudaDataType type, void *p, uint64_t i, float x)
{
    if (type == CUDA_R_32F)
        ((float *)p)[i] = x;
    else
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(x);
}

const char *cublasLtGetStatusName(cublasStatus_t s)
{
    return s == CUBLAS_STATUS_SUCCESS            ? "CUBLAS_STATUS_SUCCESS"
           : s == CUBLAS_STATUS_INVALID_VALUE    ? "CUBLAS_STATUS_INVALID_VALUE"
           : s == CUBLAS_STATUS_NOT_SUPPORTED    ? "CUBLAS_STATUS_NOT_SUPPORTED"
           : s == CUBLAS_STATUS_EXECUTION_FAILED ? "CUBLAS_STATUS_EXECUTION_FAILED"
                                                 : "an unknown status";
}
const char *cublasLtGetStatusString(cublasStatus_t s)
{
    return cublasLtGetStatusName(s);
}
size_t cublasLtGetVersion(void)
{
    return 130000;
}
cublasStatus_t cublasLtCreate(cublasLtHandle_t *h)
{
    *h = new cublasLtContext;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t h)
{
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t,
                                        cudaDataType_t scale)
{
    if (scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    *d = new emu_matmul_desc{CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, -1, NULL};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d)
{
    delete d;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                              cublasLtMatmulDescAttributes_t a, const void *value,
                                              size_t bytes)
{
    if (bytes != (a == CUBLASLT_MATMUL_DESC_BIAS_POINTER ? 8 : 4))
        return CUBLAS_STATUS_INVALID_VALUE;
    switch (a) {
    case CUBLASLT_MATMUL_DESC_TRANSA: memcpy(&d->trans_a, value, bytes); break;
    case CUBLASLT_MATMUL_DESC_TRANSB: memcpy(&d->trans_b, value, bytes); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE: memcpy(&d->epilogue, value, bytes); break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: memcpy(&d->bias, value, bytes); break;
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: memcpy(&d->bias_type, value, bytes); break;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld)
{
    *l = new emu_matrix_layout{type, rows, cols, ld, CUBLASLT_ORDER_COL};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l)
{
    delete l;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                cublasLtMatrixLayoutAttribute_t a,
                                                const void *value, size_t bytes)
{
    size_t size = a == CUBLASLT_MATRIX_LAYOUT_ORDER ? sizeof(l->order) : sizeof(l->rows);
    if (bytes != size) return CUBLAS_STATUS_INVALID_VALUE;
    switch (a) {
    case CUBLASLT_MATRIX_LAYOUT_ORDER: memcpy(&l->order, value, bytes); break;
    case CUBLASLT_MATRIX_LAYOUT_ROWS: memcpy(&l->rows, value, bytes); break;
    case CUBLASLT_MATRIX_LAYOUT_COLS: memcpy(&l->cols, value, bytes); break;
    case CUBLASLT_MATRIX_LAYOUT_LD: memcpy(&l->ld, value, bytes); break;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p)
{
    *p = new emu_preference{0};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p)
{
    delete p;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                    cublasLtMatmulPreferenceAttributes_t a,
                                                    const void *value, size_t bytes)
{
    if (a != CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
        return bytes == 4 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
    if (bytes != sizeof(p->workspace)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&p->workspace, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

/* The product's sizes; false when the layouts do not fit together. */
static bool sizes(const emu_matmul_desc *d, const emu_matrix_layout *a, const emu_matrix_layout *b,
                  const emu_matrix_layout *c, const emu_matrix_layout *out, uint64_t *m,
                  uint64_t *n, uint64_t *k)
{
    *m = d->trans_a ? a->cols : a->rows;
    *k = d->trans_a ? a->rows : a->cols;
    *n = d->trans_b ? b->rows : b->cols;
    for (const emu_matrix_layout *l : {a, b, c, out})
        if (l->ld < (int64_t)(l->order == CUBLASLT_ORDER_COL ? l->rows : l->cols)) return false;
    return *k == (d->trans_b ? b->cols : b->rows) && out->rows == *m && out->cols == *n &&
           c->rows == *m && c->cols == *n && c->type == out->type && a->type == b->type;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t out,
                                              cublasLtMatmulPreference_t p, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int *n)
{
    uint64_t m, cols, k;
    *n = 0;
    if (!sizes(d, a, b, c, out, &m, &cols, &k)) return CUBLAS_STATUS_INVALID_VALUE;
    for (int i = 0; i < 2 && *n < wanted; i++) {
        size_t workspace = i == 0 ? ALGO_WORKSPACE : 0;
        if (workspace > p->workspace) continue;
        cublasLtMatmulHeuristicResult_t *r = &results[(*n)++];
        memset(r, 0, sizeof(*r));
        r->algo.data[0] = (uint64_t)i + 1;
        r->workspaceSize = workspace;
    }
    return *n ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t d,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t out,
                                       const cublasLtMatmulAlgo_t *algo,
                                       cublasLtMatmulHeuristicResult_t *result)
{
    uint64_t m, n, k;
    if (!sizes(d, a, b, c, out, &m, &n, &k)) return CUBLAS_STATUS_INVALID_VALUE;
    memset(result, 0, sizeof(*result));
    result->algo = *algo;
    result->workspaceSize = algo->data[0] == 1 ? ALGO_WORKSPACE : 0;
    return CUBLAS_STATUS_SUCCESS;
}
/* data[1 + a / 2] holds two attributes of 32 bits. */
cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t a,
                                                    void *value, size_t bytes, size_t *written)
{
    if (bytes != 4) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(value, (const char *)&algo->data[1] + 4 * a, 4);
    if (a == CUBLASLT_ALGO_CONFIG_ID) memcpy(value, algo->data, 4);
    if (written) *written = 4;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoConfigSetAttribute(cublasLtMatmulAlgo_t *algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t a,
                                                    const void *value, size_t bytes)
{
    if (bytes != 4) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy((char *)&algo->data[1] + 4 * a, value, 4);
    return CUBLAS_STATUS_SUCCESS;
}

static void product(const emu_matmul_desc &d, float alpha, const void *a,
                    const emu_matrix_layout &la, const void *b, const emu_matrix_layout &lb,
                    float beta, const void *c, const emu_matrix_layout &lc, void *out,
                    const emu_matrix_layout &lout, bool backwards)
{
    uint64_t m = lout.rows, n = lout.cols, k = d.trans_a ? la.rows : la.cols;
    std::vector<float> x(k * m), sum(m); /* x: op(a) transposed, so that the sums' loop is dense */
    for (uint64_t i = 0; i < m; i++)
        for (uint64_t l = 0; l < k; l++)
            x[l * m + i] = load(la.type, a, d.trans_a ? la.at(l, i) : la.at(i, l));
    for (uint64_t j = 0; j < n; j++) {
        sum.assign(m, 0.0f);
        for (uint64_t l = 0; l < k; l++) {
            uint64_t at = backwards ? k - 1 - l : l;
            float y = load(lb.type, b, d.trans_b ? lb.at(j, at) : lb.at(at, j));
            for (uint64_t i = 0; i < m; i++)
                sum[i] += x[at * m + i] * y;
        }
        for (uint64_t i = 0; i < m; i++) {
            float z = alpha * sum[i];
            if (beta != 0) z += beta * load(lc.type, c, lc.at(i, j));
            if (d.epilogue == CUBLASLT_EPILOGUE_BIAS)
                z += load(d.bias_type < 0 ? lout.type : (cudaDataType)d.bias_type, d.bias, i);
            store(lout.type, out, lout.at(i, j), z);
        }
    }
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t la, const void *b,
                              cublasLtMatrixLayout_t lb, const void *beta, const void *c,
                              cublasLtMatrixLayout_t lc, void *out, cublasLtMatrixLayout_t lout,
                              const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspace_bytes, cudaStream_t stream)
{
    uint64_t m, n, k;
    if (!sizes(d, la, lb, lc, lout, &m, &n, &k)) return CUBLAS_STATUS_INVALID_VALUE;
    if (algo && algo->data[0] == 1 && (!workspace || workspace_bytes < ALGO_WORKSPACE))
        return CUBLAS_STATUS_INVALID_VALUE;
    emu_matmul_desc desc = *d;
    emu_matrix_layout sa = *la, sb = *lb, sc = *lc, so = *lout;
    float al, be;
    memcpy(&al, alpha, sizeof(al));
    memcpy(&be, beta, sizeof(be));
    bool backwards = algo && algo->data[0] <= (uint64_t)n_varying && n > 32;
    cudaError_t e = emu_enqueue(stream, "cublasLtMatmul", [=] {
        product(desc, al, a, sa, b, sb, be, c, sc, out, so, backwards);
    });
    return e ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
