// Attention over blocks of keys, with an online softmax: nothing of size queries × keys is stored.
//
// What a query gets depends on its own values, the keys and where the segments end: not on the other queries, nor on the
// place it has among them. Without any key it gets 0 and a log-sum-exp of -∞.

// Keys of a block.
constexpr int KEYS = 64;

template <class T> using Segments = SegmentsBy<T, KEYS>;

// ---- any head size, in f32 ----

// A block of 256 threads has 64 queries of a head and 128 channels of its output. Thread (row, column) of 16 × 16 has
// queries 4·row .. 4·row + 4, the scores of every 16th key from `column` on, and channels 4·column .. + 4 and 64 +
// 4·column .. + 4.
constexpr int PLAIN_QUERIES = 64, PLAIN_CHANNELS = 128, PLAIN_THREADS = 256;
// Channels of queries and keys, and values of keys, that are in shared memory at a time.
constexpr int STEP = 32;
// Of rows in shared memory: sixteen bytes more than whole lines, so that rows begin in different banks.
constexpr int STEP_PITCH = STEP + 4, WEIGHTS_PITCH = KEYS + 4;

struct __align__(16) Four {
    float of[4];
};

// `rows` × `columns` values at `from`, as far as there are so many, into a tile; the rest of it is 0.
template <int ROWS, int COLUMNS, int PITCH, class T>
__device__ inline void load_f32(float* tile, const T* from, i64 pitch, int rows, int columns) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * COLUMNS; i += PLAIN_THREADS) {
        int row = i / COLUMNS, column = i % COLUMNS;
        tile[row * PITCH + column] = row < rows && column < columns ? to_f32(from[row * pitch + column]) : 0.0f;
    }
}

