// Operations on values one by one, and the moving of values.

// out = a + b
template <class T> __device__ void add_kernel(const T* a, const T* b, T* out, i64 count) {
    for (i64 i = first_value(); i < count; i += next_value()) out[i] = from_f32<T>(to_f32(a[i]) + to_f32(b[i]));
}
FOR_BOTH(add, (const T* a, const T* b, T* out, i64 count), (a, b, out, count))

// out = x · sigmoid(x)
template <class T> __device__ void silu_kernel(const T* x, T* out, i64 count) {
    for (i64 i = first_value(); i < count; i += next_value()) {
        float value = to_f32(x[i]);
        out[i] = from_f32<T>(value * sigmoid(value));
    }
}
FOR_BOTH(silu, (const T* x, T* out, i64 count), (x, out, count))

// Exact.
extern "C" __global__ void to_f32_of_bf16(const bf16* x, float* out, i64 count) {
    for (i64 i = first_value(); i < count; i += next_value()) out[i] = to_f32(x[i]);
}

// One rounding.
extern "C" __global__ void to_bf16_of_f32(const float* x, bf16* out, i64 count) {
    for (i64 i = first_value(); i < count; i += next_value()) out[i] = to_bf16(x[i]);
}
