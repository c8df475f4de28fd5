// Matrix products and causal convolutions: out = x · weightᵀ + bias, with weight [columns, depth] and out [rows,
// columns]. What differs is where the values of a row of x lie.
//
// A block computes TILE × TILE values of out. It walks along the depth in steps of 64 bytes of each row of both, STAGES
// of which are in shared memory or on their way to it. Sums are in f32, along the depth from its start to its end, for
// every row in the same order, however many rows there are; the bias is added to the whole sum, and this is rounded
// once.

constexpr int TILE = 128;
constexpr int STAGES = 3;
// 16 bytes each, of a row in a step.
constexpr int CHUNKS = 4;
// Threads of a block. Warps of the tensor cores have larger parts of a tile: of what they read they make more products.
template <class T> constexpr int THREADS = 256;
template <> constexpr int THREADS<bf16> = 128;
// Blocks that run at the same time share rows of x and of the weight in the second-level cache: so many tiles of rows
// are multiplied with all columns before the next are.
constexpr int GROUP = 8;

struct alignas(128) Stage {
    unsigned char x[TILE * CHUNKS * 16];
    unsigned char weight[TILE * CHUNKS * 16];
};

// ---- where rows of x lie ----

// The rows of a matrix [rows, width].
template <class T> struct MatrixRows {
    static constexpr int TAPS = 1;
    const T* x;
    int width;

    typedef const T* Row;
    __device__ Row row(int index) const { return x + (i64)index * width; }
    __device__ const T* tap(Row row, int) const { return row; }
};

// The pixels that each pixel of a volume [frames, height, width, channels] has around it and before it: 27 taps in the
// order (t, h, w), `width` of the row being the channels of a tap. Beyond an edge of a frame the nearest pixel is
// taken. Before the first frame are two more, `past` and what is `past_step` values behind it.
template <class T> struct Neighbours {
    static constexpr int TAPS = 27;
    const T *x, *past;
    i64 past_step;
    int width, frame_height, frame_width;

    struct Row {
        int frame, row, col;
    };
    __device__ Row row(int index) const {
        int line = index / frame_width;
        return {line / frame_height, line % frame_height, index % frame_width};
    }
    __device__ const T* tap(Row at, int tap) const {
        int frame = at.frame + tap / 9;
        int row = min(max(at.row + tap / 3 % 3 - 1, 0), frame_height - 1);
        int col = min(max(at.col + tap % 3 - 1, 0), frame_width - 1);
        i64 pixels = (i64)frame_height * frame_width;
        const T* start = frame < 2 ? past + frame * past_step : x + (frame - 2) * pixels * width;
        return start + ((i64)row * frame_width + col) * width;
    }
};

// ---- reading ----

// A thread's share of what a block reads: one chunk of READS rows of x and of the weight in each step.
template <class T, class Rows, bool VECTORS> struct Reader {
    static constexpr int STEP = CHUNKS * PER_VECTOR<T>;
    static constexpr int APART = THREADS<T> / CHUNKS, READS = TILE / APART;
    const Rows& rows;
    typename Rows::Row own[READS];
    const T *from[READS], *weight[READS];
    int chunk, first;
    // Where the chunk of the next step begins.
    int tap, value;

    // Beyond the last row or column it is read again, and what becomes of it is not written.
    __device__ Reader(const Rows& rows, int first_row, int left_rows, const T* weights, int first_column,
                      int left_columns)
        : rows(rows), chunk(threadIdx.x % CHUNKS), first(threadIdx.x / CHUNKS), tap(0), value(chunk * PER_VECTOR<T>) {
        for (int i = 0; i < READS; i++) {
            int row = first + i * APART;
            own[i] = rows.row(first_row + min(row, left_rows - 1));
            i64 column = first_column + min(row, left_columns - 1);
            weight[i] = weights + column * Rows::TAPS * rows.width + value;
            from[i] = rows.tap(own[i], 0);
        }
        settle();
    }

    __device__ void settle() {
        if (value < rows.width) return;
        for (; value >= rows.width && tap < Rows::TAPS; tap++) value -= rows.width;
        for (int i = 0; i < READS && tap < Rows::TAPS; i++) from[i] = rows.tap(own[i], tap);
    }

    // Starts to fill a stage with the next step's values, and with zeros behind the last.
    __device__ void read(Stage& stage) {
        for (int i = 0; i < READS; i++) {
            int at = swizzled<CHUNKS>(first + i * APART, chunk);
            if constexpr (VECTORS) {
                cp_async_16(stage.x + at, from[i] + value, tap < Rows::TAPS);
                cp_async_16(stage.weight + at, weight[i], tap < Rows::TAPS);
            } else {
                for (int e = 0, t = tap, v = value; e < PER_VECTOR<T>; e++) {
                    ((T*)(stage.x + at))[e] = t < Rows::TAPS ? rows.tap(own[i], t)[v] : T{};
                    ((T*)(stage.weight + at))[e] = t < Rows::TAPS ? weight[i][e] : T{};
                    if (++v == rows.width) v = 0, t++;
                }
            }
            weight[i] += STEP;
        }
        value += STEP;
        settle();
    }
};