// Over the 16 threads of a row; all of them get the same bits.
__device__ inline float row_max(float x) {
    for (int offset = 8; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}
__device__ inline float row_sum(float x) {
    for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// softmax(scale·q·kᵀ + bias)·v: q [queries, heads, d], bias [heads, queries, keys] of the one segment or null, out as
// q, lse [queries, heads]. All in f32: scores by one rounded multiply-add after another; values weighted within a block
// of keys first, then added to those of the blocks before. One rounding of the output to its type.
template <class T>
__device__ void attention_kernel(const T* q, Segments<T> segments, const float* bias, T* out, float* lse, int queries,
                                 int heads, int d, float scale) {
    __align__(16) __shared__ float stage[2 * 64 * STEP_PITCH];
    __align__(16) __shared__ float weights[PLAIN_QUERIES * WEIGHTS_PITCH];
    static_assert(STEP * PLAIN_CHANNELS <= 2 * 64 * STEP_PITCH, "values of keys where queries and keys were");
    float *some_q = stage, *some_k = stage + 64 * STEP_PITCH, *some_v = stage;

    int row = threadIdx.x / 16, column = threadIdx.x % 16, head = blockIdx.y;
    int first = blockIdx.x * PLAIN_QUERIES, channel = blockIdx.z * PLAIN_CHANNELS, offset = head * d;
    i64 pitch = (i64)heads * d;
    q += first * pitch + offset;

    float sums[4][8] = {}, total[4] = {}, highest[4];
    for (float& one : highest) one = minus_infinity();

    for (Block block = segments.first(); block.keys > 0; block = segments.after(block)) {
        const T* keys = segments.k(block.segment) + block.start * pitch + offset;
        float scores[4][4] = {};
        for (int c = 0; c < d; c += STEP) {
            __syncthreads();
            load_f32<PLAIN_QUERIES, STEP, STEP_PITCH>(some_q, q + c, pitch, queries - first, d - c);
            load_f32<KEYS, STEP, STEP_PITCH>(some_k, keys + c, pitch, block.keys, d - c);
            __syncthreads();
#pragma unroll
            for (int x = 0; x < STEP; x += 4) {
                Four a[4], b[4];
                for (int i = 0; i < 4; i++) a[i] = *(const Four*)&some_q[(4 * row + i) * STEP_PITCH + x];
                for (int j = 0; j < 4; j++) b[j] = *(const Four*)&some_k[(column + 16 * j) * STEP_PITCH + x];
                for (int e = 0; e < 4; e++)
                    for (int i = 0; i < 4; i++)
                        for (int j = 0; j < 4; j++) scores[i][j] = fmaf(a[i].of[e], b[j].of[e], scores[i][j]);
            }
        }

        float shrink[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int query = first + 4 * row + i;
            float high = highest[i], added = 0.0f;
            for (int j = 0; j < 4; j++) {
                int key = column + 16 * j;
                float score = scores[i][j] * scale;
                if (bias && query < queries && key < block.keys) {
                    score += bias[((i64)head * queries + query) * segments.n0 + block.start + key];
                }
                scores[i][j] = score = key < block.keys ? score : minus_infinity();
                high = fmaxf(high, score);
            }
            high = row_max(high);
            shrink[i] = expf(highest[i] - high);
            highest[i] = high;
            for (int j = 0; j < 4; j++) {
                float weight = expf(scores[i][j] - high);
                weights[(4 * row + i) * WEIGHTS_PITCH + column + 16 * j] = weight;
                added += weight;
            }
            total[i] = fmaf(total[i], shrink[i], added);
        }

        const T* values = segments.v(block.segment) + block.start * pitch + offset + channel;
        float more[4][8] = {};
        for (int key = 0; key < KEYS; key += STEP) {
            __syncthreads();
            load_f32<STEP, PLAIN_CHANNELS, PLAIN_CHANNELS>(some_v, values + key * pitch, pitch, block.keys - key,
                                                           d - channel);
            __syncthreads();
#pragma unroll 2
            for (int x = 0; x < STEP; x += 4) {
                Four a[4];
                for (int i = 0; i < 4; i++) a[i] = *(const Four*)&weights[(4 * row + i) * WEIGHTS_PITCH + key + x];
                for (int e = 0; e < 4; e++) {
                    const float* from = &some_v[(x + e) * PLAIN_CHANNELS + 4 * column];
                    Four low = *(const Four*)from, high = *(const Four*)(from + 64);
                    for (int i = 0; i < 4; i++) {
                        for (int j = 0; j < 4; j++) {
                            more[i][j] = fmaf(a[i].of[e], low.of[j], more[i][j]);
                            more[i][4 + j] = fmaf(a[i].of[e], high.of[j], more[i][4 + j]);
                        }
                    }
                }
            }
        }
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 8; j++) sums[i][j] = fmaf(sums[i][j], shrink[i], more[i][j]);
    }

#pragma unroll
    for (int i = 0; i < 4; i++) {
        int query = first + 4 * row + i;
        float all = row_sum(total[i]), inverse = all == 0.0f ? 0.0f : 1.0f / all;
        if (query >= queries) continue;
        for (int j = 0; j < 8; j++) {
            int at = channel + j / 4 * 64 + 4 * column + j % 4;
            if (at < d) out[query * pitch + offset + at] = from_f32<T>(sums[i][j] * inverse);
        }
        if (column == 0 && channel == 0) lse[(i64)query * heads + head] = highest[i] + logf(all);
    }
}

FOR_BOTH(attention,
         __launch_bounds__(256, 2)(const T* q, SEGMENT_PARAMETERS(T), const float* bias, T* out, float* lse,
                                   int queries, int heads, int d, float scale),
         (q, SEGMENT_ARGUMENTS, bias, out, lse, queries, heads, d, scale))

// ---- bf16 on tensor cores ----

// A block of 4 warps has 128 queries of a head, a warp 32: every fragment of keys and values that a warp reads serves
// two products, without which reading them would be what takes the time. Queries stay in shared memory; behind them a
// ring of three tiles takes the keys and the values of the blocks by turns, k0 v0 k1 v1 …, two of them under way while
// one is worked on. A barrier before each makes it visible and says that the one before has no more readers.
constexpr int MMA_QUERIES = 128, MMA_THREADS = 128, RING = 3;

__device__ inline void store_pair(bf16* to, float low, float high) { *(u32*)to = pack_bf16(low, high); }
struct __align__(8) Two {
    float of[2];
};
__device__ inline void store_pair(float* to, float low, float high) { *(Two*)to = {low, high}; }

// Starts the copying of ROWS rows of D values, of which there are `rows`; the rest of the tile is 0.
template <int D, int ROWS>
__device__ inline void load_tile(unsigned char* tile, const bf16* from, i64 pitch, int rows) {
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / MMA_THREADS; i++) {
        int at = i * MMA_THREADS + threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
        cp_async_16(tile + swizzled<CHUNKS>(row, chunk), from + row * pitch + 8 * chunk, row < rows);
    }
}

