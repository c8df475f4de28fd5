// Attention of bf16 by Hopper's own instructions; what it computes is what attention_mma_kernel does.
//
// A block has 128 queries of a head and three warpgroups. One thread of the first asks for tiles: of the queries once, of
// keys and values by turns, two of each in shared memory at a time. The other two have 64 queries each. While the tensor
// cores multiply the weights of one block of keys with its values, a warpgroup turns the next scores into weights; and
// while one warpgroup does that, the other's products are made: their starts take turns.

// 176 keys: as many as 240 registers of a thread hold scores and weights of, beside the sums. Fewer would leave a larger
// part of the time to waiting, and to reading queries from shared memory anew for each block of keys.
constexpr int KEYS = 176, QUERIES = 64, WARPGROUPS = 2, STAGES = 2, THREADS = 128 * (1 + WARPGROUPS);
// Columns of a tile's row of 128 bytes; a tile of D columns is D / 64 such, one behind the other.
constexpr int COLUMNS = 64, ROW = 128;

// In shared memory, behind what makes it begin at a multiple of 1024.
template <int D> struct Shared {
    unsigned char queries[D / COLUMNS][WARPGROUPS * QUERIES * ROW];
    unsigned char keys[STAGES][D / COLUMNS][KEYS * ROW];
    unsigned char values[STAGES][D / COLUMNS][KEYS * ROW];
    TileBarrier queries_full, keys_full[STAGES], keys_empty[STAGES], values_full[STAGES], values_empty[STAGES];
};

// Two values side by side in memory.
template <class T> struct __align__(2 * sizeof(T)) Pair {
    T first, second;
};