// ---- multiplying ----

// The values of out that a thread computes: in registers, so every loop over them has to be unrolled. `add` is a step,
// `write` the end.
template <class T> struct Sums;

// 8 × 8 values, 16 rows and columns apart: then 8 neighbouring threads read 8 neighbouring rows of the weight, which
// lie in different banks, and write neighbouring values.
template <> struct Sums<float> {
    static constexpr int EACH = 8, APART = 16;
    struct alignas(16) Four {
        float of[4];
    };
    float of[EACH][EACH] = {};

    __device__ void add(const Stage& stage) {
        int first_row = threadIdx.x / APART, first_column = threadIdx.x % APART;
                // Unrolled, this one wants more registers than there are.
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            Four x[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                x[i] = *(const Four*)(stage.x + swizzled<CHUNKS>(first_row + i * APART, chunk));
            }
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                Four weight = *(const Four*)(stage.weight + swizzled<CHUNKS>(first_column + j * APART, chunk));
#pragma unroll
                for (int k = 0; k < 4; k++) {
#pragma unroll
                    for (int i = 0; i < EACH; i++) of[i][j] = fmaf(x[i].of[k], weight.of[k], of[i][j]);
                }
            }
        }
    }

    __device__ void write(float* out, const float* bias, int left_rows, int left_columns, int columns) const {
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int column = threadIdx.x % APART + j * APART;
            if (column >= left_columns) return;
            float more = bias ? bias[column] : 0.0f;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int row = threadIdx.x / APART + i * APART;
                if (row < left_rows) out[(i64)row * columns + column] = of[i][j] + more;
            }
        }
    }
};

// A warp computes 64 × 64 values, in 4 × 8 products of the tensor cores for each 16 of the depth.
template <> struct Sums<bf16> {
    static constexpr int ROWS = 64, COLUMNS = 64;
    float of[ROWS / 16][COLUMNS / 8][4] = {};

    __device__ static int first_row() { return threadIdx.x / 32 / (TILE / COLUMNS) * ROWS; }
    __device__ static int first_column() { return threadIdx.x / 32 % (TILE / COLUMNS) * COLUMNS; }

    __device__ void add(const Stage& stage) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            // Of rows 0–7, 8–15 the first chunk, then of both the second: the order of registers that mma wants.
            u32 x[ROWS / 16][4];
#pragma unroll
            for (int i = 0; i < ROWS / 16; i++) {
                int row = first_row() + 16 * i + lane % 16;
                ldmatrix_x4(x[i], stage.x + swizzled<CHUNKS>(row, chunk + lane / 16));
            }
#pragma unroll
            for (int j = 0; j < COLUMNS / 16; j++) {
                // Both chunks of columns 0–7, then of columns 8–15.
                u32 weight[4];
                int column = first_column() + 16 * j + lane / 16 * 8 + lane % 8;
                ldmatrix_x4(weight, stage.weight + swizzled<CHUNKS>(column, chunk + lane / 8 % 2));
#pragma unroll
                for (int i = 0; i < ROWS / 16; i++) {
                    mma_bf16(of[i][2 * j], x[i], weight[0], weight[1]);
                    mma_bf16(of[i][2 * j + 1], x[i], weight[2], weight[3]);
                }
            }
        }
    }

    __device__ void write(bf16* out, const float* bias, int left_rows, int left_columns, int columns) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
            int column = first_column() + 8 * j + lane % 4 * 2;
            if (column >= left_columns) return;
            bool two = column + 1 < left_columns;
            float low = bias ? bias[column] : 0.0f, high = bias && two ? bias[column + 1] : 0.0f;
