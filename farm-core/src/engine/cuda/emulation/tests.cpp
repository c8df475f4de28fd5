// Cases for `tests.rs`: `main` runs the one of a name. A case that finds a wrong value says so and fails; what the emulation
// refuses ends the process by itself.

#define EXPECT(condition)                                                            \
    if (!(condition)) {                                                              \
        std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                 \
        std::exit(1);                                                                \
    }

constexpr int ROWS = 20, HEADS = 3, D = 128;

bf16 stored[ROWS * HEADS * D];

struct Map : TensorMap {
    // Of `stored`, [ROWS, HEADS, D], with boxes of 64 columns of one head.
    explicit Map(int rows) {
        emulated::Map map = {0, (u64)stored, {D, HEADS, ROWS}, {2 * D, 2 * D * HEADS}, {64, 1, (u32)rows}};
        std::memcpy(&map.mark, emulated::MAP, 8);
        std::memcpy(words, &map, sizeof map);
    }
};

float value(int i, int j) { return (float)((7 * i + 3 * j + i * j) % 17 - 8); }

unsigned char* aligned_memory() {
    DYNAMIC_SHARED(memory);
    return memory + (-shared_address(memory) & 1023);
}

// Row by row with the swizzle of 128 bytes, as the PTX ISA draws it: the chunk of 16 bytes c of row r is at place c ^ r % 8.
bf16& at(unsigned char* tile, int row, int column) {
    return ((bf16*)(tile + 128 * row))[(column / 8 ^ row % 8) * 8 + column % 8];
}

void fill(unsigned char* tile, int rows, int seed) {
    if (threadIdx.x == 0) {
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 64; c++) at(tile, r, c) = to_bf16(value(r + seed, c));
    }
    __syncthreads();
}

// A barrier behind `bytes` of tiles.
TileBarrier* barrier_of(int arrivals, int bytes) {
    auto* barrier = (TileBarrier*)(aligned_memory() + bytes);
    if (threadIdx.x == 0) {
        make_barrier(barrier, arrivals);
        barriers_made();
    }
    __syncthreads();
    return barrier;
}

// ---- what is right ----

// 24 rows from row 5 on, of which there are 15.
void tile() {
    Map map(24);
    for (int i = 0; i < ROWS * HEADS * D; i++) stored[i] = to_bf16(value(i / D, i % D));
    unsigned char* to = aligned_memory();
    TileBarrier* barrier = barrier_of(1, 24 * 128);
    if (threadIdx.x == 0) {
        arrive_expecting(barrier, 24 * 128);
        load_box(to, &map, barrier, 64, 2, 5);
        EXPECT(std::isnan(to_f32(at(to, 3, 3))));
    }
    wait_for(barrier, 0);
    for (int r = 0; r < 24; r++) {
        for (int c = 0; c < 64; c++) {
            EXPECT(to_f32(at(to, r, c)) == (r < 15 ? value((5 + r) * HEADS + 2, 64 + c) : 0.0f));
        }
    }
}

// Three arrivals a phase, by a warp each, and bytes besides in every second: whoever waits does so for all of them.
void phases() {
    static thread_local int arrived;
    TileBarrier* barrier = barrier_of(3, 1024);
    Map map(8);
    // The phase before the first counts as over.
    wait_for(barrier, 1);
    __syncthreads();
    for (int phase = 0; phase < 4; phase++) {
        if (threadIdx.x >= 32 && threadIdx.x % 32 == 0) {
            arrived += 1;
            if (phase % 2 == 1 && threadIdx.x == 64) {
                arrive_expecting(barrier, 1024);
                load_box(aligned_memory(), &map, barrier, 0, 0, 0);
            } else {
                arrive(barrier);
            }
        }
        wait_for(barrier, phase % 2);
        EXPECT(arrived == 3 * (phase + 1));
        __syncthreads();
    }
}

int row_of(int i) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

