// oneDNN's rates for the operations of `farm-node bench kernels`, on one core: what a backend of it would gain.
// Needs a C++ compiler and Debian's libdnnl-dev (2.6); `make bench-onednn` builds and runs it.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <vector>

#include <dnnl.hpp>

using namespace dnnl;
using Tag = memory::format_tag;
constexpr auto F32 = memory::data_type::f32;

static const engine cpu(engine::kind::cpu, 0);
static stream queue(cpu);

// Of four runs, after one that is not counted.
static double best(const std::function<void()> &work) {
    work();
    double least = 1e9;
    for (int run = 0; run < 4; run++) {
        const auto start = std::chrono::steady_clock::now();
        work();
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        least = std::min(least, taken.count());
    }
    return least;
}

static memory filled(const memory::desc &desc) {
    memory made(desc, cpu);
    auto *values = static_cast<float *>(made.get_data_handle());
    for (size_t i = 0; i < desc.get_size() / sizeof(float); i++) values[i] = float(i % 61) / 61 - 0.5f;
    return made;
}

// In the layout that the operation wants, once, as a network would keep it.
static memory arranged(memory from, const memory::desc &desc) {
    memory to(desc, cpu);
    reorder(from, to).execute(queue, from, to);
    queue.wait();
    return to;
}

static void linear(long rows, long width, long out, int weights) {
    const memory::desc x({rows, width}, F32, Tag::ab), stored({width, out}, F32, Tag::ba);
    const memory::desc any({width, out}, F32, Tag::any), y({rows, out}, F32, Tag::ab);
    const matmul::primitive_desc plan(matmul::desc(x, any, y), cpu);
    const matmul product(plan);
    memory from = filled(x), to(y, cpu);
    std::vector<memory> all;
    for (int i = 0; i < weights; i++) all.push_back(arranged(filled(stored), plan.weights_desc()));
    const double seconds = best([&] {
        for (auto &weight : all)
            product.execute(queue, {{DNNL_ARG_SRC, from}, {DNNL_ARG_WEIGHTS, weight}, {DNNL_ARG_DST, to}});
        queue.wait();
    }) / weights;
    std::printf("linear %ldx%ldx%ld: %.2f ms, %.0f GFLOP/s\n", rows, width, out, 1e3 * seconds,
                2e-9 * rows * width * out / seconds);
}

// Two frames more than come out, as a causal convolution has them.
static void convolution(long channels, long frames, long height, long width) {
    const memory::desc x({1, channels, frames + 2, height, width}, F32, Tag::ndhwc);
    const memory::desc y({1, channels, frames, height, width}, F32, Tag::ndhwc), bias({channels}, F32, Tag::a);
    const memory::dims kernel{channels, channels, 3, 3, 3}, one{1, 1, 1}, none{0, 0, 0}, pad{0, 1, 1};
    const convolution_forward::desc wanted(prop_kind::forward_inference, algorithm::convolution_direct, x,
                                           {kernel, F32, Tag::any}, bias, y, one, none, pad, pad);
    const convolution_forward::primitive_desc plan(wanted, cpu);
    const convolution_forward convolve(plan);
    memory from = filled(x), added = filled(bias), to(y, cpu);
    memory weight = arranged(filled({kernel, F32, Tag::abcde}), plan.weights_desc());
    const double seconds = best([&] {
        convolve.execute(queue, {{DNNL_ARG_SRC, from}, {DNNL_ARG_WEIGHTS, weight}, {DNNL_ARG_BIAS, added}, {DNNL_ARG_DST, to}});
        queue.wait();
    });
    std::printf("convolution %ldx%ldx%ld, %ld channels: %.2f ms, %.0f GFLOP/s (%s)\n", frames, height, width, channels,
                1e3 * seconds, 54e-9 * channels * channels * frames * height * width / seconds, plan.impl_info_str());
}

int main() {
    const version_t *version = dnnl_version();
    std::printf("oneDNN %d.%d.%d\n", version->major, version->minor, version->patch);
    linear(6360, 768, 2304, 1);
    linear(6360, 768, 4096, 1);
    linear(6360, 2048, 768, 1);
    // From memory, as in a network.
    linear(40, 1024, 1024, 12);
    linear(40, 1024, 2816, 12);
    linear(40, 2816, 1024, 12);
    convolution(96, 2, 24, 32);
    convolution(64, 4, 96, 128);
    convolution(32, 6, 192, 256);
}
