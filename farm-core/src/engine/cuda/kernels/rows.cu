// Norms, gates and rotations of rows.
//
// All are bound by memory, and read each value once: a row stays in registers between its statistics and its result, as
// it was in memory. Statistics and all else are f32; a result is rounded once, to the type of its tensor.
//
// The order of a sum depends on the width of a row and its type alone, not on where the row lies or how many there are.
// Sums of products are written as fmaf: left to itself, a compiler may contract the two ways in which rows are loaded
// differently.

// Vectors of a row that a thread holds, at most. Of thread t: t, t + threads, and so on.
#define HELD 4

template <class T> __device__ inline int place(int i) { return (int)(threadIdx.x + i * blockDim.x) * PER_VECTOR<T>; }

template <bool WHOLE, class T> __device__ inline void load_row(const T* row, int width, Vector (&held)[HELD]) {
#pragma unroll
    for (int i = 0; i < HELD; i++) held[i] = load_vector<WHOLE>(row + place<T>(i), width - place<T>(i));
}

// 1 / √(mean(x²) + eps) over the row that the block holds.
template <class T> __device__ inline float inverse_rms(const Vector (&held)[HELD], int width, float eps) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float x[PER_VECTOR<T>];
        unpack(held[i], x);
#pragma unroll
        for (int j = 0; j < PER_VECTOR<T>; j++) sum = fmaf(x[j], x[j], sum);
    }
    return 1.0f / sqrtf(block_sum(sum) / width + eps);
}

template <bool WHOLE, class T>
__device__ void rms_norm_row(const T* x, const float* weight, T* out, int width, float base, float eps) {
    const int N = PER_VECTOR<T>;
    Vector held[HELD];
    load_row<WHOLE>(x, width, held);
    float inverse = inverse_rms<T>(held, width, eps);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float value[N], factor[N];
        unpack(held[i], value);
        load_floats<WHOLE>(weight + place<T>(i), width - place<T>(i), factor);
#pragma unroll
        for (int j = 0; j < N; j++) value[j] = value[j] * inverse * (base + factor[j]);
        store_vector<WHOLE>(out + place<T>(i), width - place<T>(i), pack(value));
    }
}

// out = rms(x, eps) · (base + weight): x, out [rows, width], weight [width]. A block for a row.
template <class T>
__device__ void rms_norm_kernel(const T* x, const float* weight, T* out, int width, float base, float eps) {
    bool whole = aligned(x) && aligned(weight) && aligned(out) && width % PER_VECTOR<T> == 0;
    i64 row = (i64)blockIdx.x * width;
    if (whole) rms_norm_row<true>(x + row, weight, out + row, width, base, eps);
    else rms_norm_row<false>(x + row, weight, out + row, width, base, eps);
}
FOR_BOTH(rms_norm, (const T* x, const float* weight, T* out, int width, float base, float eps),
         (x, weight, out, width, base, eps))

// A gate is small, and the same for every row: its tanh is worth a launch of its own.
template <class T> __device__ void tanh_kernel(const T* x, float* out, i64 count) {
    for (i64 i = first_value(); i < count; i += next_value()) out[i] = tanhf(to_f32(x[i]));
}
FOR_BOTH(tanh, (const T* x, float* out, i64 count), (x, out, count))

template <bool WHOLE, class T>
__device__ void gated_residual_row(const T* x, const T* branch, const float* gate, T* out, int width, float eps) {
    const int N = PER_VECTOR<T>;
    Vector held[HELD], base[HELD];
    load_row<WHOLE>(branch, width, held);
    // Under way while the others are summed.
    load_row<WHOLE>(x, width, base);
    float inverse = inverse_rms<T>(held, width, eps);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float value[N], sum[N], factor[N];
        unpack(held[i], value);
        unpack(base[i], sum);
        load_floats<WHOLE>(gate + place<T>(i), width - place<T>(i), factor);
#pragma unroll
        for (int j = 0; j < N; j++) sum[j] = fmaf(value[j] * inverse, factor[j], sum[j]);
        store_vector<WHOLE>(out + place<T>(i), width - place<T>(i), pack(sum));
    }
}

// out = x + rms(branch, eps) · gate: x, branch, out [rows, width]; gate [width], tanh applied. One rounding: the branch
// is not rounded before it is added. A block for a row.
template <class T>
__device__ void gated_residual_kernel(const T* x, const T* branch, const float* gate, T* out, int width, float eps) {
    bool whole = aligned(x) && aligned(branch) && aligned(gate) && aligned(out) && width % PER_VECTOR<T> == 0;
    i64 row = (i64)blockIdx.x * width;
    if (whole) gated_residual_row<true>(x + row, branch + row, gate, out + row, width, eps);
    else gated_residual_row<false>(x + row, branch + row, gate, out + row, width, eps);
}
FOR_BOTH(gated_residual, (const T* x, const T* branch, const float* gate, T* out, int width, float eps),
         (x, branch, gate, out, width, eps))

