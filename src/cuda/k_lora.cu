/*
 * LoRA over spans: many adapters of different rank in one launch.
 *
 * Forward. The rows of the spans are cut into tiles of one module. Both sides of x A^T and of u B^T
 * lie in memory along their sum, so each lane takes its part of the operands straight from there,
 * 16 bytes at a time and many at once: for a few rows, which is decoding, the time goes into
 * reading A and B, once, from all multiprocessors.
 *
 * Backward. The other products have a side that lies across the sum. Each warp streams chunks of
 * both through a ring of its own in shared memory. A gradient's tile belongs to one warp, which
 * walks the rows of all spans that share the target.
 *
 * Sums. Over n_in and n_out the warps of a block take turns of chunks, and their sums are added in
 * order; over the rank, and over a span's rows in blocks of GRAD_ROWS from its first, they run in
 * order. No size of a tile changes them. bf16 sums by tensor cores, float32 by fmaf.
 *
 * Owner: nothing. Thread: the backend's caller.
 */
#include "cuda/device.cuh"

#define TILES       1024 /* or spans, of a launch */
#define DOWN_WARPS  16
#define UP_WARPS    4
#define UP_BLOCKS   (MT * chunk<act>::COLS == 1 ? 5 : 3) /* a multiprocessor's, at least */
#define DU_WARPS    4
#define DX_WARPS    4
#define SIDE        32    /* rows and columns of a tile in the backward pass */
#define DU_PART     32768 /* a longer n_out, the unembedding's, is shared by several blocks */
#define DU_PARTS    64    /* at most: a tile's fit in the scratch memory */
#define GRAD_ROWS   512
#define DU_STAGES   4 /* of a warp's ring */
#define DX_STAGES   2
#define GRAD_STAGES 8

/* Rows of one module. */
struct tile {
    const void *w;  /* mat's a or b */
    const void *in; /* its first row */
    void *out;
    int ld_in, ld_out; /* elements */
    int n;             /* rows */
    int rank, width;   /* width: n_in or n_out */
    float scale;
};

template <typename act> __device__ static inline bool in_pieces(const void *p, int ld, int n)
{
    return (((uintptr_t)p | (uintptr_t)ld * sizeof(act) | (uintptr_t)n * sizeof(act)) & 15) == 0;
}
__device__ static inline int warp_id(void)
{
    return (int)threadIdx.x / TB_WARP;
}
__device__ static inline int lane_id(void)
{
    return (int)threadIdx.x % TB_WARP;
}
/* Where a lane's sum i of a tile of 16 x 8 is, as in mma_bf16. */
__device__ static inline int row_of(int lane, int i)
{
    return lane / 4 + i / 2 * 8;
}
__device__ static inline int col_of(int lane, int i)
{
    return lane % 4 * 2 + i % 2;
}

/* ---- operands straight from memory */

struct piece { /* 16 bytes of a row */
    uint32_t w[4];
};

__device__ static inline uint32_t load_word(const float *p, int n)
{
    return n > 0 ? __float_as_uint(*p) : 0;
}
__device__ static inline uint32_t load_word(const bf16 *p, int n)
{
    uint32_t lo = n > 0 ? __bfloat16_as_ushort(p[0]) : 0;
    return n > 1 ? lo | (uint32_t)__bfloat16_as_ushort(p[1]) << 16 : lo;
}

/* The first n elements at p, zeros behind them. whole: p is aligned and n not between 0 and a
 * piece's. */
template <bool whole, typename act> __device__ static inline piece load_piece(const act *p, int n)
{
    const int word = 4 / sizeof(act);
    piece r;
    if (whole) {
        uint4 v = load16(p, n > 0);
        r = {{v.x, v.y, v.z, v.w}};
    } else {
        for (int i = 0; i < 4; i++)
            r.w[i] = load_word(p + i * word, n - i * word);
    }
    return r;
}

/* What a lane holds of LEN elements of the sum: pieces of 16 rows and of 8 columns. */
template <typename act> struct chunk;

/* A row's four lanes take 8 elements each; mma_bf16 sums them in an order of its own, the same for
 * both sides. */
template <> struct chunk<bf16> {
    enum { LEN = 32, COLS = 1 };
    __device__ static inline int at(int lane) { return lane % 4 * 8; }
    __device__ static inline int col(int lane, int i) { return lane / 4; }
    __device__ static inline void mac(float d[4], const piece row[2], const piece *c)
    {
        for (int i = 0; i < 4; i += 2) {
            uint32_t a[4] = {row[0].w[i], row[1].w[i], row[0].w[i + 1], row[1].w[i + 1]},
                     b[2] = {c->w[i], c->w[i + 1]};
            mma_bf16(d, a, b);
        }
    }
};

