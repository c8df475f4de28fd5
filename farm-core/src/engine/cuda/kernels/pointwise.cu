// Operations on values one by one, and the moving of values.
//
// Every value is computed in f32 and rounded once to the type of the result, to the same bits wherever it lies. All of
// these are bound by memory: they read and write each value once, 16 bytes at a time where addresses allow.

struct Sum {
    static __device__ float of(float a, float b) { return a + b; }
};

// gelu_tanh(a)·b. With a/2·(1 + tanh u) = a·sigmoid(2u), nothing cancels where a is far below 0.
struct GeluGated {
    static __device__ float of(float a, float b) {
        return a * sigmoid(1.5957691216f * fmaf(0.044715f, a * a * a, a)) * b;
    }
};

// silu(a)·b
struct Swiglu {
    static __device__ float of(float a, float b) { return a * sigmoid(a) * b; }
};

// F of the first `count` pairs of values, at most a vector of them.
template <class F, bool WHOLE, class T> __device__ void pairs(const T* a, const T* b, T* out, i64 count) {
    float x[PER_VECTOR<T>], y[PER_VECTOR<T>];
    unpack(load_vector<WHOLE>(a, count), x);
    unpack(load_vector<WHOLE>(b, count), y);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<T>; i++) x[i] = F::of(x[i], y[i]);
    store_vector<WHOLE>(out, count, pack(x));
}

template <class F, class T> __device__ void all_pairs(const T* a, const T* b, T* out, i64 count) {
    const int N = PER_VECTOR<T>;
    bool vectors = aligned(a) && aligned(b) && aligned(out);
    for (i64 i = first_value() * N; i < count; i += next_value() * N) {
        if (vectors && count - i >= N) pairs<F, true>(a + i, b + i, out + i, N);
        else pairs<F, false>(a + i, b + i, out + i, count - i);
    }
}

// out = a + b
template <class T> __device__ void add_kernel(const T* a, const T* b, T* out, i64 count) {
    all_pairs<Sum>(a, b, out, count);
}
FOR_BOTH(add, (const T* a, const T* b, T* out, i64 count), (a, b, out, count))

// out = gelu_tanh(a) · b
template <class T> __device__ void gelu_gated_kernel(const T* a, const T* b, T* out, i64 count) {
    all_pairs<GeluGated>(a, b, out, count);
}
FOR_BOTH(gelu_gated, (const T* a, const T* b, T* out, i64 count), (a, b, out, count))

// out = silu(a) · g: x [rows, 2·width] holds a and g side by side. A thread takes a vector of a row; `steps` has a row.
template <class T> __device__ void swiglu_kernel(const T* x, T* out, i64 rows, int width, int steps) {
    const int N = PER_VECTOR<T>;
    bool vectors = aligned(x) && aligned(out) && width % N == 0;
    for (i64 i = first_value(); i < rows * steps; i += next_value()) {
        i64 row = quotient(i, steps);
        int at = (int)(i - row * steps) * N;
        const T* a = x + row * 2 * width + at;
        T* to = out + row * width + at;
        if (vectors) pairs<Swiglu, true>(a, a + width, to, N);
        else pairs<Swiglu, false>(a, a + width, to, width - at);
    }
}
FOR_BOTH(swiglu, (const T* x, T* out, i64 rows, int width, int steps), (x, out, rows, width, steps))

template <bool WHOLE, class T> __device__ void silu_of(const T* x, T* out, i64 count) {
    float value[PER_VECTOR<T>];
    unpack(load_vector<WHOLE>(x, count), value);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<T>; i++) value[i] *= sigmoid(value[i]);
    store_vector<WHOLE>(out, count, pack(value));
}

// out = x · sigmoid(x)
template <class T> __device__ void silu_kernel(const T* x, T* out, i64 count) {
    const int N = PER_VECTOR<T>;
    bool vectors = aligned(x) && aligned(out);
    for (i64 i = first_value() * N; i < count; i += next_value() * N) {
        if (vectors && count - i >= N) silu_of<true>(x + i, out + i, N);
        else silu_of<false>(x + i, out + i, count - i);
    }
}
FOR_BOTH(silu, (const T* x, T* out, i64 count), (x, out, count))

// Exact.
extern "C" __global__ void to_f32_of_bf16(const bf16* x, float* out, i64 count) {
    bool vectors = aligned(x) && aligned(out);
    for (i64 i = first_value() * 8; i < count; i += next_value() * 8) {
        if (vectors && count - i >= 8) {
            float value[8];
            unpack(load_vector<true>(x + i, 8), value);
#pragma unroll
            for (int half = 0; half < 8; half += 4) {
                float four[4] = {value[half], value[half + 1], value[half + 2], value[half + 3]};
                store_vector<true>(out + i + half, 4, pack(four));
            }
        } else {
            for (i64 j = i; j < min(i + 8, count); j++) out[j] = to_f32(x[j]);
        }
    }
}

// One rounding.
extern "C" __global__ void to_bf16_of_f32(const float* x, bf16* out, i64 count) {
    bool vectors = aligned(x) && aligned(out);
    for (i64 i = first_value() * 8; i < count; i += next_value() * 8) {
        if (vectors && count - i >= 8) {
            float value[8];
            load_floats<true>(x + i, 8, value);
            store_vector<true>(out + i, 8, pack(value));
        } else {
            for (i64 j = i; j < min(i + 8, count); j++) out[j] = to_bf16(x[j]);
        }
    }
}