void product_of_tiles() {
    constexpr int N = 176;
    unsigned char *left = aligned_memory(), *right = left + 64 * 128;
    fill(left, 64, 0);
    fill(right, N, 5);
    u64 a = matrix_at(shared_address(left), 1024, 0), b = matrix_at(shared_address(right), 1024, 0);
    float sums[N / 2];
    for (float& one : sums) one = NAN;
    products_begin();
    for (int c = 0; c < 4; c++) multiply_tiles<N>(sums, behind(a, 32 * c), behind(b, 32 * c), c > 0);
    products_end();
    products_wait<0>();
    for (int i = 0; i < N / 2; i++) {
        float expected = 0.0f;
        for (int k = 0; k < 64; k++) expected += value(row_of(i), k) * value(column_of(i) + 5, k);
        EXPECT(sums[i] == expected);
    }
}

// 32 rows of two tiles of 64 columns, the second of them 40 rows behind the first.
void product_of_registers() {
    constexpr int N = 128, APART = 40 * 128;
    unsigned char* right = aligned_memory();
    fill(right, 32, 2);
    fill(right + APART, 32, 9);
    u64 b = matrix_at(shared_address(right), 1024, APART);
    u32 left[2][4];
    for (int n = 0; n < 2; n++) {
        for (int i = 0; i < 4; i++) {
            int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8, k = 16 * n + threadIdx.x % 4 * 2 + i / 2 * 8;
            left[n][i] = pack_bf16(value(row, k), value(row, k + 1));
        }
    }
    float sums[N / 2];
    for (float& one : sums) one = 3.0f;
    products_begin();
    for (int n = 0; n < 2; n++) multiply_registers<N>(sums, left[n], behind(b, 2048 * n), true);
    products_end();
    products_wait<0>();
    for (int i = 0; i < N / 2; i++) {
        float expected = 3.0f;
        int column = column_of(i);
        for (int k = 0; k < 32; k++) expected += value(row_of(i), k) * value(k + (column < 64 ? 2 : 9), column % 64);
        EXPECT(sums[i] == expected);
    }
}

// Shared memory and sums while a group is waited for and the next is not.
void products_under_way() {
    unsigned char *left = aligned_memory(), *right = left + 64 * 128;
    fill(left, 64, 0);
    fill(right, 8, 1);
    u64 a = matrix_at(shared_address(left), 1024, 0), b = matrix_at(shared_address(right), 1024, 0);
    float first[4], second[4];
    products_begin();
    multiply_tiles<8>(first, a, b, false);
    products_end();
    products_begin();
    multiply_tiles<8>(second, a, b, false);
    products_end();
    EXPECT(std::isnan(first[0]));
    products_wait<1>();
    EXPECT(!std::isnan(first[0]) && std::isnan(second[0]));
    // Written too early: the second product sees it.
    __syncthreads();
    if (threadIdx.x == 0) std::memset(left, 0, 64 * 128);
    __syncthreads();
    products_wait<0>();
    EXPECT(second[0] == 0.0f);
}

// Two warpgroups write by turns.
void turns() {
    static thread_local int order;
    int own = threadIdx.x / 128;
    if (own == 1) pass_turn(1, 256);
    for (int i = 0; i < 3; i++) {
        wait_turn(1 + own, 256);
        if (threadIdx.x % 128 == 0) EXPECT(order++ == 2 * i + own);
        if (own == 0 || i < 2) pass_turn(2 - own, 256);
    }
}

// ---- what is wrong ----

void barrier_not_made() { arrive((TileBarrier*)aligned_memory()); }

void barrier_not_fenced() {
    Map map(8);
    auto* barrier = (TileBarrier*)(aligned_memory() + 1024);
    make_barrier(barrier, 1);
    arrive_expecting(barrier, 1024);
    load_box(aligned_memory(), &map, barrier, 0, 0, 0);
}

void one_arrival_too_many() {
    TileBarrier* barrier = barrier_of(1, 1024);
    arrive_expecting(barrier, 1024);
}

void load(int announced, int offset, int rows) {
    Map map(rows);
    TileBarrier* barrier = barrier_of(1, 2048);
    if (threadIdx.x == 0) {
        arrive_expecting(barrier, announced);
        load_box(aligned_memory() + offset, &map, barrier, 0, 0, 0);
    }
    wait_for(barrier, 0);
}
void bytes_too_few() { load(1023, 0, 8); }
void bytes_too_many() { load(1025, 0, 8); }
void tile_misplaced() { load(1024, 512, 8); }
void tile_beyond() { load(256 * 128, 63 << 10, 256); }