/* Each lane has the two rows and the two columns of its sums. */
template <> struct chunk<float> {
    enum { LEN = 4, COLS = 2 };
    __device__ static inline int at(int lane) { return 0; }
    __device__ static inline int col(int lane, int i) { return lane % 4 * 2 + i; }
    __device__ static inline void mac(float d[4], const piece row[2], const piece *c)
    {
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 4; i++)
                d[i] = fmaf(__uint_as_float(row[i / 2].w[k]), __uint_as_float(c[i % 2].w[k]), d[i]);
    }
};

/* One side of a product, in memory along the sum: rows, or columns, of len elements. */
template <typename act> struct side {
    const act *p;
    int ld, n, len;
};
template <typename act> __device__ static inline bool is_whole(const side<act> &s)
{
    return in_pieces<act>(s.p, s.ld, s.len);
}
template <bool whole, typename act>
__device__ static inline piece side_piece(const side<act> &s, int i, int lane, int k)
{
    k += chunk<act>::at(lane);
    return load_piece<whole>(s.p + i * s.ld + k, i < s.n ? s.len - k : 0);
}

/* d += the products of chunks k, k + step, ... below end of 16 MT rows and 8 NT columns; DEPTH of
 * them are in flight. */
template <bool whole, int DEPTH, int MT, int NT, typename act>
__device__ static inline void dot_chunks(float (*d)[NT][4], const side<act> &rows,
                                         const side<act> &cols, int k, int step)
{
    const int C = chunk<act>::COLS;
    int lane = lane_id();
#pragma unroll 1
    for (; k < rows.len; k += DEPTH * step) {
        piece r[DEPTH][MT][2], c[DEPTH][NT][C];
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            int at = k + j * step;
#pragma unroll
            for (int n = 0; n < NT; n++)
                for (int i = 0; i < C; i++)
                    c[j][n][i] =
                        side_piece<whole>(cols, 8 * n + chunk<act>::col(lane, i), lane, at);
#pragma unroll
            for (int m = 0; m < MT; m++)
                for (int i = 0; i < 2; i++)
                    r[j][m][i] = side_piece<whole>(rows, 16 * m + lane / 4 + 8 * i, lane, at);
        }
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            if (k + j * step >= rows.len) break;
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < NT; n++)
                    chunk<act>::mac(d[m][n], r[j][m], c[j][n]);
        }
    }
}
template <int DEPTH, int MT, int NT, typename act>
__device__ static inline void dot(float (*d)[NT][4], const side<act> &rows, const side<act> &cols,
                                  int k, int step)
{
    if (is_whole(rows) && is_whole(cols))
        dot_chunks<true, DEPTH, MT, NT>(d, rows, cols, k, step);
    else
        dot_chunks<false, 1, MT, NT>(d, rows, cols, k, step);
}

/* ---- results */

/* Adds the warps' tiles in order and calls f(row, column, sum) for each element, in some thread.
 * part: the block's, a tile for each warp. */
template <int MT, int NT, typename F>
__device__ static inline void sum_warps(float *part, const float (*d)[NT][4], F f)
{
    const int N = MT * NT * 4 * TB_WARP;
    int lane = lane_id(), n_warps = (int)blockDim.x / TB_WARP;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                part[warp_id() * N + ((m * NT + n) * 4 + i) * TB_WARP + lane] = d[m][n][i];
    __syncthreads();
    for (int e = (int)threadIdx.x; e < N; e += (int)blockDim.x) {
        float s = part[e];
        for (int w = 1; w < n_warps; w++)
            s += part[w * N + e];
        int l = e % TB_WARP, i = e / TB_WARP % 4, t = e / TB_WARP / 4;
        f(t / NT * 16 + row_of(l, i), t % NT * 8 + col_of(l, i), s);
    }
}

/* A lane's elements of a float32 result that is added to: read early, so that the product hides the
 * time. p: the lane's first; rows, cols: how many there are from there. */