// out = z + dsigma·v with v = uncond + guidance·(cond − uncond), or cond if there is no uncond. Each product and sum is
// rounded for itself: the intrinsics are what a compiler does not contract.
template <bool WHOLE>
__device__ void euler(const float* z, const float* cond, const float* uncond, float* out, float guidance, float dsigma,
                      i64 count) {
    float x[4], v[4], u[4];
    load_floats<WHOLE>(z, count, x);
    load_floats<WHOLE>(cond, count, v);
    if (uncond) {
        load_floats<WHOLE>(uncond, count, u);
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = __fadd_rn(u[i], __fmul_rn(guidance, __fsub_rn(v[i], u[i])));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = __fadd_rn(x[i], __fmul_rn(dsigma, v[i]));
    store_vector<WHOLE>(out, count, pack(x));
}

extern "C" __global__ void euler_step(const float* z, const float* cond, const float* uncond, float* out,
                                      float guidance, float dsigma, i64 count) {
    bool vectors = aligned(z) && aligned(cond) && aligned(uncond) && aligned(out);
    for (i64 i = first_value() * 4; i < count; i += next_value() * 4) {
        const float* other = uncond ? uncond + i : uncond;
        if (vectors && count - i >= 4) euler<true>(z + i, cond + i, other, out + i, guidance, dsigma, 4);
        else euler<false>(z + i, cond + i, other, out + i, guidance, dsigma, count - i);
    }
}

// Copies `runs` runs of `length` values, which begin `from_stride` and `to_stride` values apart. A thread takes a
// vector of a run; `steps` has a run.
template <class T>
__device__ void copy_runs_kernel(const T* from, i64 from_stride, T* to, i64 to_stride, i64 runs, i64 length,
                                 i64 steps) {
    const int N = PER_VECTOR<T>;
    bool vectors = aligned(from) && aligned(to) && from_stride % N == 0 && to_stride % N == 0 && length % N == 0;
    for (i64 i = first_value(); i < runs * steps; i += next_value()) {
        i64 run = quotient(i, steps), at = (i - run * steps) * N;
        const T* source = from + run * from_stride + at;
        T* target = to + run * to_stride + at;
        if (vectors) store_vector<true>(target, N, load_vector<true>(source, N));
        else store_vector<false>(target, length - at, load_vector<false>(source, length - at));
    }
}
FOR_BOTH(copy_runs, (const T* from, i64 from_stride, T* to, i64 to_stride, i64 runs, i64 length, i64 steps),
         (from, from_stride, to, to_stride, runs, length, steps))

// Value i is mean + spread·u, where u in [-1, 1) is 24 bits of a hash (splitmix64) of `key` and first + i. Product and sum
// are rounded for themselves.
extern "C" __global__ void draw(float* out, i64 count, i64 key, i64 first, float mean, float spread) {
    for (i64 i = first_value(); i < count; i += next_value()) {
        u64 bits = (u64)key + (u64)(first + i + 1) * 0x9e3779b97f4a7c15ull;
        bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9ull;
        bits = (bits ^ bits >> 27) * 0x94d049bb133111ebull;
        bits ^= bits >> 31;
        float u = ((float)(bits >> 40) - 8388608.0f) * 0x1p-23f;
        out[i] = __fadd_rn(mean, __fmul_rn(spread, u));
    }
}

// Latent [channels, frames, 2·rows, 2·columns] → patches [frames·rows·columns, 4·channels], inner order (c, di, dj). A
// thread for a value of the patches: a latent is small.
extern "C" __global__ void patchify(const float* latent, float* out, int channels, int frames, int rows, int columns) {
    i64 count = (i64)channels * 4 * frames * rows * columns;
    for (i64 i = first_value(); i < count; i += next_value()) {
        i64 token = quotient(i, 4 * channels), line = quotient(token, columns), frame = quotient(line, rows);
        int inner = (int)(i - token * 4 * channels);
        i64 column = 2 * (token - line * columns) + inner % 2, row = 2 * (line - frame * rows) + inner / 2 % 2;
        out[i] = latent[(((i64)inner / 4 * frames + frame) * 2 * rows + row) * 2 * columns + column];
    }
}

// Patches [frames·rows·columns, 4·channels], inner order (p1, p2, c) → latent [channels, frames, 2·rows, 2·columns] in
// f32. A thread for a value of the patches. Exact.
template <class T>
__device__ void unpatchify_kernel(const T* patches, float* out, int channels, int frames, int rows, int columns) {
    i64 count = (i64)channels * 4 * frames * rows * columns;
    for (i64 i = first_value(); i < count; i += next_value()) {
        i64 token = quotient(i, 4 * channels), line = quotient(token, columns), frame = quotient(line, rows);
        int inner = (int)(i - token * 4 * channels), corner = inner / channels, channel = inner % channels;
        i64 column = 2 * (token - line * columns) + corner % 2, row = 2 * (line - frame * rows) + corner / 2;
        out[(((i64)channel * frames + frame) * 2 * rows + row) * 2 * columns + column] = to_f32(patches[i]);
    }
}
FOR_BOTH(unpatchify, (const T* patches, float* out, int channels, int frames, int rows, int columns),
         (patches, out, channels, frames, rows, columns))