// softmax(scale·q·kᵀ)·v: q [queries, heads, D] and the segments' tensors as maps with boxes of 64 columns, one head, and as
// many rows as a tile has; out [queries, heads, D], lse [queries, heads]. `scale` is of scores in base 2. Scores, their
// highest and the weights' sum are f32; the weights are rounded to bf16 for their product with the values, not for their
// sum. One rounding of the output if it is bf16, none if it is f32.
template <int D, class OUT>
__device__ inline void attention_hopper_kernel(const TensorMap* q, SegmentsBy<TensorMap, KEYS> segments, OUT* out,
                                               float* lse, int queries, int heads, float scale) {
    static_assert(D == 128, "as many columns as multiply_registers has");
    DYNAMIC_SHARED(dynamic);
    Shared<D>& shared = *(Shared<D>*)(dynamic + (-shared_address(dynamic) & 1023));
    int warpgroup = threadIdx.x / 128, head = blockIdx.y, first = blockIdx.x * WARPGROUPS * QUERIES;

    if (threadIdx.x == 0) {
        make_barrier(&shared.queries_full, 1);
        for (int i = 0; i < STAGES; i++) {
            make_barrier(&shared.keys_full[i], 1);
            make_barrier(&shared.values_full[i], 1);
            // One thread of every warp that reads.
            make_barrier(&shared.keys_empty[i], 4 * WARPGROUPS);
            make_barrier(&shared.values_empty[i], 4 * WARPGROUPS);
        }
        barriers_made();
    }
    __syncthreads();

    if (warpgroup == 0) {
        fewer_registers<24>();
        if (threadIdx.x > 0) return;
        auto load = [&](unsigned char* to, int bytes, const TensorMap* map, TileBarrier* full, int row) {
            arrive_expecting(full, D / COLUMNS * bytes);
            for (int c = 0; c < D / COLUMNS; c++) load_box(to + c * bytes, map, full, c * COLUMNS, head, row);
        };
        // Blocks of keys and of values that were asked for.
        int keys = 0, values = 0;
        auto load_values = [&](Block of) {
            int stage = values % STAGES;
            wait_for(&shared.values_empty[stage], values / STAGES % 2 ^ 1);
            load(shared.values[stage][0], KEYS * ROW, segments.v(of.segment), &shared.values_full[stage], of.start);
            values += 1;
        };
        Block before = {0, 0, 0};
        for (Block block = segments.first(); block.keys > 0; block = segments.after(block)) {
            if (keys == 0) load(shared.queries[0], WARPGROUPS * QUERIES * ROW, q, &shared.queries_full, first);
            int stage = keys % STAGES;
            wait_for(&shared.keys_empty[stage], keys / STAGES % 2 ^ 1);
            load(shared.keys[stage][0], KEYS * ROW, segments.k(block.segment), &shared.keys_full[stage], block.start);
            keys += 1;
            if (before.keys > 0) load_values(before);
            before = block;
        }
        if (before.keys > 0) load_values(before);
        return;
    }

    more_registers<240>();
    // Of those with queries, from 0.
    warpgroup -= 1;
    int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    u64 q_matrix = matrix_at(shared_address(shared.queries[0]) + warpgroup * QUERIES * ROW, 8 * ROW, 0);
    u64 k_matrix = matrix_at(shared_address(shared.keys[0][0]), 8 * ROW, 0);
    u64 v_matrix = matrix_at(shared_address(shared.values[0][0]), 8 * ROW, KEYS * ROW);

    // Of query 16·warp + 8·h + lane / 4 and channel (or key) 8·n + 2·(lane % 4) + i: sums[4·n + 2·h + i].
    float sums[D / 2] = {}, scores[KEYS / 2], total[2] = {}, highest[2] = {minus_infinity(), minus_infinity()}, shrink[2];
    u32 weights[KEYS / 16][4];

    auto multiply_keys = [&](int stage) {
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            int part = c / (COLUMNS / 16), step = c % (COLUMNS / 16) * 32;
            multiply_tiles<KEYS>(scores, behind(q_matrix, part * WARPGROUPS * QUERIES * ROW + step),
                                 behind(k_matrix, stage * (D / COLUMNS * KEYS * ROW) + part * KEYS * ROW + step), c > 0);
        }
        products_end();
    };
    auto multiply_values = [&](int stage) {
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            multiply_registers<D>(sums, weights[n],
                                  behind(v_matrix, stage * (D / COLUMNS * KEYS * ROW) + n * 16 * ROW), true);
        }
        products_end();
    };
    auto release = [&](TileBarrier* empty) {
        if (lane == 0) arrive(empty);
    };
    // Scores to weights, with the highest score and the sum of weights so far; `shrink` is what became of earlier weights.
    auto soften = [&](int keys) {
        if (keys < KEYS) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                for (int i = 0; i < 2; i++) {
                    if (8 * n + 2 * (lane % 4) + i >= keys) scores[4 * n + i] = scores[4 * n + 2 + i] = minus_infinity();
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float high = highest[h];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) high = fmaxf(high, fmaxf(scores[4 * n + 2 * h], scores[4 * n + 2 * h + 1]));
            high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
            high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
            shrink[h] = exp2_approx((highest[h] - high) * scale);
            highest[h] = high;
            float added = 0.0f, most = high * scale;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                for (int i = 2 * h; i < 2 * h + 2; i++) {
                    float& score = scores[4 * n + i];
                    score = exp2_approx(fmaf(score, scale, -most));
                    added += score;
                }
            }
            total[h] = fmaf(total[h], shrink[h], added);
        }
    };
    // The sums of a product are what a thread holds of the left side of the next.
    auto pack = [&] {
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            for (int i = 0; i < 4; i++) weights[n][i] = pack_bf16(scores[8 * n + 2 * i], scores[8 * n + 2 * i + 1]);
        }
    };

    Block block = segments.first();
    if (block.keys > 0) {
        Block next = segments.after(block);
        wait_for(&shared.queries_full, 0);
        wait_for(&shared.keys_full[0], 0);
        settle(scores);
        products_begin();
        multiply_keys(0);
        products_wait<0>();
        settle(scores);
        release(&shared.keys_empty[0]);
        soften(block.keys);
        pack();

        // The first turn is warpgroup 0's.
        if (warpgroup == 1 && next.keys > 0) pass_turn(1, 2 * 128);
        if (next.keys > 0) wait_for(&shared.keys_full[1], 0);
        // Blocks of keys whose weights are there, less one.
        int done = 0;
        while (next.keys > 0) {
            Block following = segments.after(next);
            int stage = (done + 1) % STAGES, before = done % STAGES;
            wait_turn(1 + warpgroup, 2 * 128);
            settle(scores);
            settle(sums);
            products_begin();
            multiply_keys(stage);
            wait_for(&shared.values_full[before], done / STAGES % 2);
            products_begin();
            multiply_values(before);
            // Nobody waits for what the last turn would pass on.
            if (warpgroup == 0 || following.keys > 0) pass_turn(2 - warpgroup, 2 * 128);

            products_wait<1>();
            settle(scores);
            release(&shared.keys_empty[stage]);
            soften(next.keys);
            // All of that while the values are multiplied. The wait for the next keys is here for that: it is a loop, and
            // the compiler moves no arithmetic to its other side. Without it the exponentials are behind products_wait<0>.
            settle(scores);
            if (following.keys > 0) wait_for(&shared.keys_full[before], (done + 2) / STAGES % 2);

            products_wait<0>();
            settle(sums);
            release(&shared.values_empty[before]);
            // As in attention_mma_kernel: a product with 1 changes nothing.
            if (warp_any(shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    for (int i = 0; i < 4; i++) sums[4 * n + i] *= shrink[i / 2];
                }
            }
            pack();
            next = following;
            done += 1;
        }
        wait_for(&shared.values_full[done % STAGES], done / STAGES % 2);
        settle(sums);
        products_begin();
        multiply_values(done % STAGES);
        products_wait<0>();
        settle(sums);
    }

    i64 pitch = (i64)heads * D;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float all = total[h];
        all += __shfl_xor_sync(0xffffffffu, all, 1);
        all += __shfl_xor_sync(0xffffffffu, all, 2);
        float inverse = all == 0.0f ? 0.0f : 1.0f / all;
        int query = first + warpgroup * QUERIES + 16 * warp + 8 * h + lane / 4;
        if (query >= queries) continue;
        auto* to = (Pair<OUT>*)(out + query * pitch + head * D) + lane % 4;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            to[4 * n] = {from_f32<OUT>(sums[4 * n + 2 * h] * inverse), from_f32<OUT>(sums[4 * n + 2 * h + 1] * inverse)};
        }
        if (lane % 4 == 0) lse[(i64)query * heads + head] = fmaf(highest[h], scale, log2f(all)) * LN_2;
    }
}

#define SEGMENT_MAPS                                                                                               \
    const __grid_constant__ TensorMap k0, const __grid_constant__ TensorMap v0, int n0,                            \
        const __grid_constant__ TensorMap k1, const __grid_constant__ TensorMap v1, int n1,                        \
        const __grid_constant__ TensorMap k2, const __grid_constant__ TensorMap v2, int n2,                        \
        const __grid_constant__ TensorMap k3, const __grid_constant__ TensorMap v3, int n3

// By the type of the output.
#define ATTENTION_HOPPER(NAME, OUT)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                       \
        attention_hopper_128_##NAME(const __grid_constant__ TensorMap q, SEGMENT_MAPS, OUT* out, float* lse,       \
                                    int queries, int heads, float scale) {                                         \
        attention_hopper_kernel<128, OUT>(&q, {&k0, &v0, n0, &k1, &v1, n1, &k2, &v2, n2, &k3, &v3, n3}, out, lse,  \
                                          queries, heads, scale * LOG2_E);                                         \
    }
ATTENTION_HOPPER(bf16, bf16)
ATTENTION_HOPPER(f32, float)
