// What all kernels share. The text stands before every source. It is CUDA C++ without any header, so that NVRTC needs
// no toolkit; the emulation has its own header in front of it, which defines EMULATED and what CUDA has built in.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct bf16 {
    u16 bits;
};

// Exact.
__device__ inline float to_f32(float x) { return x; }
__device__ inline float to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// To nearest, ties to even; NaN stays NaN.
__device__ inline bf16 to_bf16(float x) {
#ifdef EMULATED
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16{(u16)(bits >> 16 | 0x40)};
    return bf16{(u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#else
    bf16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    return out;
#endif
}

// The one rounding of a result to its tensor's type.
template <class T> __device__ T from_f32(float x);
template <> __device__ inline float from_f32<float>(float x) { return x; }
template <> __device__ inline bf16 from_f32<bf16>(float x) { return to_bf16(x); }

// To nearest, as above; `low` comes first in memory.
__device__ inline u32 pack_bf16(float low, float high) {
#ifdef EMULATED
    return (u32)to_bf16(low).bits | (u32)to_bf16(high).bits << 16;
#else
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
#endif
}

// What one load moves: 4 values of f32, or 8 of bf16, as they are in memory. Unpacked only where they are used, a row
// of bf16 takes half the registers.
struct __align__(16) Vector {
    u32 words[4];
};
template <class T> constexpr int PER_VECTOR = 16 / sizeof(T);

__device__ inline bool aligned(const void* at) { return ((u64)at & 15) == 0; }

// A GPU ends the program at a vector anywhere else, and a processor says nothing.
template <class V> __device__ inline V* vector_at(V* at) {
#ifdef EMULATED
    if ((u64)at & 15) emulated::die("a vector that is not aligned");
#endif
    return at;
}

__device__ inline void set_bits(Vector& to, int i, float x) { to.words[i] = __float_as_uint(x); }
__device__ inline void set_bits(Vector& to, int i, bf16 x) { to.words[i / 2] |= (u32)x.bits << 16 * (i % 2); }
__device__ inline void get_bits(const Vector& from, int i, float& x) { x = __uint_as_float(from.words[i]); }
__device__ inline void get_bits(const Vector& from, int i, bf16& x) {
    x.bits = (u16)(from.words[i / 2] >> 16 * (i % 2));
}

// The first `count` values at `from`, and zeros for the others. WHOLE: `from` is aligned, and `count` is not between 0
// and a vector's values. Without, the values are the same, moved one by one.
template <bool WHOLE, class T> __device__ inline Vector load_vector(const T* from, i64 count) {
    Vector out = {{0, 0, 0, 0}};
    if (WHOLE) {
        if (count > 0) out = *vector_at((const Vector*)from);
    } else {
#pragma unroll
        for (int i = 0; i < PER_VECTOR<T>; i++) {
            if (i < count) set_bits(out, i, from[i]);
        }
    }
    return out;
}

// The inverse: stores the first `count` values.
template <bool WHOLE, class T> __device__ inline void store_vector(T* to, i64 count, const Vector& values) {
    if (WHOLE) {
        if (count > 0) *vector_at((Vector*)to) = values;
    } else {
#pragma unroll
        for (int i = 0; i < PER_VECTOR<T>; i++) {
            if (i < count) get_bits(values, i, to[i]);
        }
    }
}

__device__ inline void unpack(const Vector& from, float (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = __uint_as_float(from.words[i]);
}
__device__ inline void unpack(const Vector& from, float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(from.words[i] << 16);
        to[2 * i + 1] = __uint_as_float(from.words[i] & 0xffff0000u);
    }
}

// The one rounding of results to their tensor's type.
__device__ inline Vector pack(const float (&from)[4]) {
    Vector out;
#pragma unroll
    for (int i = 0; i < 4; i++) out.words[i] = __float_as_uint(from[i]);
    return out;
}
__device__ inline Vector pack(const float (&from)[8]) {
    Vector out;
#pragma unroll
    for (int i = 0; i < 4; i++) out.words[i] = pack_bf16(from[2 * i], from[2 * i + 1]);
    return out;
}

// As load_vector, for N values of an f32 tensor that go with N of another type.
template <bool WHOLE, int N> __device__ inline void load_floats(const float* from, i64 count, float (&to)[N]) {
    if (WHOLE && N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            Vector four = load_vector<true>(from + i, count);
#pragma unroll
            for (int j = 0; j < 4; j++) to[i + j] = __uint_as_float(four.words[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = i < count ? from[i] : 0.0f;
    }
}

// a / b of numbers that are not negative. Where 32 bits suffice, it takes a fraction of the time.
__device__ inline i64 quotient(i64 a, i64 b) { return ((a | b) >> 32) == 0 ? (u32)a / (u32)b : a / b; }

// The first value of this thread, and how far the next is, in a loop over `count` values by all threads of the grid.
__device__ inline i64 first_value() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline i64 next_value() { return (i64)gridDim.x * blockDim.x; }

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Sum over the threads of a warp; every lane gets the same bits.
__device__ inline float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Sum over the threads of a block, in an order that depends on their number alone; every thread gets the same bits.
// All threads of the block have to call it.
__device__ inline float block_sum(float x) {
    __shared__ float sums[32];
    x = warp_sum(x);
    int warps = (blockDim.x + 31) / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(lane < warps ? sums[lane] : 0.0f);
}

// Defines kernel NAME_f32 and NAME_bf16 by the template NAME_kernel: FOR_BOTH(name, (parameters of T), (arguments)).
#define FOR_BOTH(name, parameters, arguments)                                         \
    namespace name##_of_f32 {                                                         \
    typedef float T;                                                                  \
    extern "C" __global__ void name##_f32 parameters { name##_kernel<T> arguments; }  \
    }                                                                                 \
    namespace name##_of_bf16 {                                                        \
    typedef bf16 T;                                                                   \
    extern "C" __global__ void name##_bf16 parameters { name##_kernel<T> arguments; } \
    }                                                                                 \
    using name##_of_f32::name##_f32;                                                  \
    using name##_of_bf16::name##_bf16;