#pragma unroll
            for (int i = 0; i < ROWS / 16; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int row = first_row() + 16 * i + lane / 4 + 8 * half;
                    if (row >= left_rows) continue;
                    bf16* to = out + (i64)row * columns + column;
                    u32 pair = pack_bf16(of[i][j][2 * half] + low, of[i][j][2 * half + 1] + high);
                    // With an even number of columns every pair is aligned, and there is no half of one.
                    if (columns % 2 == 0) {
                        *(u32*)to = pair;
                    } else {
                        to[0].bits = (u16)pair;
                        if (two) to[1].bits = (u16)(pair >> 16);
                    }
                }
            }
        }
    }
};

// `bias` is null if there is none.
template <bool VECTORS, class T, class Rows>
__device__ void multiply(const Rows& of, const T* weight, const float* bias, T* out, int rows, int columns) {
    __shared__ Stage stages[STAGES];
    int row_tiles = (rows - 1) / TILE + 1, column_tiles = (columns - 1) / TILE + 1;
    int group = blockIdx.x / (GROUP * column_tiles) * GROUP, in_group = blockIdx.x % (GROUP * column_tiles);
    int height = min(GROUP, row_tiles - group);
    int first_row = (group + in_group % height) * TILE, first_column = in_group / height * TILE;

    Reader<T, Rows, VECTORS> reader(of, first_row, rows - first_row, weight, first_column, columns - first_column);
    int depth = Rows::TAPS * of.width, steps = depth / reader.STEP + (depth % reader.STEP > 0);
    Sums<T> sums;
    // A group of copies for each step, empty ones behind the last, so that how many are under way says which have come.
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) reader.read(stages[step]);
        cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        // Now all threads' copies have come, and nobody needs the stage before this one, which is filled again.
        __syncthreads();
        int next = step + STAGES - 1;
        if (next < steps) reader.read(stages[next % STAGES]);
        cp_async_commit();
        sums.add(stages[step % STAGES]);
    }
    cp_async_wait<0>();
    sums.write(out + (i64)first_row * columns + first_column, bias ? bias + first_column : bias, rows - first_row,
               columns - first_column, columns);
}

// Reads 16 bytes at a time: x and the weight begin at a multiple of 16 bytes, and so does every row (or tap) of them.
// The other form takes any.
#define PRODUCT(name, VECTORS, T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS<T>, 2)                                                    \
    product##name(const T* x, const T* weight, const float* bias, T* out, int rows, int columns, int depth) {      \
        multiply<VECTORS>(MatrixRows<T>{x, depth}, weight, bias, out, rows, columns);                              \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS<T>, 2)                                                    \
    convolution##name(const T* x, const T* past, i64 past_step, const T* weight, const float* bias, T* out,        \
                      int pixels, int columns, int channels, int height, int width) {                              \
        Neighbours<T> rows{x, past, past_step, channels, height, width};                                           \
        multiply<VECTORS>(rows, weight, bias, out, pixels, columns);                                               \
    }
PRODUCT(_f32, true, float)
PRODUCT(_bf16, true, bf16)
PRODUCT(_scalar_f32, false, float)
PRODUCT(_scalar_bf16, false, bf16)
