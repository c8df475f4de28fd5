// What Hopper (sm_90a) has of its own for products of bf16 tiles, one function for each instruction: tiles of tensors that
// arrive in shared memory by themselves (TMA), barriers that count their bytes (mbarrier), and products of a warpgroup
// that run beside its other work (wgmma). A warpgroup is 128 threads, the first of them a multiple of 128.
//
// Without a GPU a function does what the PTX ISA says of its instruction, as late as that allows: a tile arrives when
// somebody waits for it, a product is made when its warpgroup waits for it. Until then NaN is in their place, so whoever
// does not wait reads NaN. `emulation_hopper.h` has that.
//
// Tiles are of rows of 128 bytes, with the swizzle of 128 bytes: the 16 bytes at address a of a tile are at
// a ^ (a / 128 % 8 · 16). A tile begins at a multiple of 1024.

// What the driver makes of a tensor for TMA (CUtensorMap): here always of bf16, in three dimensions.
struct __align__(64) TensorMap {
    u64 words[16];
};

// In shared memory. Its phases are numbered from 0; one ends when as many threads have arrived as the barrier is made for
// and all bytes are there that were announced.
struct __align__(8) TileBarrier {
    u64 bits;
};

__device__ inline u32 shared_address(const void* at) {
#ifdef EMULATED
    return emulated::shared_address(at);
#else
    return (u32)__cvta_generic_to_shared(at);
#endif
}