template <bool WHOLE, class T>
__device__ void layer_norm_row(const T* x, const float* shift, const float* scale, T* out, int width, float eps) {
    const int N = PER_VECTOR<T>;
    Vector held[HELD];
    load_row<WHOLE>(x, width, held);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float value[N];
        unpack(held[i], value);
#pragma unroll
        for (int j = 0; j < N; j++) sum += value[j];
    }
    float mean = block_sum(sum) / width;
    // Of what is left after the mean: a large mean takes nothing from the variance.
    float squares = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float value[N];
        unpack(held[i], value);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float rest = place<T>(i) + j < width ? value[j] - mean : 0.0f;
            squares = fmaf(rest, rest, squares);
        }
    }
    float inverse = 1.0f / sqrtf(block_sum(squares) / width + eps);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float value[N], factor[N], offset[N];
        unpack(held[i], value);
        load_floats<WHOLE>(scale + place<T>(i), width - place<T>(i), factor);
        load_floats<WHOLE>(shift + place<T>(i), width - place<T>(i), offset);
#pragma unroll
        for (int j = 0; j < N; j++) value[j] = fmaf((value[j] - mean) * inverse, 1.0f + factor[j], offset[j]);
        store_vector<WHOLE>(out + place<T>(i), width - place<T>(i), pack(value));
    }
}

// out = layer_norm(x, eps) · (1 + scale) + shift: x, out [rows, width]; scale, shift [width]. A block for a row.
template <class T>
__device__ void layer_norm_kernel(const T* x, const float* shift, const float* scale, T* out, int width, float eps) {
    bool whole = aligned(x) && aligned(shift) && aligned(scale) && aligned(out) && width % PER_VECTOR<T> == 0;
    i64 row = (i64)blockIdx.x * width;
    if (whole) layer_norm_row<true>(x + row, shift, scale, out + row, width, eps);
    else layer_norm_row<false>(x + row, shift, scale, out + row, width, eps);
}
FOR_BOTH(layer_norm, (const T* x, const float* shift, const float* scale, T* out, int width, float eps),
         (x, shift, scale, out, width, eps))

// cos and sin of frequencies [3, width] at the tokens first..first+gridDim.x of a grid whose frames are rows × columns,
// each [tokens, width]. Rows and columns are centred, and of a unit that gives every frame the area of 192 × 192; both
// are rounded to f32, as positions are. The sum of products, exact in f64 each, is rounded once to f32, as angles are,
// and its cos and sin once more. A block for a token; once for a clip, so what f64 takes does not count.
extern "C" __global__ void rope_table(const float* frequencies, float* cos_out, float* sin_out, i64 first, int rows,
                                      int columns, int width) {
    i64 token = first + blockIdx.x, line = token / columns;
    double unit = sqrt(36864.0 / ((double)rows * columns));
    double time = (double)(line / rows);
    double row = (float)(((double)(line % rows) - (rows - 1.0) / 2) * unit);
    double column = (float)(((double)(token % columns) - (columns - 1.0) / 2) * unit);
    i64 to = (i64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float* of = frequencies + i;
        double angle = time * of[0] + row * of[width] + column * of[2 * (i64)width];
        double s, c;
        sincos((double)(float)angle, &s, &c);
        cos_out[to + i] = (float)c;
        sin_out[to + i] = (float)s;
    }
}

// A vector of a head: normalised over the `lanes` lanes that hold it, weighted, and rotated in interleaved pairs.
template <class T>
__device__ inline Vector norm_and_rotate(const Vector& held, const float (&weight)[PER_VECTOR<T>],
                                         const float (&cos)[PER_VECTOR<T> / 2], const float (&sin)[PER_VECTOR<T> / 2],
                                         bool rotate, int head_dim, int lanes, float eps) {
    const int N = PER_VECTOR<T>;
    float x[N], sum = 0;
    unpack(held, x);
#pragma unroll
    for (int j = 0; j < N; j++) sum = fmaf(x[j], x[j], sum);
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    float inverse = 1.0f / sqrtf(sum / head_dim + eps);
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = x[j] * inverse * weight[j];
    if (rotate) {
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            float a = x[2 * j], b = x[2 * j + 1];
            x[2 * j] = fmaf(a, cos[j], -(b * sin[j]));
            x[2 * j + 1] = fmaf(a, sin[j], b * cos[j]);
        }
    }
    return pack(x);
}

