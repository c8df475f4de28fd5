// Operations on volumes [T, H, W, C].
//
// Where it pays, a thread takes a vector of neighbouring channels at a time.

// Threads of a block that works on a Part.
constexpr int THREADS = 256;

// What a thread works on: the vector of channels that begins with `channel`, of which there are `count`, of the pixels
// `first`, `first + lanes` … before `end` of a frame. The blocks of a frame take `run` of its pixels each. Vectors that
// a block has no threads for are the next row of blocks'.
struct Part {
    int frame, channel, count, lane, lanes, vectors, first, end;

    __device__ Part(int pixels, int run, int channels, int per_vector) {
        int blocks = (pixels + run - 1) / run, all = (channels + per_vector - 1) / per_vector;
        vectors = min(all, THREADS);
        frame = blockIdx.x / blocks;
        channel = (blockIdx.y * THREADS + threadIdx.x % vectors) * per_vector;
        count = min(channels - channel, per_vector);
        lane = threadIdx.x / vectors;
        lanes = THREADS / vectors;
        int start = (int)(blockIdx.x % blocks) * run;
        // Threads that are left over have no pixels.
        first = lane < lanes ? start + lane : pixels;
        end = (int)min((i64)pixels, (i64)start + run);
    }
};

// Latent [channels, pixels] → volume [pixels, channels]: z · std + mean, rounded after the product, after the sum, and
// to T. `scales` is [2, channels]: means, deviations.
template <class T>
__device__ void denormalize_latent_kernel(const float* latent, const float* scales, T* out, i64 pixels, int channels) {
    for (i64 i = first_value(); i < pixels * channels; i += next_value()) {
        int channel = (int)(i % channels);
        float z = latent[channel * pixels + i / channels];
        out[i] = from_f32<T>(__fadd_rn(__fmul_rn(z, scales[channels + channel]), scales[channel]));
    }
}
FOR_BOTH(denormalize_latent, (const float* latent, const float* scales, T* out, i64 pixels, int channels),
         (latent, scales, out, pixels, channels))

// ---- group norms ----

// Sum and sum of squares of each channel over some pixels of a rectangle, in f64, which holds the square of an f32
// value exactly. x is its first pixel in the first frame; it has `cols` columns and `pixels` pixels in each frame of
// `width` columns and `frame` values. out [frames, blocks of a frame, channels, 2].
template <bool WHOLE, class T>
__device__ void sum_channels(const Part& part, const T* x, int width, int channels, int cols,
                             double (&sums)[2 * PER_VECTOR<T>]) {
    for (int pixel = part.first; pixel < part.end; pixel += part.lanes) {
        i64 at = pixel / cols * width + pixel % cols;
        float values[PER_VECTOR<T>];
        unpack(load_vector<WHOLE>(x + at * channels, part.count), values);
#pragma unroll
        for (int i = 0; i < PER_VECTOR<T>; i++) {
            double value = values[i];
            sums[2 * i] += value;
            sums[2 * i + 1] += value * value;
        }
    }
}
template <class T>
__device__ void group_sums_kernel(const T* x, double* out, i64 frame, int width, int channels, int cols, int pixels,
                                  int run) {
    const int N = PER_VECTOR<T>;
    __shared__ double shared[2 * N][THREADS];
    Part part(pixels, run, channels, N);
    double sums[2 * N] = {};
    const T* from = x + part.frame * frame + part.channel;
    if (aligned(x) && channels % N == 0) sum_channels<true>(part, from, width, channels, cols, sums);
    else sum_channels<false>(part, from, width, channels, cols, sums);
#pragma unroll
    for (int i = 0; i < 2 * N; i++) shared[i][threadIdx.x] = sums[i];
    for (int left = part.lanes; left > 1;) {
        int kept = (left + 1) / 2;
        __syncthreads();
        if (part.lane + kept < left) {
            for (int i = 0; i < 2 * N; i++) shared[i][threadIdx.x] += shared[i][threadIdx.x + kept * part.vectors];
        }
        left = kept;
    }
    if (part.lane > 0) return;
    double* to = out + ((i64)blockIdx.x * channels + part.channel) * 2;
    for (int i = 0; i < 2 * part.count; i++) to[i] = shared[i][threadIdx.x];
}
FOR_BOTH(group_sums, (const T* x, double* out, i64 frame, int width, int channels, int cols, int pixels, int run),
         (x, out, frame, width, channels, cols, pixels, run))

