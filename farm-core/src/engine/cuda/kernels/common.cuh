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