template <int MT, int NT> struct addend {
    float v[MT][NT][4];
    float *p;
    int ld, rows, cols;
    bool whole; /* two neighbours are one access, and all columns are there */

    template <typename F> __device__ inline void each_row(F f)
    {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (16 * m + 8 * i < rows) f(p + (16 * m + 8 * i) * ld, m, 2 * i);
    }
    /* tile: its corner; n_rows, n_cols: how many are there */
    __device__ inline void load(float *tile, int stride, int n_rows, int n_cols)
    {
        int row = row_of(lane_id(), 0), col = col_of(lane_id(), 0);
        p = tile + row * stride + col;
        ld = stride;
        rows = n_rows - row;
        cols = n_cols - col;
        whole = ((uintptr_t)tile | (size_t)ld * sizeof(float)) % sizeof(float2) == 0 &&
                n_cols >= 8 * NT;
        if (whole)
            each_row([&](const float *q, int m, int i) {
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    float2 y = *(const float2 *)(q + 8 * n);
                    v[m][n][i] = y.x;
                    v[m][n][i + 1] = y.y;
                }
            });
        else
            each_row([&](const float *q, int m, int i) {
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    v[m][n][i] = 8 * n < cols ? q[8 * n] : 0;
                    v[m][n][i + 1] = 8 * n + 1 < cols ? q[8 * n + 1] : 0;
                }
            });
    }
    __device__ inline void add(const float (*d)[NT][4], float scale)
    {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    v[m][n][i] += scale * d[m][n][i];
    }
    __device__ inline void store(void)
    {
        if (whole)
            each_row([&](float *q, int m, int i) {
#pragma unroll
                for (int n = 0; n < NT; n++)
                    *(float2 *)(q + 8 * n) = make_float2(v[m][n][i], v[m][n][i + 1]);
            });
        else
            each_row([&](float *q, int m, int i) {
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    if (8 * n < cols) q[8 * n] = v[m][n][i];
                    if (8 * n + 1 < cols) q[8 * n + 1] = v[m][n][i + 1];
                }
            });
    }
};

/* ---- forward */

/* u = x A^T: a block makes a tile's 8 NT columns of u. */
template <typename act, int MT, int NT>
__global__ __launch_bounds__(DOWN_WARPS *TB_WARP) static void k_down(const struct tile *tiles)
{
    const int LEN = chunk<act>::LEN, DEPTH = (MT * NT == 1 ? 8 : 2) / chunk<act>::COLS;
    TB_DYN_SHARED(float, part);
    struct tile t = tiles[blockIdx.y];
    int first = (int)blockIdx.x * 8 * NT;
    if (first >= t.rank) return;
    side<act> x = {(const act *)t.in, t.ld_in, t.n, t.width},
              a = {(const act *)t.w + (size_t)first * (size_t)t.width, t.width, t.rank - first,
                   t.width};
    float d[MT][NT][4] = {};
    dot<DEPTH, MT, NT>(d, x, a, warp_id() * LEN, DOWN_WARPS * LEN);
    sum_warps<MT, NT>(part, d, [&](int row, int col, float s) {
        if (row < t.n && first + col < t.rank)
            store_act((act *)t.out + (size_t)row * (size_t)t.ld_out + first + col, s);
    });
}

/* y += scale u B^T: each warp adds to 8 NT columns of a tile. */
template <typename act, int MT, int NT>
__global__ __launch_bounds__(UP_WARPS *TB_WARP,
                             UP_BLOCKS) static void k_up(const struct tile *tiles)
{
    struct tile t = tiles[blockIdx.y];
    int first = ((int)blockIdx.x * UP_WARPS + warp_id()) * 8 * NT;
    if (first >= t.width) return;
    side<act> u = {(const act *)t.in, t.ld_in, t.n, t.rank},
              b = {(const act *)t.w + (size_t)first * (size_t)t.rank, t.rank, t.width - first,
                   t.rank};
    addend<MT, NT> y;
    y.load((float *)t.out + first, t.ld_out, t.n, t.width - first);
    float d[MT][NT][4] = {};
    dot<1, MT, NT>(d, u, b, 0, chunk<act>::LEN);
    y.add(d, t.scale);
    y.store();
}

/* ---- backward: chunks in shared memory */

/* A chunk of a tile of SIDE x SIDE: LEN elements of the sum of both sides. Rows are padded by 16
 * bytes, so that the eight that ldmatrix reads at once lie in different banks. */
template <typename act> struct stage {
    enum {
        PIECE = 16 / sizeof(act),
        LEN = 64 / sizeof(act),
        ACROSS = SIDE + PIECE,
        ALONG = LEN + PIECE
    };
    enum { SIZE = SIDE * ALONG > LEN *ACROSS ? SIDE *ALONG : LEN *ACROSS };
    act left[SIZE];          /* [SIDE][ALONG], or [LEN][ACROSS] when it lies across the sum */
    act right[LEN * ACROSS]; /* [LEN][ACROSS] */
};

/* A matrix in memory that a tile is cut from. */
template <typename act> struct matrix {
    const act *p;
    int ld, cols;
    bool whole; /* rows are copied in pieces */
};
template <typename act>
__device__ static inline matrix<act> matrix_of(const void *p, int ld, int cols)
{
    return {(const act *)p, ld, cols, in_pieces<act>(p, ld, cols)};
}