// Mean and sum of squared deviations of `count` values of each frame and group, [frames · groups, 2], from the sums of
// `blocks` blocks of each frame. A block for each frame and group. Everything in f64.
extern "C" __global__ void group_moments(const double* sums, double* moments, i64 count, int blocks, int channels,
                                         int groups) {
    __shared__ double shared[2][THREADS];
    int frame = blockIdx.x / groups, own = channels / groups;
    const double* from = sums + ((i64)frame * blocks * channels + (i64)(blockIdx.x % groups) * own) * 2;
    double sum = 0.0, square = 0.0;
    for (i64 i = threadIdx.x; i < (i64)blocks * own; i += THREADS) {
        const double* of_channel = from + (i / own * channels + i % own) * 2;
        sum += of_channel[0];
        square += of_channel[1];
    }
    shared[0][threadIdx.x] = sum;
    shared[1][threadIdx.x] = square;
    for (int kept = THREADS / 2; kept > 0; kept /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < kept) {
            for (int i = 0; i < 2; i++) shared[i][threadIdx.x] += shared[i][threadIdx.x + kept];
        }
    }
    if (threadIdx.x > 0) return;
    sum = shared[0][0];
    square = shared[1][0];
    double mean = sum / (double)count, m2 = __dadd_rn(square, -__dmul_rn(sum, mean));
    moments[2 * blockIdx.x] = mean;
    moments[2 * blockIdx.x + 1] = m2 > 0.0 ? m2 : 0.0;
}

// Mean and variance of `count` values, rounded to f32 as the host's `merge` rounds them.
extern "C" __global__ void group_totals(const double* moments, float* totals, i64 of_values, i64 count) {
    for (i64 i = first_value(); i < count; i += next_value()) {
        totals[2 * i] = (float)moments[2 * i];
        totals[2 * i + 1] = (float)(moments[2 * i + 1] / (double)of_values);
    }
}

// [mean, a] of each frame and channel with a = weight / sqrt(variance + 1e-5), computed in f64 and rounded once.
// `totals` is [frames, groups, 2]: mean and variance.
extern "C" __global__ void group_scales(const float* totals, const float* weight, float* scales, i64 count,
                                        int channels, int groups) {
    for (i64 i = first_value(); i < count; i += next_value()) {
        int channel = (int)(i % channels);
        const float* total = totals + (i / channels * groups + channel / (channels / groups)) * 2;
        scales[2 * i] = total[0];
        scales[2 * i + 1] = (float)(weight[channel] * (1.0 / sqrt(total[1] + 1e-5)));
    }
}

// silu((x − mean) · a + bias) in f32, rounded once to T. `scales` is [frames, channels, 2].
template <bool WHOLE, class T>
__device__ void norm_channels(const Part& part, const T* x, const float* scales, const float* bias, T* out,
                              int channels) {
    const int N = PER_VECTOR<T>;
    float mean[N], scale[N], shift[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        mean[i] = i < part.count ? scales[2 * i] : 0.0f;
        scale[i] = i < part.count ? scales[2 * i + 1] : 0.0f;
        shift[i] = i < part.count ? bias[i] : 0.0f;
    }
    for (int pixel = part.first; pixel < part.end; pixel += part.lanes) {
        float values[N];
        unpack(load_vector<WHOLE>(x + (i64)pixel * channels, part.count), values);
#pragma unroll
        for (int i = 0; i < N; i++) {
            float normed = fmaf(values[i] - mean[i], scale[i], shift[i]);
            values[i] = normed * sigmoid(normed);
        }
        store_vector<WHOLE>(out + (i64)pixel * channels, part.count, pack(values));
    }
}
template <class T>
__device__ void group_norm_silu_kernel(const T* x, const float* scales, const float* bias, T* out, int pixels,
                                       int channels, int run) {
    const int N = PER_VECTOR<T>;
    Part part(pixels, run, channels, N);
    i64 first = (i64)part.frame * pixels * channels + part.channel;
    scales += ((i64)part.frame * channels + part.channel) * 2;
    bool whole = aligned(x) && aligned(out) && channels % N == 0;
    if (whole) norm_channels<true>(part, x + first, scales, bias + part.channel, out + first, channels);
    else norm_channels<false>(part, x + first, scales, bias + part.channel, out + first, channels);
}
FOR_BOTH(group_norm_silu,
         (const T* x, const float* scales, const float* bias, T* out, int pixels, int channels, int run),
         (x, scales, bias, out, pixels, channels, run))