// As attention_kernel without a bias, D values a head, and all rows 16 bytes aligned. Products of bf16 values are
// summed in f32 by the tensor cores. Scores, their highest and the weights' sum are f32; the weights are rounded to
// bf16 for their product with the values, not for their sum. One rounding of the output if it is bf16, none if it is f32.
template <int D, class OUT>
__device__ inline void attention_mma_kernel(const bf16* q, Segments<bf16> segments, OUT* out, float* lse, int queries,
                                            int heads, float scale) {
    constexpr int ROW = 2 * D, TILE = KEYS * ROW, CHUNKS = D / 8;
    DYNAMIC_SHARED(shared);
    unsigned char *q_tile = shared, *ring = shared + MMA_QUERIES * ROW;

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, offset = head * D;
    int first = blockIdx.x * MMA_QUERIES;
    i64 pitch = (i64)heads * D;
    // Where this lane's row for ldmatrix is in the first 16 × 16 of a tile. It is 16·i rows on with i·16·ROW more, and
    // 16·i columns on with the bits of 32·i flipped: which half of 16 columns a lane has is the bit below them.
    int q_at = swizzled<CHUNKS>(32 * warp + lane % 16, lane / 16);
    int k_at = swizzled<CHUNKS>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    int v_at = swizzled<CHUNKS>(lane % 16, lane / 16);

    // Of query 16·m + 8·h + lane / 4 of the warp and channel 8·n + 2·(lane % 4) + i: sums[m][n][2·h + i].
    float sums[2][D / 8][4] = {}, total[2][2] = {}, highest[2][2];
    for (auto& m : highest)
        for (float& one : m) one = minus_infinity();

    auto load_keys = [&](int at, Block of) {
        load_tile<D, KEYS>(ring + at, segments.k(of.segment) + of.start * pitch + offset, pitch, of.keys);
    };
    auto load_values = [&](int at, Block of) {
        load_tile<D, KEYS>(ring + at, segments.v(of.segment) + of.start * pitch + offset, pitch, of.keys);
    };
    Block block = segments.first();
    if (block.keys > 0) {
        load_tile<D, MMA_QUERIES>(q_tile, q + first * pitch + offset, pitch, queries - first);
        load_keys(0, block);
        cp_async_commit();
        load_values(TILE, block);
        cp_async_commit();
    }
    // Of the tile that is worked on, and of the one before it.
    int at = 0, free = (RING - 1) * TILE;
    auto turn = [&] {
        free = at;
        at = at == (RING - 1) * TILE ? 0 : at + TILE;
    };
    while (block.keys > 0) {
        Block next = segments.after(block);

        cp_async_wait<1>();
        __syncthreads();
        if (next.keys > 0) load_keys(free, next);
        // An empty group too, so that the last but one is always the tile before.
        cp_async_commit();
        float scores[2][KEYS / 8][4] = {};
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            u32 a[2][4];
            for (int m = 0; m < 2; m++) ldmatrix_x4(a[m], q_tile + (q_at ^ 32 * c) + m * 16 * ROW);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                u32 b[4];
                ldmatrix_x4(b, ring + at + (k_at ^ 32 * c) + n * 16 * ROW);
                for (int m = 0; m < 2; m++) {
                    mma_bf16(scores[m][2 * n], a[m], b[0], b[1]);
                    mma_bf16(scores[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        turn();

        if (block.keys < KEYS) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                for (int i = 0; i < 2; i++) {
                    if (8 * n + 2 * (lane % 4) + i < block.keys) continue;
                    for (int m = 0; m < 2; m++) scores[m][n][i] = scores[m][n][2 + i] = minus_infinity();
                }
            }
        }
        float shrink[2][2];
        bool higher = false;
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float high = highest[m][h];
                for (auto& score : scores[m]) high = fmaxf(high, fmaxf(score[2 * h], score[2 * h + 1]));
                high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
                high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
                shrink[m][h] = exp2_approx((highest[m][h] - high) * scale);
                highest[m][h] = high;
                higher = higher || shrink[m][h] != 1.0f;
                float added = 0.0f, most = high * scale;
                for (auto& score : scores[m]) {
                    for (int i = 2 * h; i < 2 * h + 2; i++) {
                        score[i] = exp2_approx(fmaf(score[i], scale, -most));
                        added += score[i];
                    }
                }
                total[m][h] = fmaf(total[m][h], shrink[m][h], added);
            }
        }
        // After a few blocks hardly any query finds a higher score, and a product with 1 changes nothing.
        if (warp_any(higher)) {
#pragma unroll
            for (int m = 0; m < 2; m++)
                for (auto& sum : sums[m])
                    for (int i = 0; i < 4; i++) sum[i] *= shrink[m][i / 2];
        }

        cp_async_wait<1>();
        __syncthreads();
        if (next.keys > 0) load_values(free, next);
        cp_async_commit();
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            // The accumulators of two products are what the lane holds of the left side of the next.
            u32 a[2][4];
            for (int m = 0; m < 2; m++) {
                for (int i = 0; i < 4; i++) {
                    auto& score = scores[m][2 * n + i / 2];
                    a[m][i] = pack_bf16(score[i % 2 * 2], score[i % 2 * 2 + 1]);
                }
            }
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                u32 b[4];
                ldmatrix_x4_trans(b, ring + at + (v_at ^ 32 * c) + n * 16 * ROW);
                for (int m = 0; m < 2; m++) {
                    mma_bf16(sums[m][2 * c], a[m], b[0], b[1]);
                    mma_bf16(sums[m][2 * c + 1], a[m], b[2], b[3]);
                }
            }
        }
        turn();
        block = next;
    }