/* Columns [col, col + COLS) of rows [row, row + ROWS) by one warp; zeros beyond n_rows rows. */
template <int ROWS, int COLS, typename act>
__device__ static inline void fill(act *to, const matrix<act> &m, int row, int n_rows, int col)
{
    enum { PIECE = stage<act>::PIECE, A_ROW = COLS / PIECE, EACH = ROWS * A_ROW / TB_WARP };
    const act *from = m.p + (size_t)row * (size_t)m.ld + col;
    int n_cols = m.cols - col, r = lane_id() / A_ROW, c = lane_id() % A_ROW * PIECE;
    to += r * (COLS + PIECE) + c;
    from += r * m.ld + c;
    if (m.whole) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int down = i * (TB_WARP / A_ROW);
            bool in = r + down < n_rows && c < n_cols;
            copy16_async(to + down * (COLS + PIECE), in ? from + down * m.ld : m.p, !in);
        }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < EACH; i++) {
        int down = i * (TB_WARP / A_ROW);
        for (int e = 0; e < PIECE; e++)
            if (r + down < n_rows && c + e < n_cols)
                to[down * (COLS + PIECE) + e] = from[down * m.ld + e];
            else
                store_act(to + down * (COLS + PIECE) + e, 0);
    }
}

/* d += left right of a chunk. across: the left side lies across the sum too. */
template <bool across>
__device__ static inline void mac_stage(float (*d)[4][4], const stage<bf16> &s)
{
    typedef stage<bf16> st;
    int lane = lane_id(), r = lane % 8, hi = lane / 8 % 2 * 8, far = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < st::LEN; k += 16) {
        uint32_t b[2][4];
        for (int n = 0; n < 2; n++)
            ldmatrix_x4_trans(b[n], s.right + (k + hi + r) * st::ACROSS + 16 * n + far);
        for (int m = 0; m < 2; m++) {
            uint32_t a[4];
            if (across)
                ldmatrix_x4_trans(a, s.left + (k + far + r) * st::ACROSS + 16 * m + hi);
            else
                ldmatrix_x4(a, s.left + (16 * m + hi + r) * st::ALONG + k + far);
            for (int n = 0; n < 4; n++)
                mma_bf16(d[m][n], a, b[n / 2] + n % 2 * 2);
        }
    }
}
template <bool across>
__device__ static inline void mac_stage(float (*d)[4][4], const stage<float> &s)
{
    typedef stage<float> st;
    int lane = lane_id();
    for (int k = 0; k < st::LEN; k++)
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = 16 * m + row_of(lane, i);
                float a = s.left[across ? k * st::ACROSS + row : row * st::ALONG + k];
#pragma unroll
                for (int n = 0; n < 4; n++)
                    d[m][n][i] =
                        fmaf(a, s.right[k * st::ACROSS + 8 * n + col_of(lane, i)], d[m][n][i]);
            }
}

/* d = rows of `left` times columns [col, col + SIDE) of `right`, over chunks k, k + step, ... below
 * end. */
template <int N, typename act>
__device__ static inline void stream(float (*d)[4][4], stage<act> *ring, const matrix<act> &left,
                                     int n_rows, const matrix<act> &right, int col, int k, int step,
                                     int end)
{
    const int LEN = stage<act>::LEN;
    int ahead = k;
    auto fetch = [&](stage<act> *s) {
        if (ahead < end) {
            fill<SIDE, LEN>(s->left, left, 0, n_rows, ahead);
            fill<LEN, SIDE>(s->right, right, ahead, end - ahead, col);
        }
        ahead += step;
        copy_async_commit();
    };
    for (int i = 0; i < N - 1; i++)
        fetch(ring + i);
    for (int i = 0; k < end; k += step, i++) {
        copy_async_wait<N - 2>();
        __syncwarp();
        fetch(ring + (i + N - 1) % N);
        mac_stage<false>(d, ring[i % N]);
    }
}

/* What a block sums of n_out. */
__host__ __device__ static inline int du_part(int n_out)
{
    return DU_PART * div_up(n_out, DU_PART * DU_PARTS);
}

/* du = scale dy B: a block makes SIDE columns of a tile, or of its part of the sum. parts: NULL, or
 * where the sums of parts go, [tile][part][SIDE][columns]. */