void tile_of_nothing() {
    TensorMap map = {};
    load_box(aligned_memory(), &map, barrier_of(1, 1024), 0, 0, 0);
}

void tile_left() {
    Map map(8);
    TileBarrier* barrier = barrier_of(1, 1024);
    if (threadIdx.x == 0) {
        arrive_expecting(barrier, 1024);
        load_box(aligned_memory(), &map, barrier, 0, 0, 0);
    }
}

// A product of 64 rows with 8; what goes wrong is in between.
struct Product {
    u64 left = matrix_at(shared_address(aligned_memory()), 1024, 0);
    u64 right = matrix_at(shared_address(aligned_memory()), 1024, 1024);
    float sums[64] = {};
    u32 registers[4] = {};

    void of_tiles() {
        products_begin();
        multiply_tiles<128>(sums, left, right, true);
        products_end();
    }
    void of_registers() {
        products_begin();
        multiply_registers<128>(sums, registers, right, true);
        products_end();
    }
    void wait() { products_wait<0>(); }
};

void product_left() { Product().of_tiles(); }
void product_without_fence() {
    Product product;
    multiply_tiles<128>(product.sums, product.left, product.right, true);
}
void product_of_a_warp() {
    if (threadIdx.x >= 32) return;
    Product product;
    product.of_tiles();
    product.wait();
}
void matrix_beyond() {
    Product product;
    product.left = matrix_at(shared_address(aligned_memory()) + (63 << 10), 1024, 0);
    product.of_tiles();
    product.wait();
}
void matrix_misplaced() {
    Product product;
    product.left = behind(product.left, 128);
    product.of_tiles();
}
void matrix_columns_misplaced() {
    Product product;
    product.right = matrix_at(shared_address(aligned_memory()), 1024, 1040);
    product.of_registers();
}
void matrix_without_swizzle() {
    Product product;
    product.right &= ~(3ull << 62);
    product.of_tiles();
}
void matrices_differ() {
    Product product;
    if (threadIdx.x == 7) product.left = behind(product.left, 1024);
    product.of_tiles();
}
void sums_written() {
    Product product;
    product.of_tiles();
    product.sums[5] *= 2.0f;
    product.wait();
}
void registers_written() {
    Product product;
    product.of_registers();
    product.registers[1] += 1;
    product.wait();
}

void turn_left() {
    if (threadIdx.x < 128) pass_turn(1, 256);
}
void turn_of_two_sizes() {
    if (threadIdx.x < 128) pass_turn(1, 256);
    else wait_turn(1, 160);
}

int main(int, char** args) {
    struct Case {
        const char* name;
        void (*kernel)();
        unsigned threads;
    };
#define CASE(name, threads) {#name, name, threads}
    const Case cases[] = {
        CASE(tile, 32), CASE(phases, 128), CASE(product_of_tiles, 128), CASE(product_of_registers, 128),
        CASE(products_under_way, 128), CASE(turns, 256), CASE(barrier_not_made, 32), CASE(barrier_not_fenced, 32),
        CASE(one_arrival_too_many, 32), CASE(bytes_too_few, 32), CASE(bytes_too_many, 32), CASE(tile_misplaced, 32),
        CASE(tile_beyond, 32), CASE(tile_of_nothing, 32), CASE(tile_left, 32), CASE(product_left, 128),
        CASE(product_without_fence, 128), CASE(product_of_a_warp, 128), CASE(matrix_beyond, 128),
        CASE(matrix_misplaced, 128), CASE(matrix_columns_misplaced, 128), CASE(matrix_without_swizzle, 128),
        CASE(matrices_differ, 128), CASE(sums_written, 128), CASE(registers_written, 128), CASE(turn_left, 256),
        CASE(turn_of_two_sizes, 256),
    };
    for (const Case& one : cases) {
        if (std::strcmp(one.name, args[1])) continue;
        unsigned grid[3] = {1, 1, 1};
        emulated::run_grid(one.kernel, grid, one.threads, 64 << 10);
        return 0;
    }
    std::fprintf(stderr, "no case %s\n", args[1]);
    return 2;
}