template <bool WHOLE, class T>
__device__ void split_heads(const T* packed, const float* q_norm, const float* k_norm, const float* cos,
                            const float* sin, T* q, T* k, T* v, i64 count, int heads, int head_dim, int lanes,
                            float eps) {
    const int N = PER_VECTOR<T>;
    int lane = threadIdx.x % 32, at = lane % lanes * N;
    float q_weight[N], k_weight[N];
    load_floats<WHOLE>(q_norm + at, head_dim - at, q_weight);
    load_floats<WHOLE>(k_norm + at, head_dim - at, k_weight);
    // The lanes of a warp stay together, for the sums: those without a head work on zeros.
    int per_warp = 32 / lanes;
    i64 step = next_value() / 32 * per_warp;
    for (i64 first = first_value() / 32 * per_warp; first < count; first += step) {
        i64 i = first + lane / lanes;
        int left = i < count ? head_dim - at : 0;
        i64 row = quotient(i, heads), part = (i64)heads * head_dim;
        const T* from = packed + (row * 2 * heads + i) * head_dim + at;
        Vector q_held = load_vector<WHOLE>(from, left);
        Vector k_held = load_vector<WHOLE>(from + part, left);
        Vector v_held = load_vector<WHOLE>(from + 2 * part, left);
        float c[N / 2] = {}, s[N / 2] = {};
        if (cos) {
            i64 angle = i * (head_dim / 2) + at / 2;
            load_floats<WHOLE>(cos + angle, left / 2, c);
            load_floats<WHOLE>(sin + angle, left / 2, s);
        }
        i64 to = i * head_dim + at;
        store_vector<WHOLE>(q + to, left, norm_and_rotate<T>(q_held, q_weight, c, s, cos, head_dim, lanes, eps));
        store_vector<WHOLE>(k + to, left, norm_and_rotate<T>(k_held, k_weight, c, s, cos, head_dim, lanes, eps));
        store_vector<WHOLE>(v + to, left, v_held);
    }
}

// packed [rows, 3, heads, head_dim] → q, k, v [rows, heads, head_dim]: q and k are rms(·, eps) · norm[head_dim], and
// with cos and sin [rows, heads, head_dim/2] rotated; count = rows·heads. One rounding: a q that is to be rotated is
// not rounded before.
//
// `lanes`, a power of 2 of at most 32, hold a head's vectors, one each. They take q, k and v of it together, so that
// the tables are read once: they have 4 bytes for a value of q, and q, k and v in bf16 have 6 to read and 6 to write.
template <class T>
__device__ void split_qkv_kernel(const T* packed, const float* q_norm, const float* k_norm, const float* cos,
                                 const float* sin, T* q, T* k, T* v, i64 count, int heads, int head_dim, int lanes,
                                 float eps) {
    bool whole = aligned(packed) && aligned(q_norm) && aligned(k_norm) && aligned(cos) && aligned(sin) && aligned(q) &&
                 aligned(k) && aligned(v) && head_dim % PER_VECTOR<T> == 0;
    if (whole) split_heads<true>(packed, q_norm, k_norm, cos, sin, q, k, v, count, heads, head_dim, lanes, eps);
    else split_heads<false>(packed, q_norm, k_norm, cos, sin, q, k, v, count, heads, head_dim, lanes, eps);
}
FOR_BOTH(split_qkv,
         (const T* packed, const float* q_norm, const float* k_norm, const float* cos, const float* sin, T* q, T* k,
          T* v, i64 count, int heads, int head_dim, int lanes, float eps),
         (packed, q_norm, k_norm, cos, sin, q, k, v, count, heads, head_dim, lanes, eps))

template <bool WHOLE>
__device__ void merge(const float* a, const float* b, float a_share, float b_share, float* out, int count) {
    float x[PER_VECTOR<float>], y[PER_VECTOR<float>];
    unpack(load_vector<WHOLE>(a, count), x);
    unpack(load_vector<WHOLE>(b, count), y);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<float>; i++) x[i] = fmaf(a_share, x[i], b_share * y[i]);
    store_vector<WHOLE>(out, count, pack(x));
}

// out = (wₐ·a + w_b·b) / (wₐ + w_b) with w = e^(lse − m), and lse = m + ln(wₐ + w_b): a, b, out [heads, head_dim] and
// the log-sum-exps [heads], with `heads` those of all rows. A thread takes a vector of a head; `steps` has a head.
extern "C" __global__ void merge_attention(const float* a, const float* a_lse, const float* b, const float* b_lse,
                                           float* out, float* lse, i64 heads, int head_dim, int steps) {
    bool whole = aligned(a) && aligned(b) && aligned(out) && head_dim % PER_VECTOR<float> == 0;
    for (i64 i = first_value(); i < heads * steps; i += next_value()) {
        i64 head = quotient(i, steps);
        int step = (int)(i - head * steps), at = step * PER_VECTOR<float>;
        float x = a_lse[head], y = b_lse[head], most = max(x, y);
        // The larger weighs 1. Without a key in either both outputs are 0, and any weights do.
        float less = most > __uint_as_float(0xff800000u) ? expf(min(x, y) - most) : 1.0f;
        float large = 1.0f / (1.0f + less), small = less / (1.0f + less);
        if (step == 0) lse[head] = most + log1pf(less);
        i64 start = head * head_dim + at;
        float a_share = x < y ? small : large, b_share = x < y ? large : small;
        if (whole) merge<true>(a + start, b + start, a_share, b_share, out + start, head_dim - at);
        else merge<false>(a + start, b + start, a_share, b_share, out + start, head_dim - at);
    }
}