template <typename act>
__global__ __launch_bounds__(DU_WARPS *TB_WARP) static void k_du(const struct tile *tiles,
                                                                 float *parts)
{
    const int LEN = stage<act>::LEN;
    TB_DYN_SHARED(stage<act>, shared);
    struct tile t = tiles[blockIdx.y];
    int first = (int)blockIdx.x * SIDE, k = (int)blockIdx.z * du_part(t.width),
        end = min(k + du_part(t.width), t.width);
    if (first >= t.rank) return;
    float d[2][4][4] = {};
    stream<DU_STAGES>(d, shared + warp_id() * DU_STAGES, matrix_of<act>(t.in, t.ld_in, t.width),
                      t.n, matrix_of<act>(t.w, t.rank, t.rank), first, k + warp_id() * LEN,
                      DU_WARPS * LEN, end);
    __syncthreads(); /* the rings are free */
    size_t corner =
        (((size_t)blockIdx.y * gridDim.z + blockIdx.z) * SIDE * gridDim.x + blockIdx.x) * SIDE;
    sum_warps<2, 4>((float *)shared, d, [&](int row, int col, float s) {
        if (row >= t.n || first + col >= t.rank) return;
        if (parts)
            parts[corner + (size_t)row * gridDim.x * SIDE + (size_t)col] = s;
        else
            store_act((act *)t.out + (size_t)row * (size_t)t.ld_out + first + col, t.scale * s);
    });
}

/* Adds the parts of a tile in order. */
template <typename act>
__global__ static void k_du_parts(const struct tile *tiles, const float *parts, int n_parts, int ld)
{
    struct tile t = tiles[blockIdx.x];
    parts += (size_t)blockIdx.x * (size_t)n_parts * SIDE * (size_t)ld;
    for (int i = (int)threadIdx.x; i < t.n * t.rank; i += (int)blockDim.x) {
        int row = i / t.rank, col = i % t.rank;
        const float *p = parts + (size_t)row * (size_t)ld + col;
        float s = *p;
        for (int k = 1; k < n_parts; k++)
            s += p[(size_t)k * SIDE * (size_t)ld];
        store_act((act *)t.out + (size_t)row * (size_t)t.ld_out + col, t.scale * s);
    }
}

/* dx += du A: each warp adds to SIDE columns of a tile. */
template <typename act>
__global__ __launch_bounds__(DX_WARPS *TB_WARP, 4) static void k_dx(const struct tile *tiles)
{
    TB_DYN_SHARED(stage<act>, shared);
    struct tile t = tiles[blockIdx.y];
    int first = ((int)blockIdx.x * DX_WARPS + warp_id()) * SIDE;
    if (first >= t.width) return;
    addend<2, 4> dx;
    dx.load((float *)t.out + first, t.ld_out, t.n, t.width - first);
    float d[2][4][4] = {};
    stream<DX_STAGES>(d, shared + warp_id() * DX_STAGES, matrix_of<act>(t.in, t.ld_in, t.rank), t.n,
                      matrix_of<act>(t.w, t.width, t.width), first, 0, stage<act>::LEN, t.rank);
    dx.add(d, 1);
    dx.store();
}

/* ---- gradients */

struct grad_span {
    int row, n;
    int next; /* span of the same target, or -1 */
    float scale;
};
struct grad_target {
    float *g;
    int rank;
    int first; /* span */
};

/* gb += scale dy^T u (up), or ga += du^T x: a warp owns a tile of a target. left is dy or du, right
 * u or x; width is n_out or n_in. */
template <typename act>
__global__ __launch_bounds__(TB_WARP, 5) static void k_grad(const struct grad_target *targets,
                                                            const struct grad_span *spans,
                                                            const void *left, int ld_left,
                                                            const void *right, int ld_right,
                                                            int width, bool up)
{
    const int LEN = stage<act>::LEN;
    TB_DYN_SHARED(stage<act>, ring);
    struct grad_target t = targets[blockIdx.z];
    int wide = (int)blockIdx.x * SIDE, narrow = (int)blockIdx.y * SIDE;
    if (narrow >= t.rank) return;
    int rows = up ? width : t.rank, row = up ? wide : narrow;
    int cols = up ? t.rank : width, col = up ? narrow : wide;
    addend<2, 4> g;
    g.load(t.g + (size_t)row * (size_t)cols + col, cols, rows - row, cols - col);
    matrix<act> l = matrix_of<act>(left, ld_left, rows), r = matrix_of<act>(right, ld_right, cols);
    int ahead = t.first, from = 0, slot = 0; /* what is fetched next; the chunk at work */
    auto fetch = [&](stage<act> *s) {
        if (ahead >= 0) {
            struct grad_span a = spans[ahead];
            fill<LEN, SIDE>(s->left, l, a.row + from, a.n - from, row);
            fill<LEN, SIDE>(s->right, r, a.row + from, a.n - from, col);
            from += LEN;
            if (from >= a.n) {
                ahead = a.next;
                from = 0;
            }
        }
        copy_async_commit();
    };
    for (int i = 0; i < GRAD_STAGES - 1; i++)
        fetch(ring + i);
    for (int s = t.first; s >= 0; s = spans[s].next) {
        int n = spans[s].n;
        addend<2, 4> sum = {};
        for (int block = 0; block < n; block += GRAD_ROWS) {
            float d[2][4][4] = {};
            for (int k = block; k < min(n, block + GRAD_ROWS); k += LEN) {
                copy_async_wait<GRAD_STAGES - 2>();
                __syncwarp();
                fetch(ring + (slot + GRAD_STAGES - 1) % GRAD_STAGES);
                mac_stage<true>(d, ring[slot]);
                slot = (slot + 1) % GRAD_STAGES;
            }
            sum.add(d, 1);
        }
        g.add(sum.v, spans[s].scale);
    }
    g.store();
}

