// What sm_80 and later have for products of bf16 tiles, one function for each instruction. Without a GPU a function does
// what the PTX ISA says of its instruction: which lane gives which address and holds which element.
//
// All 32 lanes of a warp call the mma and ldmatrix functions together.

// Dynamic shared memory of the block, `bytes` as the launch says, aligned to 128 on a GPU and to 16 in the emulation.
#ifdef EMULATED
#define DYNAMIC_SHARED(name) unsigned char* name = emulated::block->shared.data()
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#ifdef EMULATED
namespace emulated {

inline u16 half_of(u32 pair, int i) { return (u16)(pair >> 16 * i); }

// 16 bytes of shared memory for an instruction that wants them aligned. Beside dynamic memory, nothing else is looked at.
inline void check_shared(const void* address) {
    if ((size_t)address % 16) die("an address in shared memory that is no multiple of 16");
    size_t size = block->shared.size() - 16, offset = (size_t)address - (size_t)block->shared.data();
    if (size && offset + 16 > size) die("an address beyond the block's dynamic shared memory");
}

// Copies a thread has asked for, in groups; the last is open. They are done when they are waited for, and what is copied over
// is NaN until then: on a GPU either may be seen.
struct Copy {
    void* to;
    const void* from;
};
inline std::vector<std::vector<Copy>>& copies() {
    static thread_local std::vector<std::vector<Copy>> of_thread[MOST_THREADS];
    auto& groups = of_thread[block->current];
    if (groups.empty()) groups.emplace_back();
    return groups;
}

}  // namespace emulated
#endif

// Two to the power x, within 2 ulp; subnormal results are 0.
__device__ inline float exp2_approx(float x) {
#ifdef EMULATED
    float out = exp2f(x);
    return out < 0x1p-126f ? 0.0f : out;
#else
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
#endif
}

// Whether any lane of the warp says so.
__device__ inline bool warp_any(bool mine) {
#ifdef EMULATED
    int all[32];
    emulated::gather((int)mine, all);
    for (int one : all) mine = mine || one;
    return mine;
#else
    return __any_sync(0xffffffffu, mine);
#endif
}

// c += a·b: a 16×16, b 16×8, c 16×8 in f32. With g = lane / 4 and t = lane % 4 a lane holds, two columns (of b: rows) in a
// register, the lower one in the lower half,
//   a: [g][2t..], [g + 8][2t..], [g][2t + 8..], [g + 8][2t + 8..]
//   b: [2t..][g], [2t + 8..][g]
//   c: [g][2t], [g][2t + 1], [g + 8][2t], [g + 8][2t + 1]
// The order of the additions, and how a GPU rounds them, is its own; it is the same for every row.
__device__ inline void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#ifdef EMULATED
    struct Given {
        u32 a[4], b[2];
    };
    Given all[32];
    emulated::gather(Given{{a[0], a[1], a[2], a[3]}, {b0, b1}}, all);
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + i / 2 * 8, column = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            u32 left = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], right = all[column * 4 + k % 8 / 2].b[k / 8];
            c[i] += to_f32(bf16{emulated::half_of(left, k % 2)}) * to_f32(bf16{emulated::half_of(right, k % 2)});
        }
    }
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

#ifdef EMULATED
namespace emulated {

// Four 8×8 matrices; lane 8j + i gives where row i of matrix j is.
template <bool TRANSPOSED> void ldmatrix_x4(u32 (&out)[4], const void* row) {
    check_shared(row);
    const void* rows[32];
    gather(row, rows);
    int lane = threadIdx.x % 32;
    for (int j = 0; j < 4; j++) {
        u16 pair[2];
        for (int i = 0; i < 2; i++) {
            int r = lane / 4, c = lane % 4 * 2 + i;
            if (TRANSPOSED) std::swap(r, c);
            pair[i] = static_cast<const u16*>(rows[8 * j + r])[c];
        }
        out[j] = pair[0] | (u32)pair[1] << 16;
    }
    // Nobody goes on to write what another lane still reads.
    wait(warp().barrier);
}

}  // namespace emulated
#endif

// Four 8×8 matrices of bf16 from shared memory: lane 8j + i says where the 16 bytes of row i of matrix j are, and gets of
// matrix j, in out[j], the elements [lane / 4][2·(lane % 4)] and the one after.
__device__ inline void ldmatrix_x4(u32 (&out)[4], const void* row) {
#ifdef EMULATED
    emulated::ldmatrix_x4<false>(out, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}

// The same with every matrix transposed: [2·(lane % 4)][lane / 4] and the element below.
__device__ inline void ldmatrix_x4_trans(u32 (&out)[4], const void* row) {
#ifdef EMULATED
    emulated::ldmatrix_x4<true>(out, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}

// Starts a copy of 16 bytes from global to shared memory, both addresses multiples of 16; zeros if not `there`, and then
// nothing is read. The thread's copies up to a commit are a group.
__device__ inline void cp_async_16(void* to, const void* from, bool there) {
#ifdef EMULATED
    emulated::check_shared(to);
    if (there && (size_t)from % 16) emulated::die("an address in global memory that is no multiple of 16");
    emulated::copies().back().push_back({to, there ? from : nullptr});
    memset(to, 0xff, 16);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
                 : "memory");
#endif
}

__device__ inline void cp_async_commit() {
#ifdef EMULATED
    emulated::copies().emplace_back();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until of this thread's groups at most the last LEFT are not done. Other threads see the copies after a barrier. A
// kernel waits for all of its copies before it ends.
template <int LEFT> __device__ inline void cp_async_wait() {
#ifdef EMULATED
    auto& groups = emulated::copies();
    while (groups.size() > LEFT + 1) {
        for (auto [to, from] : groups.front()) {
            if (from) memcpy(to, from, 16);
            else memset(to, 0, 16);
        }
        groups.erase(groups.begin());
    }
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Where the 16 bytes `chunk` of a row are in a tile whose rows are CHUNKS (4, or a multiple of 8) times 16 bytes, in bytes:
// exchanged within the row such that neither 8 rows' equal chunks (ldmatrix) nor a row's chunks meet in a bank.
template <int CHUNKS> __device__ inline int swizzled(int row, int chunk) {
    static_assert(CHUNKS == 4 || CHUNKS % 8 == 0, "rows of 64 bytes or of whole 128 bytes");
    return 16 * (row * CHUNKS + (chunk ^ (CHUNKS == 4 ? row / 2 % 4 : row % 8)));
}
