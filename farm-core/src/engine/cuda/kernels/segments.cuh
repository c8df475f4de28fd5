// What kernels of attention share: the keys and values in up to four segments [n, heads, d], those with any keys first.

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

// The keys that are worked on together.
struct Block {
    int segment, start;
    // From `start` to the end of the segment; 0 if there is no such block.
    int keys;
};

#define SEGMENT_PARAMETERS(T)                                                                             \
    const T *k0, const T *v0, int n0, const T *k1, const T *v1, int n1, const T *k2, const T *v2, int n2, \
        const T *k3, const T *v3, int n3
#define SEGMENT_ARGUMENTS {k0, v0, n0, k1, v1, n1, k2, v2, n2, k3, v3, n3}

// In blocks of KEYS, none of which spans two segments. No arrays: what is indexed by a variable would be in memory of the
// thread.
template <class T, int KEYS> struct SegmentsBy {
    const T *k0, *v0;
    int n0;
    const T *k1, *v1;
    int n1;
    const T *k2, *v2;
    int n2;
    const T *k3, *v3;
    int n3;

    __device__ const T* k(int i) const { return i == 0 ? k0 : i == 1 ? k1 : i == 2 ? k2 : k3; }
    __device__ const T* v(int i) const { return i == 0 ? v0 : i == 1 ? v1 : i == 2 ? v2 : v3; }
    __device__ int keys(int i) const { return i == 0 ? n0 : i == 1 ? n1 : i == 2 ? n2 : i == 3 ? n3 : 0; }

    __device__ Block first() const { return {0, 0, n0}; }
    __device__ Block after(Block block) const {
        if (block.keys > KEYS) return {block.segment, block.start + KEYS, block.keys - KEYS};
        return {block.segment + 1, 0, keys(block.segment + 1)};
    }
};