/* ---- tiles of a call */

struct batch {
    struct tb_cuda *c;
    void (*launch)(const struct batch *b, const struct tile *tiles);
    int tile_rows, max_tiles;
    int rank, width; /* the largest */
    int n;
    struct tile tiles[TILES];
};

static void batch_init(struct batch *b, struct tb_backend *be, int tile_rows,
                       void (*launch)(const struct batch *b, const struct tile *tiles))
{
    b->c = tb_cuda(be);
    b->launch = launch;
    b->tile_rows = tile_rows;
    b->max_tiles = TILES;
    b->rank = b->width = b->n = 0;
}

static void batch_run(struct batch *b)
{
    size_t bytes = (size_t)b->n * sizeof(b->tiles[0]);
    const struct tile *tiles =
        b->n ? (const struct tile *)tb_cuda_stage(b->c, b->tiles, bytes) : NULL;
    if (tiles) b->launch(b, tiles);
    b->n = 0;
}

/* One side of a call: rows of a batch. */
struct rows {
    const void *p;
    int ld;
    size_t size; /* of an element */
};
static const void *row_at(const struct rows *r, int row)
{
    return (const char *)r->p + (size_t)row * (size_t)r->ld * r->size;
}

static int max_rank(const struct tb_lora_span *s, int n_spans)
{
    int rank = 0;
    for (int i = 0; i < n_spans; i++)
        rank = s[i].mat->rank > rank ? s[i].mat->rank : rank;
    return rank;
}

/* Cuts spans into tiles; neighbouring spans of one module share them. */
static void batch_add(struct batch *b, const struct tb_lora_span *s, int n_spans, bool with_b,
                      struct rows in, struct rows out, int width)
{
    int rank = max_rank(s, n_spans);
    b->rank = rank > b->rank ? rank : b->rank;
    b->width = width > b->width ? width : b->width;
    const struct tb_lora_mat *mat = NULL; /* the last tile's, and its end */
    int end = 0;
    for (int i = 0; i < n_spans; i++) {
        const struct tb_lora_mat *m = s[i].mat;
        for (int row = s[i].row, left = s[i].n; left > 0;) {
            struct tile *t = b->n ? b->tiles + b->n - 1 : NULL;
            int n, room = t && m == mat && row == end ? b->tile_rows - t->n : 0;
            if (room > 0) {
                n = left < room ? left : room;
                t->n += n;
            } else {
                if (b->n == b->max_tiles) batch_run(b);
                n = left < b->tile_rows ? left : b->tile_rows;
                t = b->tiles + b->n++;
                t->w = with_b ? m->b : m->a;
                t->in = row_at(&in, row);
                t->out = (void *)row_at(&out, row);
                t->ld_in = in.ld;
                t->ld_out = out.ld;
                t->n = n;
                t->rank = m->rank;
                t->width = width;
                t->scale = m->scale;
            }
            mat = m;
            row += n;
            left -= n;
            end = row;
        }
    }
}

/* Enough full tiles of 32 rows to fill the device; else smaller ones, which are more. */
static int tile_rows(struct tb_backend *be, const struct tb_lora_term *terms, int n_terms)
{
    for (int i = 0; i < n_terms; i++) {
        long rows = 0, n_spans = terms[i].n_spans;
        for (int j = 0; j < n_spans; j++)
            rows += terms[i].spans[j].n;
        if (rows >= 32L * tb_cuda(be)->n_sm / 4 && rows >= 16L * n_spans) return 32;
    }
    return 16;
}

static struct rows acts(const struct tb_backend *be, const void *p, int ld)
{
    return {p, ld, tb_dtype_size(be->act)};
}
static struct rows floats(const float *p, int ld)
{
    return {p, ld, sizeof(float)};
}