// ---- moving values ----

// Values that a block moves at a time, and pixels that they may be of.
constexpr int TILE = 4096;
constexpr int TILE_PIXELS = 64;

// Keeps a walk through them in steps of 4, 8 or 12 from meeting in few banks.
__device__ inline int padded(int i) { return i + i / 32; }

// [frames, height, width, channels · st · s · s], channel order (c, st, s, s) → [st · frames − drop, s · height, s ·
// width, channels]. A block takes `of` channels of a pixel or all of `pixels` pixels, at most TILE values: it reads
// them as they lie there, and each of its warps writes runs of channels as they lie here. `count` is the number of
// pixels.
template <class T>
__device__ void depth_to_space_time_kernel(const T* x, T* out, int count, int height, int width, int channels, int st,
                                           int s, int drop, int of, int pixels) {
    __shared__ T tile[TILE + TILE / 32];
    // In the output, of the first of the pixels that one becomes; before its start are the frames that are dropped.
    __shared__ i64 targets[TILE_PIXELS];
    int factor = st * s * s, first_channel = blockIdx.y * of, here = min(of, channels - first_channel);
    int first = blockIdx.x * pixels, taken = min(pixels, count - first);
    const T* from = x + ((i64)first * channels + first_channel) * factor;
    for (int i = threadIdx.x; i < taken * here * factor; i += blockDim.x) tile[padded(i)] = from[i];
    i64 out_width = (i64)width * s, out_frame = out_width * height * s;
    if ((int)threadIdx.x < taken) {
        int pixel = first + threadIdx.x, row = pixel / width;
        targets[threadIdx.x] =
            ((i64)(row / height) * st - drop) * out_frame + row % height * s * out_width + pixel % width * s;
    }
    __syncthreads();
    for (int run = threadIdx.x / 32; run < taken * factor; run += blockDim.x / 32) {
        int pixel = run / factor, place = run % factor;
        i64 target = targets[pixel] + place / (s * s) * out_frame + place / s % s * out_width + place % s;
        if (target < 0) continue;
        for (int c = threadIdx.x % 32; c < here; c += 32) {
            out[target * channels + first_channel + c] = tile[padded((pixel * here + c) * factor + place)];
        }
    }
}
FOR_BOTH(depth_to_space_time,
         (const T* x, T* out, int count, int height, int width, int channels, int st, int s, int drop, int of,
          int pixels),
         (x, out, count, height, width, channels, st, s, drop, of, pixels))

// 255 · clamp((x + 1) / 2, 0, 1), and 0 for NaN.
__device__ inline float level(float x) {
    x = (x + 1.0f) / 2.0f;
    return x > 0.0f ? 255.0f * (x < 1.0f ? x : 1.0f) : 0.0f;
}

// Truncated.
template <class T> __device__ void to_rgb8_kernel(const T* x, unsigned char* out, i64 count) {
    for (i64 i = first_value(); i < count; i += next_value()) out[i] = (unsigned char)level(to_f32(x[i]));
}
FOR_BOTH(to_rgb8, (const T* x, unsigned char* out, i64 count), (x, out, count))

// 257 times as much, truncated.
template <class T> __device__ void to_rgb16_kernel(const T* x, u16* out, i64 count) {
    for (i64 i = first_value(); i < count; i += next_value()) out[i] = (u16)(257.0f * level(to_f32(x[i])));
}
FOR_BOTH(to_rgb16, (const T* x, u16* out, i64 count), (x, out, count))
