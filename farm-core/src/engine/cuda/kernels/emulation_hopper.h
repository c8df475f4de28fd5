// Hopper's own instructions on the processor, behind `emulation.h`: what `hopper.cuh` calls where there is no GPU. Layouts
// are those of the PTX ISA: matrix descriptors are taken apart bit by bit, the swizzle is of bits of addresses.
//
// What is asynchronous is done as late as it may be, so that whoever does not wait for it reads NaN, or dies: a tile arrives
// when a thread waits for its barrier, and from the asking to then there is NaN where it will be; a product reads shared
// memory when its warpgroup waits for it, and from its start to then its sums are NaN.
#include <array>
#include <map>

namespace emulated {

// As the kernels' own.
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;

// ---- shared memory ----

// An instruction's address of shared memory counts from here, so that its low bits are those of a GPU.
inline unsigned char* shared_start() { return (unsigned char*)((size_t)block->shared.data() & ~(size_t)1023); }

inline u32 shared_address(const void* at) { return (u32)((const unsigned char*)at - shared_start()); }

inline unsigned char* shared_at(u64 address, size_t bytes) {
    size_t first = block->shared.data() - shared_start(), size = block->shared.size() - 16;
    if (address < first || address + bytes > first + size) die("an address beyond the block's dynamic shared memory");
    return shared_start() + address;
}

inline u64 swizzled_128(u64 address) { return address ^ (address >> 7 & 7) << 4; }

// ---- barriers that count arrivals and bytes ----

// From the lowest bit: arrivals that the phase waits for, arrivals of a phase, bytes that it waits for, the phase's last
// bit. The highest bit is 0, and in memory that nobody has written it is not.
struct Fields {
    u32 pending, arrivals;
    int64_t bytes;
    bool odd;
};

inline std::vector<const u64*>& unfenced() {
    static thread_local std::vector<const u64*> of_thread[MOST_THREADS];
    return of_thread[block->current];
}

inline Fields fields(const u64& barrier) {
    shared_at(shared_address(&barrier), 8);
    if ((size_t)&barrier % 8) die("a barrier at no multiple of 8");
    if (barrier >> 63) die("a barrier that nobody has made");
    return {u32(barrier & 0xfffff), u32(barrier >> 20 & 0xfffff), int64_t(barrier >> 40 & 0x3fffff) - (1 << 21),
            bool(barrier >> 62 & 1)};
}

inline void store(u64& barrier, Fields fields) {
    if (fields.pending == 0 && fields.bytes == 0) {
        fields.pending = fields.arrivals;
        fields.odd = !fields.odd;
        block->progress += 1;
    }
    barrier = fields.pending | (u64)fields.arrivals << 20 | (u64)(fields.bytes + (1 << 21)) << 40 |
              (u64)fields.odd << 62;
}

inline void make_barrier(u64& barrier, int arrivals) {
    shared_at(shared_address(&barrier), 8);
    if (arrivals < 1 || arrivals >= 1 << 20) die("a barrier for no arrivals, or too many");
    barrier = 0;
    store(barrier, {(u32)arrivals, (u32)arrivals, 0, false});
    unfenced().push_back(&barrier);
}

inline void barriers_made() { unfenced().clear(); }

inline void arrive(u64& barrier, int bytes) {
    Fields now = fields(barrier);
    if (bytes < 0 || now.bytes + bytes >= 1 << 20) die("a barrier that waits for too many bytes");
    if (now.pending == 0) die("more arrivals at a barrier than it is made for");
    now.pending -= 1;
    now.bytes += bytes;
    store(barrier, now);
}

// ---- tiles that arrive by themselves ----

// As `Emulation` writes it into the bytes of a CUtensorMap. Sizes and box begin with the dimension whose values lie side by
// side; strides are in bytes, of the others.
struct Map {
    u64 mark, address, sizes[3], strides[2];
    u32 box[3];
};
inline const char MAP[] = "TensorMp";

struct Tile {
    u64* barrier;
    unsigned char* to;
    Map map;
    std::array<int, 3> at;
};

// Of this block, on their way.
inline std::vector<Tile>& tiles() {
    static thread_local std::vector<Tile> of_block;
    return of_block;
}

inline void load_box(void* to, const void* words, u64& barrier, std::array<int, 3> at) {
    Map map;
    std::memcpy(&map, words, sizeof map);
    if (std::memcmp(&map.mark, MAP, 8)) die("no tensor map");
    if ((size_t)words % 64) die("a tensor map at no multiple of 64");
    // TMA wants 128; the matrices of a tile with this swizzle begin at multiples of 1024.
    if (shared_address(to) % 1024) die("a tile at no multiple of 1024");
    fields(barrier);
    auto& hidden = unfenced();
    if (std::count(hidden.begin(), hidden.end(), &barrier)) die("a tile for a barrier that TMA cannot see yet");
    size_t bytes = 2ul * map.box[0] * map.box[1] * map.box[2];
    std::memset(shared_at(shared_address(to), bytes), 0xff, bytes);
    tiles().push_back({&barrier, static_cast<unsigned char*>(to), map, at});
}

inline void deliver(const Tile& tile) {
    const Map& map = tile.map;
    u64 to = shared_address(tile.to);
    for (u32 z = 0; z < map.box[2]; z++) {
        for (u32 y = 0; y < map.box[1]; y++) {
            for (u32 x = 0; x < map.box[0]; x++, to += 2) {
                int64_t at[3] = {tile.at[0] + (int64_t)x, tile.at[1] + (int64_t)y, tile.at[2] + (int64_t)z};
                bool there = true;
                for (int i = 0; i < 3; i++) there = there && at[i] >= 0 && (u64)at[i] < map.sizes[i];
                const void* from = (const void*)(map.address + 2 * at[0] + map.strides[0] * at[1] + map.strides[1] * at[2]);
                if (there) std::memcpy(shared_start() + swizzled_128(to), from, 2);
                else std::memset(shared_start() + swizzled_128(to), 0, 2);
            }
        }
    }
    Fields now = fields(*tile.barrier);
    now.bytes -= 2ul * map.box[0] * map.box[1] * map.box[2];
    if (now.bytes < 0) die("more bytes at a barrier than were announced");
    store(*tile.barrier, now);
}

inline void wait_for(u64& barrier, int parity) {
    while (fields(barrier).odd == (parity & 1)) {
        bool any = false;
        for (size_t i = 0; i < tiles().size();) {
            if (tiles()[i].barrier != &barrier) {
                i += 1;
                continue;
            }
            Tile tile = tiles()[i];
            tiles().erase(tiles().begin() + i);
            deliver(tile);
            any = true;
        }
        if (!any) yield();
    }
}

// ---- products of a warpgroup ----

struct Matrix {
    u32 start, columns, rows;
};

// A matrix descriptor, with the swizzle of 128 bytes.
inline Matrix matrix(u64 descriptor, bool across) {
    if (descriptor >> 62 != 1 || descriptor >> 49 & 7) die("a matrix of another swizzle, or with a base offset");
    if (descriptor & 0x3ff1c000c000c000 & ~(7ull << 49)) die("bits of a matrix that mean nothing");
    Matrix out = {u32(descriptor & 0x3fff) << 4, u32(descriptor >> 16 & 0x3fff) << 4,
                  u32(descriptor >> 32 & 0x3fff) << 4};
    // The base offset is 0: groups of 8 rows begin at multiples of 1024, as the swizzle has them.
    if (out.start % 1024 / 128 || out.rows % 1024 || out.start % (across ? 128 : 32)) {
        die("a matrix that does not begin where its rows do");
    }
    if (across && out.columns % 1024) die("columns of a matrix that do not begin where its rows do");
    return out;
}

inline float bf16_at(u64 address) {
    u16 bits;
    std::memcpy(&bits, shared_at(swizzled_128(address), 2), 2);
    return std::bit_cast<float>((u32)bits << 16);
}

// Element k of the sum, of a row along it or a column across it.
inline float element(const Matrix& matrix, bool across, u32 index, u32 k) {
    if (!across) return bf16_at(matrix.start + index / 8 * matrix.rows + index % 8 * 128 + 2 * k);
    return bf16_at(matrix.start + index / 64 * matrix.columns + k / 8 * matrix.rows + k % 8 * 128 + index % 64 * 2);
}

// A number that no arithmetic leaves as it is, in place of sums that are not there yet.
constexpr u32 UNDER_WAY = 0xffbfffff;

struct Product {
    float* sums;
    int n;
    // Of this thread's two rows, if they come from registers; `registers` are its own.
    bool from_registers;
    float left[2][16];
    const u32* registers;
    u32 held[4];
    u64 left_matrix, right_matrix;
    bool across, keep;
};

struct OfThread {
    bool fenced = false;
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;
    // What sums will be, by where they are.
    std::map<float*, std::vector<float>> sums;
};

inline OfThread& products() {
    static thread_local std::vector<OfThread> of_threads(MOST_THREADS);
    return of_threads[block->current];
}

// Of the four warps of a warpgroup.
inline Barrier& warpgroup() {
    static thread_local Barrier of_groups[MOST_THREADS / 128];
    Barrier& own = of_groups[block->current / 128];
    own.live = 128;
    return own;
}

inline void products_begin() { products().fenced = true; }

inline void multiply(float* sums, int n, const u32* registers, u64 left, u64 right, bool across, bool keep) {
    if (n % 8 || n < 8 || n > 256) die("a product of no such width");
    if (block->dim.x % 128) die("a product of warps that are no warpgroup");
    OfThread& own = products();
    if (!own.fenced) die("a product without a fence before it");
    struct Given {
        u64 left, right;
        u32 registers[4];
    };
    Given mine = {left, right, {}}, all[32];
    if (registers) std::memcpy(mine.registers, registers, sizeof mine.registers);
    gather(mine, all);
    Product product = {sums, n, registers != nullptr, {}, registers, {}, left, right, across, keep};
    std::memcpy(product.held, mine.registers, sizeof product.held);
    unsigned lane = block->current % 32;
    for (const Given& other : all) {
        if (other.left != left || other.right != right) die("lanes of a warp that give different matrices");
    }
    for (unsigned h = 0; h < 2; h++) {
        for (unsigned k = 0; k < 16; k++) {
            u32 pair = all[lane / 4 * 4 + k % 8 / 2].registers[h + k / 8 * 2];
            product.left[h][k] = std::bit_cast<float>(pair >> 16 * (k % 2) << 16);
        }
    }
    matrix(right, across);
    if (!registers) matrix(left, false);
    if (!own.sums.count(sums)) own.sums[sums] = std::vector<float>(sums, sums + n / 2);
    for (int i = 0; i < n / 2; i++) std::memcpy(sums + i, &UNDER_WAY, 4);
    own.open.push_back(product);
}

inline void products_end() {
    OfThread& own = products();
    own.groups.push_back(std::move(own.open));
    own.open.clear();
    own.fenced = false;
}

inline void run(OfThread& own, const Product& product) {
    if (product.from_registers && std::memcmp(product.registers, product.held, sizeof product.held)) {
        die("registers that were written while a product reads them");
    }
    Matrix right = matrix(product.right_matrix, product.across);
    float rows[2][16];
    for (unsigned h = 0; h < 2; h++) {
        for (unsigned k = 0; k < 16; k++) {
            unsigned row = block->current % 128 / 32 * 16 + 8 * h + block->current % 32 / 4;
            rows[h][k] = product.from_registers ? product.left[h][k]
                                                : element(matrix(product.left_matrix, false), false, row, k);
        }
    }
    std::vector<float>& sums = own.sums[product.sums];
    for (int column = 0; column < product.n / 4; column++) {
        u32 at = column / 2 * 8 + block->current % 4 * 2 + column % 2;
        float other[16];
        for (unsigned k = 0; k < 16; k++) other[k] = element(right, product.across, at, k);
        for (unsigned h = 0; h < 2; h++) {
            float& sum = sums[column / 2 * 4 + 2 * h + column % 2];
            if (!product.keep) sum = 0.0f;
            for (unsigned k = 0; k < 16; k++) sum += rows[h][k] * other[k];
        }
    }
}

inline void products_wait(size_t left) {
    // All four warps have started what is waited for.
    wait(warpgroup());
    OfThread& own = products();
    while (own.groups.size() > left) {
        for (const Product& product : own.groups.front()) run(own, product);
        own.groups.erase(own.groups.begin());
    }
    auto used = [&](const std::vector<Product>& group, const float* sums) {
        return std::any_of(group.begin(), group.end(), [&](const Product& product) { return product.sums == sums; });
    };
    for (auto sums = own.sums.begin(); sums != own.sums.end();) {
        auto& [to, values] = *sums;
        bool wanted = used(own.open, to);
        for (const auto& group : own.groups) wanted = wanted || used(group, to);
        if (wanted) {
            ++sums;
            continue;
        }
        for (size_t i = 0; i < values.size(); i++) {
            if (std::memcmp(to + i, &UNDER_WAY, 4)) die("sums that were written while a product is under way");
        }
        std::memcpy(to, values.data(), 4 * values.size());
        sums = own.sums.erase(sums);
    }
    // Nobody goes on to have shared memory written that another warp's part still reads.
    wait(warpgroup());
}

// ---- barriers of the block by number ----

struct Numbered {
    int threads = 0, arrived = 0;
    unsigned long generation = 0;
};

inline Numbered* numbered() {
    static thread_local Numbered of_block[16];
    return of_block;
}

inline void come_to(int number, int threads, bool wait) {
    if (number < 1 || number > 15 || threads % 32 || threads > (int)block->dim.x) die("no such barrier");
    Numbered& barrier = numbered()[number];
    if (barrier.arrived > 0 && barrier.threads != threads) die("a barrier for two numbers of threads");
    barrier.threads = threads;
    unsigned long generation = barrier.generation;
    block->progress += 1;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        barrier.generation += 1;
        return;
    }
    while (wait && barrier.generation == generation) yield();
}

// ---- the end of a block ----

inline void check_end() {
    if (!tiles().empty()) die("a block that ends before its tiles are there");
    for (block->current = 0; block->current < block->dim.x; block->current++) {
        if (!products().open.empty() || !products().groups.empty()) die("a block that ends before its products");
        products().fenced = false;
        unfenced().clear();
    }
    for (int i = 0; i < 16; i++) {
        if (numbered()[i].arrived > 0) die("a barrier that some came to and nobody waited at");
    }
}

}  // namespace emulated