/* ---- the table */

static void launch_down(const struct batch *b, const struct tile *tiles)
{
    size_t tile_bytes = DOWN_WARPS * 16 * 8 * sizeof(float);
    unsigned n = (unsigned)b->n;
    TB_ACT(&b->c->be, act, {
        if (b->tile_rows == 32) {
            TB_ALLOW_SHARED(b->c, (k_down<act, 2, 4>), 8 * tile_bytes);
            TB_LAUNCH(b->c, (k_down<act, 2, 4>), dim3((unsigned)div_up(b->rank, 32), n),
                      DOWN_WARPS * TB_WARP, 8 * tile_bytes, tiles);
        } else {
            TB_LAUNCH(b->c, (k_down<act, 1, 1>), dim3((unsigned)div_up(b->rank, 8), n),
                      DOWN_WARPS * TB_WARP, tile_bytes, tiles);
        }
    });
}

/* All terms of a product in one launch, as in up_terms. */
static void lora_down(struct tb_backend *be, const struct tb_lora_term *terms, int n_terms,
                      const void *x, int ldx, int n_in)
{
    struct batch b;
    batch_init(&b, be, tile_rows(be, terms, n_terms), launch_down);
    for (int i = 0; i < n_terms; i++) {
        const struct tb_lora_term *t = terms + i;
        batch_add(&b, t->spans, t->n_spans, false, acts(be, x, ldx), acts(be, t->u, t->ldu), n_in);
    }
    batch_run(&b);
}

static void launch_up(const struct batch *b, const struct tile *tiles)
{
    dim3 grid((unsigned)div_up(b->width, UP_WARPS * 32), (unsigned)b->n);
    TB_ACT(&b->c->be, act, {
        if (b->tile_rows == 32)
            TB_LAUNCH(b->c, (k_up<act, 2, 4>), grid, UP_WARPS * TB_WARP, 0, tiles);
        else
            TB_LAUNCH(b->c, (k_up<act, 1, 4>), grid, UP_WARPS * TB_WARP, 0, tiles);
    });
}

/* All terms of a product in one launch. */
static void up_terms(struct tb_backend *be, const struct tb_lora_term *terms, int n_terms, float *y,
                     int ldy)
{
    struct batch b;
    batch_init(&b, be, tile_rows(be, terms, n_terms), launch_up);
    for (int i = 0; i < n_terms; i++) {
        const struct tb_lora_term *t = terms + i;
        batch_add(&b, t->spans, t->n_spans, true, acts(be, t->u, t->ldu), floats(y + t->col, ldy),
                  t->n_out);
    }
    batch_run(&b);
}

static void lora_up(struct tb_backend *be, const struct tb_lora_span *s, int n_spans, const void *u,
                    int ldu, float *y, int ldy, int n_out)
{
    const struct tb_lora_term term = {s, n_spans, (void *)(uintptr_t)u, ldu, 0, n_out};
    up_terms(be, &term, 1, y, ldy);
}

static void matmul_lora(struct tb_backend *be, const struct tb_weight *w, const void *x, int T,
                        const float *bias, float *y, int ldy, bool accumulate,
                        const struct tb_lora_term *terms, int n_terms)
{
    be->ops->matmul(be, w, x, T, bias, y, ldy, accumulate);
    up_terms(be, terms, n_terms, y, ldy);
}

static void launch_du(const struct batch *b, const struct tile *tiles)
{
    struct tb_cuda *c = b->c;
    int n_parts = div_up(b->width, du_part(b->width)), cols = div_up(b->rank, SIDE);
    float *parts = n_parts > 1 ? (float *)c->scratch : NULL;
    dim3 grid((unsigned)cols, (unsigned)b->n, (unsigned)n_parts);
    TB_ACT(&c->be, act, {
        size_t shared = DU_WARPS * DU_STAGES * sizeof(stage<act>);
        TB_ALLOW_SHARED(c, k_du<act>, shared);
        TB_LAUNCH(c, k_du<act>, grid, DU_WARPS * TB_WARP, shared, tiles, parts);
        if (parts)
            TB_LAUNCH(c, k_du_parts<act>, (unsigned)b->n, 256, 0, tiles, parts, n_parts,
                      cols * SIDE);
    });
}

static void launch_dx(const struct batch *b, const struct tile *tiles)
{
    dim3 grid((unsigned)div_up(b->width, DX_WARPS * SIDE), (unsigned)b->n);
    TB_ACT(&b->c->be, act, {
        TB_LAUNCH(b->c, k_dx<act>, grid, DX_WARPS * TB_WARP,
                  DX_WARPS * DX_STAGES * sizeof(stage<act>), tiles);
    });
}