// For `arrivals` of every phase. Threads may use it after barriers_made and a barrier of the block.
__device__ inline void make_barrier(TileBarrier* barrier, int arrivals) {
#ifdef EMULATED
    emulated::make_barrier(barrier->bits, arrivals);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// The thread's barriers can be seen by TMA too.
__device__ inline void barriers_made() {
#ifdef EMULATED
    emulated::barriers_made();
#else
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ inline void arrive(TileBarrier* barrier) {
#ifdef EMULATED
    emulated::arrive(barrier->bits, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives, and announces bytes that the phase waits for besides.
__device__ inline void arrive_expecting(TileBarrier* barrier, int bytes) {
#ifdef EMULATED
    emulated::arrive(barrier->bits, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

// Waits for the end of a phase: the one before the barrier's present one, or the present one. `parity` is its number's
// last bit. What arrived in the phase can be read then.
__device__ inline void wait_for(TileBarrier* barrier, int parity) {
#ifdef EMULATED
    emulated::wait_for(barrier->bits, parity);
#else
    u32 done;
    do {
        asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (!done);
#endif
}

// Starts the copying of the map's box at column x of row y of matrix z to `to`, and of its bytes to the barrier's count.
// What is beyond the tensor is 0, and counts too.
__device__ inline void load_box(void* to, const TensorMap* map, TileBarrier* barrier, int x, int y, int z) {
#ifdef EMULATED
    emulated::load_box(to, map->words, barrier->bits, {x, y, z});
#else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
#endif
}

// Where a matrix of bf16 is, as wgmma takes it. If its rows run along the sum (K-major: queries and keys), `rows` is the
// distance of one group of 8 of them to the next, and there are 16 columns at `address`, a multiple of 32 bytes into a
// tile's row. If they run across it (MN-major: values), `rows` is the distance of one group of 8 rows to the next along
// the sum, and `columns` that of one group of 64 columns to the next. Distances and addresses are in bytes.
__device__ inline u64 matrix_at(u32 address, u32 rows, u32 columns) {
    // Start, distances and base offset 0 in units of 16 bytes; the swizzle of 128 bytes is mode 1.
    return (address & 0x3ffff) >> 4 | (u64)(columns >> 4) << 16 | (u64)(rows >> 4) << 32 | 1ull << 62;
}

// A matrix of the same form `bytes` behind another. The sum stays below the 14 bits of an address.
__device__ inline u64 behind(u64 matrix, u32 bytes) { return matrix + (bytes >> 4); }

// All that the warpgroup has in registers may be used by the products that follow. Wanted before the first, and before one
// whose registers were written by anything but a product.
__device__ inline void products_begin() {
#ifdef EMULATED
    emulated::products_begin();
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// The products since the last of these are a group.
__device__ inline void products_end() {
#ifdef EMULATED
    emulated::products_end();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until of the warpgroup's groups at most the last LEFT are not done.
template <int LEFT> __device__ inline void products_wait() {
#ifdef EMULATED
    emulated::products_wait(LEFT);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#endif
}

// The compiler moves no reading or writing of these registers to the other side. It does not know that a product goes on
// after the instruction that starts it, so this stands before products_begin and behind products_wait.
template <int N> __device__ inline void settle(float (&registers)[N]) {
#ifndef EMULATED
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(registers[i])::"memory");
#endif
}

#define REGISTERS_4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define REGISTERS_16(x, i) \
    REGISTERS_4(x, i), REGISTERS_4(x, i + 4), REGISTERS_4(x, i + 8), REGISTERS_4(x, i + 12)
#define REGISTERS_64(x) REGISTERS_16(x, 0), REGISTERS_16(x, 16), REGISTERS_16(x, 32), REGISTERS_16(x, 48)
#define REGISTERS_88(x) REGISTERS_64(x), REGISTERS_16(x, 64), REGISTERS_4(x, 80), REGISTERS_4(x, 84)
#define NUMBERS_64                                                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "   \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NUMBERS_88                                                                                                     \
    NUMBERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
               "%84, %85, %86, %87"

// Starts sums = left·right + (keep ? sums : 0): left 64×16, right 16×N, sums 64×N in f32. Of warp w of the warpgroup and
// lane l, sums[4·n + 2·h + i] is of row 16·w + 8·h + l / 4 and column 8·n + 2·(l % 4) + i. Until products_wait nobody
// touches the registers, nor the shared memory. `keep` is known to the compiler.

// Both sides from shared memory, their rows along the sum.
template <int N> __device__ void multiply_tiles(float (&sums)[N / 2], u64 left, u64 right, bool keep);
// The left side from registers, of which a warp has its 16 rows as mma_bf16 has them; the right side from shared memory,
// its rows across the sum.
template <int N> __device__ void multiply_registers(float (&sums)[N / 2], const u32 (&left)[4], u64 right, bool keep);

#ifdef EMULATED
template <int N> void multiply_tiles(float (&sums)[N / 2], u64 left, u64 right, bool keep) {
    emulated::multiply(sums, N, nullptr, left, right, false, keep);
}
template <int N> void multiply_registers(float (&sums)[N / 2], const u32 (&left)[4], u64 right, bool keep) {
    emulated::multiply(sums, N, left, 0, right, true, keep);
}
#else
template <> __device__ inline void multiply_tiles<176>(float (&sums)[88], u64 left, u64 right, bool keep) {
    asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %90, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n176k16.f32.bf16.bf16 {" NUMBERS_88 "}, %88, %89, keep, 1, 1, 0, 0;\n}"
                 : REGISTERS_88(sums)
                 : "l"(left), "l"(right), "r"((int)keep)
                 : "memory");
}
template <>
__device__ inline void multiply_registers<128>(float (&sums)[64], const u32 (&left)[4], u64 right, bool keep) {
    asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NUMBERS_64
                 "}, {%64, %65, %66, %67}, %68, keep, 1, 1, 1;\n}"
                 : REGISTERS_64(sums)
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"((int)keep)
                 : "memory");
}
#endif

// The warpgroup gives registers back, or waits for more until a thread has N. All its threads call it.
template <int N> __device__ inline void fewer_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers of a thread");
#ifndef EMULATED
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N> __device__ inline void more_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers of a thread");
#ifndef EMULATED
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// A barrier of the block, 1 to 15, for `threads` of it: some wait, and some only say that they were here.
__device__ inline void wait_turn(int barrier, int threads) {
#ifdef EMULATED
    emulated::come_to(barrier, threads, true);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}
__device__ inline void pass_turn(int barrier, int threads) {
#ifdef EMULATED
    emulated::come_to(barrier, threads, false);
#else
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}
