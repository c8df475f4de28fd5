// CUDA on the processor, to check kernels where there is no GPU. The threads of a block are fibers of one thread of the
// system: each runs until it waits for the others of its warp or block. Blocks are shared out to several threads.
//
// What it checks: indices (memory beyond a tensor is not mapped), barriers that not all threads reach, values that are read
// before anything wrote them (they are NaN), and the numbers. What it does not: races between warps that no barrier
// orders, and timing.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#define EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__
// A block runs on one thread of the system from its start to its end.
#define __shared__ static thread_local
#define __align__(bytes) alignas(bytes)

struct uint3 {
    unsigned x, y, z;
};

namespace emulated {

constexpr size_t STACK = 256 << 10;
constexpr unsigned MOST_THREADS = 1024;

struct Barrier {
    unsigned arrived = 0, live = 0;
    unsigned long generation = 0;

    void begin(unsigned threads) { *this = Barrier{0, threads, generation}; }
    void open() {
        arrived = 0;
        generation += 1;
    }
    void leave() {
        live -= 1;
        if (arrived > 0 && arrived == live) open();
    }
};

// What lanes of a warp hand each other.
struct Warp {
    Barrier barrier;
    alignas(16) unsigned char values[32][64];
};

struct Fiber {
    jmp_buf state;
    ucontext_t first;
    unsigned char* stack = nullptr;
    uint3 thread;
    bool begun = false, done = false;
};

struct Block {
    std::vector<Fiber> fibers{MOST_THREADS};
    std::vector<Warp> warps{MOST_THREADS / 32};
    Barrier barrier;
    uint3 index, dim, grid;
    unsigned current = 0;
    // Anything that happens counts; a round without any is one that never ends.
    unsigned long progress = 0;
    jmp_buf scheduler;
    ucontext_t scheduler_context;
    std::vector<unsigned char> shared;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
};

inline thread_local Block* block = nullptr;

[[noreturn]] inline void die(const char* why) {
    std::fprintf(stderr, "emulation: %s (block %u %u %u)\n", why, block->index.x, block->index.y, block->index.z);
    std::abort();
}

// Back to the scheduler, until it is this fiber's turn again.
__attribute__((noinline)) inline void yield() {
    Fiber& fiber = block->fibers[block->current];
    if (_setjmp(fiber.state) == 0) _longjmp(block->scheduler, 1);
}

inline void wait(Barrier& barrier) {
    unsigned long generation = barrier.generation;
    block->progress += 1;
    if (++barrier.arrived == barrier.live) {
        barrier.open();
        return;
    }
    while (barrier.generation == generation) yield();
}

inline Warp& warp() { return block->warps[block->current / 32]; }

inline void enter() {
    block->body(block->argument);
    Fiber& fiber = block->fibers[block->current];
    fiber.done = true;
    block->progress += 1;
    warp().barrier.leave();
    block->barrier.leave();
    _longjmp(block->scheduler, 1);
}

// Runs a fiber until it waits or ends.
__attribute__((noinline)) inline void resume(Fiber& fiber) {
    if (_setjmp(block->scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.state, 1);
    fiber.begun = true;
    getcontext(&fiber.first);
    fiber.first.uc_stack = {fiber.stack, 0, STACK};
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, enter, 0);
    setcontext(&fiber.first);
}

// What a block leaves behind that it has to wait for; in `emulation_hopper.h`.
void check_end();

inline void run_block(unsigned threads) {
    block->barrier.begin(threads);
    for (unsigned w = 0; w < (threads + 31) / 32; w++) {
        block->warps[w].barrier.begin(std::min(32u, threads - 32 * w));
    }
    for (unsigned t = 0; t < threads; t++) {
        Fiber& fiber = block->fibers[t];
        if (!fiber.stack) {
            void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (stack == MAP_FAILED) die("no memory for stacks");
            fiber.stack = static_cast<unsigned char*>(stack);
        }
        fiber.begun = fiber.done = false;
        fiber.thread = {t, 0, 0};
    }
    // NaN, as in memory that nothing has written.
    std::fill(block->shared.begin(), block->shared.end(), 0xff);
    for (unsigned left = threads; left > 0;) {
        unsigned long before = block->progress;
        // Warp by warp, each for as long as it gets on without the others.
        for (unsigned first = 0; first < threads; first += 32) {
            unsigned long seen;
            do {
                seen = block->progress;
                for (unsigned t = first; t < std::min(first + 32, threads); t++) {
                    if (block->fibers[t].done) continue;
                    block->current = t;
                    resume(block->fibers[t]);
                    if (block->fibers[t].done) left -= 1;
                }
            } while (block->progress != seen);
        }
        if (left > 0 && block->progress == before) die("threads wait at different barriers");
    }
    check_end();
}

// Which threads a block has, and nothing of them is kept between launches but stacks.
inline Block* blocks_of_this_thread() {
    static thread_local std::unique_ptr<Block> own = std::make_unique<Block>();
    return own.get();
}

template <class F> void run_grid(F body, const unsigned* grid, unsigned threads, unsigned shared) {
    std::atomic<unsigned long> next{0};
    unsigned long count = (unsigned long)grid[0] * grid[1] * grid[2];
    auto work = [&] {
        block = blocks_of_this_thread();
        block->shared.resize(shared + 16);
        block->dim = {threads, 1, 1};
        block->grid = {grid[0], grid[1], grid[2]};
        block->argument = &body;
        block->body = [](void* body) { (*static_cast<F*>(body))(); };
        for (unsigned long i; (i = next++) < count;) {
            block->index = {unsigned(i % grid[0]), unsigned(i / grid[0] % grid[1]), unsigned(i / grid[0] / grid[1])};
            run_block(threads);
        }
    };
    unsigned workers = std::min<unsigned long>(count, std::max(1u, std::thread::hardware_concurrency()));
    std::vector<std::thread> others;
    for (unsigned i = 1; i < workers; i++) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
}

template <class... A, size_t... I>
void launch(void (*kernel)(A...), std::index_sequence<I...>, const unsigned* grid, unsigned threads, unsigned shared, void** args) {
    run_grid([=] { kernel(*static_cast<std::remove_cv_t<A>*>(args[I])...); }, grid, threads, shared);
}

template <class... A>
void launch(void (*kernel)(A...), const unsigned* grid, unsigned threads, unsigned shared, void** args) {
    launch(kernel, std::index_sequence_for<A...>{}, grid, threads, shared, args);
}

// One letter for each parameter: pointer, int, long, float or tensor map.
template <class A> constexpr char letter() {
    if constexpr (std::is_pointer_v<A>) return 'p';
    else if constexpr (sizeof(A) == 128) return 't';
    else if constexpr (std::is_same_v<A, float>) return 'f';
    else if constexpr (std::is_same_v<A, int>) return 'i';
    else if constexpr (std::is_same_v<A, long long>) return 'l';
    else static_assert(!sizeof(A), "a kernel takes pointers, int, i64, float and tensor maps");
}

template <class... A> const char* signature(void (*)(A...)) {
    static const char letters[] = {letter<A>()..., 0};
    return letters;
}

// Every lane gives `value`; what lane `from` gave.
template <class V> V exchange(V value, unsigned from) {
    static_assert(sizeof(V) <= 64);
    Warp& own = warp();
    std::memcpy(own.values[block->current % 32], &value, sizeof(V));
    wait(own.barrier);
    V out;
    std::memcpy(&out, own.values[from % 32], sizeof(V));
    wait(own.barrier);
    return out;
}

// Every lane gives `value`; all of them get those of all.
template <class V> void gather(V value, V (&all)[32]) {
    static_assert(sizeof(V) <= 64);
    Warp& own = warp();
    std::memcpy(own.values[block->current % 32], &value, sizeof(V));
    wait(own.barrier);
    for (unsigned lane = 0; lane < 32; lane++) std::memcpy(&all[lane], own.values[lane], sizeof(V));
    wait(own.barrier);
}

}  // namespace emulated

#define threadIdx (emulated::block->fibers[emulated::block->current].thread)
#define blockIdx (emulated::block->index)
#define blockDim (emulated::block->dim)
#define gridDim (emulated::block->grid)

inline void __syncthreads() { emulated::wait(emulated::block->barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulated::wait(emulated::warp().barrier); }
template <class V> V __shfl_sync(unsigned, V value, int lane) { return emulated::exchange(value, lane); }
template <class V> V __shfl_xor_sync(unsigned, V value, int mask) {
    return emulated::exchange(value, emulated::block->current % 32 ^ mask);
}
template <class V> V __shfl_down_sync(unsigned, V value, unsigned by) {
    unsigned lane = emulated::block->current % 32;
    return emulated::exchange(value, lane + by < 32 ? lane + by : lane);
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float exp2f(float x, int) { return std::exp2(x); }
using std::max;
using std::min;