/* Spans of a launch, listed by target. */
struct gradient {
    struct tb_backend *be;
    const void *left, *right;
    int ld_left, ld_right, width;
    bool up;
    int n_spans, n_targets, rank;
    int last[TILES]; /* span of each target */
    struct grad_target targets[TILES];
    struct grad_span spans[TILES];
};

static void gradient_run(struct gradient *a)
{
    struct tb_cuda *c = tb_cuda(a->be);
    if (!a->n_spans) return;
    size_t target_bytes = (size_t)a->n_targets * sizeof(a->targets[0]),
           span_bytes = (size_t)a->n_spans * sizeof(a->spans[0]);
    const struct grad_target *targets =
        (const struct grad_target *)tb_cuda_stage(c, a->targets, target_bytes);
    const struct grad_span *spans =
        (const struct grad_span *)tb_cuda_stage(c, a->spans, span_bytes);
    dim3 grid((unsigned)div_up(a->width, SIDE), (unsigned)div_up(a->rank, SIDE),
              (unsigned)a->n_targets);
    if (targets && spans)
        TB_ACT(a->be, act, {
            TB_LAUNCH(c, k_grad<act>, grid, TB_WARP, GRAD_STAGES * sizeof(stage<act>), targets,
                      spans, a->left, a->ld_left, a->right, a->ld_right, a->width, a->up);
        });
    a->n_spans = a->n_targets = a->rank = 0;
}

static void gradient_add(struct gradient *a, const struct tb_lora_span *s)
{
    float *g = a->up ? s->gb : s->ga;
    int rank = s->mat->rank, t = a->n_targets - 1;
    if (!g || s->n <= 0) return;
    if (a->n_spans == TILES) {
        gradient_run(a);
        t = -1;
    }
    while (t >= 0 && a->targets[t].g != g)
        t--;
    if (t >= 0) {
        a->spans[a->last[t]].next = a->n_spans;
    } else {
        t = a->n_targets++;
        a->targets[t] = {g, rank, a->n_spans};
        a->rank = rank > a->rank ? rank : a->rank;
    }
    a->last[t] = a->n_spans;
    a->spans[a->n_spans++] = {s->row, s->n, -1, a->up ? s->mat->scale : 1};
}

static void gradients(struct tb_backend *be, const struct tb_lora_span *s, int n_spans, bool up,
                      const void *left, int ld_left, const void *right, int ld_right, int width)
{
    struct gradient a;
    a.be = be;
    a.left = left;
    a.right = right;
    a.ld_left = ld_left;
    a.ld_right = ld_right;
    a.width = width;
    a.up = up;
    a.n_spans = a.n_targets = a.rank = 0;
    for (int i = 0; i < n_spans; i++)
        gradient_add(&a, s + i);
    gradient_run(&a);
}

static void lora_up_bwd(struct tb_backend *be, const struct tb_lora_span *s, int n_spans,
                        const void *dy, int ld_dy, int n_out, const void *u, void *du, int ldu)
{
    struct batch b;
    batch_init(&b, be, SIDE, launch_du);
    if (n_out > DU_PART) {
        size_t ld = (size_t)div_up(max_rank(s, n_spans), SIDE) * SIDE,
               tile_bytes = (size_t)div_up(n_out, du_part(n_out)) * SIDE * ld * sizeof(float),
               room = b.c->scratch_bytes / tile_bytes;
        b.max_tiles = room < TILES ? (int)room : TILES;
    }
    batch_add(&b, s, n_spans, true, acts(be, dy, ld_dy), acts(be, du, ldu), n_out);
    batch_run(&b);
    gradients(be, s, n_spans, true, dy, ld_dy, u, ldu, n_out);
}

static void lora_down_bwd(struct tb_backend *be, const struct tb_lora_span *s, int n_spans,
                          const void *du, int ldu, const void *x, int ldx, int n_in, float *dx,
                          int ld_dx)
{
    if (dx) {
        struct batch b;
        batch_init(&b, be, SIDE, launch_dx);
        batch_add(&b, s, n_spans, false, acts(be, du, ldu), floats(dx, ld_dx), n_in);
        batch_run(&b);
    }
    gradients(be, s, n_spans, false, du, ldu, x, ldx, n_in);
}

void tb_cuda_lora_ops(struct tb_backend_ops *o)
{
    o->matmul_lora = matmul_lora;
    o->lora_down = lora_down;
    o->lora_up = lora_up;
    o->lora_up_bwd = lora_up_bwd;
    o->lora_down_bwd = lora_down_bwd;
}