#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float all = total[m][h];
            all += __shfl_xor_sync(0xffffffffu, all, 1);
            all += __shfl_xor_sync(0xffffffffu, all, 2);
            float inverse = all == 0.0f ? 0.0f : 1.0f / all;
            int query = first + 32 * warp + 16 * m + 8 * h + lane / 4;
            if (query >= queries) continue;
            OUT* to = out + query * pitch + offset + lane % 4 * 2;
            for (int n = 0; n < D / 8; n++) {
                store_pair(to + 8 * n, sums[m][n][2 * h] * inverse, sums[m][n][2 * h + 1] * inverse);
            }
            if (lane % 4 == 0) lse[(i64)query * heads + head] = fmaf(highest[m][h], scale, log2f(all)) * LN_2;
        }
    }
}

// By the type of the output.
#define ATTENTION_MMA(D, NAME, OUT)                                                                             \
    extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2)                                                \
        attention_mma_##D##_##NAME(const bf16* q, SEGMENT_PARAMETERS(bf16), OUT* out, float* lse, int queries,  \
                                   int heads, float scale) {                                                    \
        attention_mma_kernel<D>(q, SEGMENT_ARGUMENTS, out, lse, queries, heads, scale * LOG2_E);                \
    }
ATTENTION_MMA(32, bf16, bf16)
ATTENTION_MMA(32, f32, float)
ATTENTION_MMA(64, bf16, bf16)
ATTENTION_MMA(64, f32, float)
ATTENTION_MMA(128, bf16, bf16)
ATTENTION_MMA(128, f32, float)
