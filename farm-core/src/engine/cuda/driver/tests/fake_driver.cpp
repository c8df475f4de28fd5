// A driver without a GPU, for tests of what the driver is asked for. It is as lazy as a driver may be: what is put on a stream
// happens when somebody waits for it, be it another stream, and not before. It refuses calls on a thread that has not made
// the context its own, and addresses that it has not given out. Memory is the host's.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <tuple>

namespace {

constexpr int FIRST = 40;
constexpr int SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
              NOT_FOUND = 500, PEER_ACCESS_ALREADY_ENABLED = 704;
constexpr size_t MEMORY = 64 << 20;
constexpr unsigned ROOM = 48 << 10, DECLARED = 1 << 10, OPT_IN = CAPABILITY == 90 ? 227 << 10 : 100 << 10;

struct Function {
    std::string name;
    unsigned room = ROOM - DECLARED;
};
struct Gpu {
    int contexts = 0;
    // What was freed and not given back to the system.
    std::multiset<size_t> kept;
    // GPUs that reach this one's memory.
    std::set<int> readers;
    unsigned long long threshold = 0;

    int number() const;
};
struct Stream {
    Gpu* gpu;
    std::deque<std::function<void()>> queue;
    unsigned long queued = 0, done = 0;
};
struct Event {
    Gpu* gpu;
    bool timed = false;
    // What is on the stream before it.
    Stream* stream = nullptr;
    unsigned long at = 0;
};
struct Memory {
    size_t bytes;
    Gpu* gpu;
};

std::mutex mutex;
Gpu gpus[DEVICES + 1];
std::set<Stream*> streams;
std::map<unsigned long long, Memory> memory;
std::map<void*, size_t> pinned;
std::set<Event*> events;
std::map<void*, std::map<std::string, Function>> modules;
unsigned long waits = 0;
std::string last_launch;
thread_local Gpu* current = nullptr;

int Gpu::number() const { return FIRST + (int)(this - gpus); }

size_t used(Gpu* gpu) {
    size_t sum = 0;
    for (auto& [_, one] : memory) sum += one.gpu == gpu ? one.bytes : 0;
    return sum;
}

size_t reserved(Gpu* gpu) {
    size_t sum = used(gpu);
    for (size_t bytes : gpu->kept) sum += bytes;
    return sum;
}

void put(Stream* stream, std::function<void()> work) {
    stream->queue.push_back(std::move(work));
    stream->queued += 1;
}

// Nothing of another stream but what this one waits for.
void run_to(Stream* stream, unsigned long end) {
    while (stream->done < end) {
        auto work = std::move(stream->queue.front());
        stream->queue.pop_front();
        work();
        stream->done += 1;
    }
}

bool holds(Gpu* gpu, unsigned long long address, size_t bytes) {
    auto next = memory.upper_bound(address);
    if (next == memory.begin()) return false;
    auto& [start, one] = *std::prev(next);
    return one.gpu == gpu && address + bytes <= start + one.bytes;
}

// Between GPUs, or within one.
void copy(Gpu* to_gpu, unsigned long long to, Gpu* from_gpu, unsigned long long from, size_t bytes) {
    if (!holds(to_gpu, to, bytes) || !holds(from_gpu, from, bytes)) {
        fprintf(stderr, "fake driver: a copy of memory that is freed\n");
        abort();
    }
    memmove((void*)to, (void*)from, bytes);
}

}  // namespace

#define CALL extern "C" __attribute__((visibility("default"))) int
#define ENTER                                   \
    std::lock_guard<std::mutex> lock(mutex);    \
    if (!current) return INVALID_CONTEXT;
#define ENTER_WITH(stream)                                                                     \
    ENTER                                                                                      \
    if (!streams.count(stream) || (stream)->gpu != current) return INVALID_HANDLE;

CALL cuInit(unsigned) { return DEVICES == 0 ? NO_DEVICE : SUCCESS; }
CALL cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
CALL cuGetErrorName(int code, const char** text) {
    switch (code) {
        case INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; break;
        case INVALID_CONTEXT: *text = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case INVALID_HANDLE: *text = "CUDA_ERROR_INVALID_HANDLE"; break;
        case NOT_FOUND: *text = "CUDA_ERROR_NOT_FOUND"; break;
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}
CALL cuGetErrorString(int code, const char** text) {
    if (code != INVALID_VALUE) return INVALID_VALUE;
    return *text = "invalid argument", SUCCESS;
}
CALL cuDeviceGetCount(int* count) { return *count = DEVICES, SUCCESS; }
CALL cuDeviceGet(int* device, int index) { return *device = FIRST + index, SUCCESS; }
CALL cuDeviceGetName(char* text, int len, int) { return snprintf(text, len, "No GPU at all"), SUCCESS; }
CALL cuDeviceGetPCIBusId(char* text, int len, int) { return snprintf(text, len, "0000:3B:00.0"), SUCCESS; }
CALL cuDeviceGetAttribute(int* value, int which, int) {
    switch (which) {
        case 16: *value = 132; break;
        case 75: *value = CAPABILITY / 10; break;
        case 76: *value = CAPABILITY % 10; break;
        case 97: *value = OPT_IN; break;
        case 115: *value = 1; break;
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}
CALL cuDeviceGetDefaultMemPool(Gpu** pool, int device) { return *pool = &gpus[device - FIRST], SUCCESS; }
CALL cuDevicePrimaryCtxRetain(Gpu** context, int device) {
    std::lock_guard<std::mutex> lock(mutex);
    *context = &gpus[device - FIRST];
    return (*context)->contexts += 1, SUCCESS;
}
CALL cuDevicePrimaryCtxRelease_v2(int device) {
    std::lock_guard<std::mutex> lock(mutex);
    return gpus[device - FIRST].contexts -= 1, SUCCESS;
}
CALL cuCtxSetCurrent(Gpu* context) { return current = context, SUCCESS; }
// Neighbours reach each other, and the first two over NVLink.
CALL cuDeviceCanAccessPeer(int* can, int reader, int owner) { return *can = abs(reader - owner) == 1, SUCCESS; }
CALL cuDeviceGetP2PAttribute(int* value, int which, int reader, int owner) {
    if (which != 3 || abs(reader - owner) != 1) return INVALID_VALUE;
    return *value = reader + owner == 2 * FIRST + 1, SUCCESS;
}
CALL cuCtxEnablePeerAccess(Gpu* owner, unsigned flags) {
    ENTER
    if (flags != 0 || abs(current->number() - owner->number()) != 1) return INVALID_VALUE;
    // As if somebody else in the process had been here.
    return PEER_ACCESS_ALREADY_ENABLED;
}
CALL cuMemPoolSetAccess(Gpu* pool, const int* description, size_t count) {
    ENTER
    auto [kind, reader, flags] = std::tuple(description[0], description[1], description[2]);
    if (count != 1 || kind != 1 || flags != 3 || abs(reader - pool->number()) != 1) return INVALID_VALUE;
    return pool->readers.insert(reader), SUCCESS;
}

CALL cuStreamCreate(Stream** stream, unsigned flags) {
    ENTER
    if (flags != 1) return INVALID_VALUE;
    *stream = new Stream{current, {}};
    return streams.insert(*stream), SUCCESS;
}
CALL cuStreamDestroy_v2(Stream* stream) {
    ENTER_WITH(stream)
    run_to(stream, stream->queued);
    // Others may still wait for it: to them it is one on which all is done.
    return streams.erase(stream), SUCCESS;
}
CALL cuStreamSynchronize(Stream* stream) {
    ENTER_WITH(stream)
    waits += 1;
    return run_to(stream, stream->queued), SUCCESS;
}
CALL cuStreamWaitEvent(Stream* stream, Event* event, unsigned flags) {
    ENTER_WITH(stream)
    if (!events.count(event) || flags != 0) return INVALID_HANDLE;
    if (Stream* other = event->stream) put(stream, [other, at = event->at] { run_to(other, at); });
    return SUCCESS;
}

CALL cuEventCreate(Event** event, unsigned flags) {
    ENTER
    *event = new Event{current, flags == 0};
    return events.insert(*event), SUCCESS;
}
CALL cuEventDestroy_v2(Event* event) {
    ENTER
    if (!events.erase(event)) return INVALID_HANDLE;
    delete event;
    return SUCCESS;
}
CALL cuEventRecord(Event* event, Stream* stream) {
    ENTER_WITH(stream)
    if (!events.count(event) || event->gpu != stream->gpu) return INVALID_HANDLE;
    event->stream = stream;
    return event->at = stream->queued, SUCCESS;
}
CALL cuEventSynchronize(Event* event) {
    ENTER
    if (!events.count(event)) return INVALID_HANDLE;
    waits += 1;
    if (event->stream) run_to(event->stream, event->at);
    return SUCCESS;
}
// A millisecond for everything that was on the stream between them.
CALL cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
    ENTER
    if (!start->timed || !end->timed || !end->stream || end->stream->done < end->at) return INVALID_HANDLE;
    return *milliseconds = (float)(end->at - start->at), SUCCESS;
}

CALL cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER
    return *free = MEMORY - reserved(current), *total = MEMORY, SUCCESS;
}
CALL cuMemPoolSetAttribute(Gpu* pool, int which, void* value) {
    if (which != 4) return INVALID_VALUE;
    return memcpy(&pool->threshold, value, 8), SUCCESS;
}
CALL cuMemPoolGetAttribute(Gpu* pool, int which, void* value) {
    ENTER
    if (which != 5 && which != 7) return INVALID_VALUE;
    unsigned long long bytes = which == 5 ? reserved(pool) : used(pool);
    return memcpy(value, &bytes, 8), SUCCESS;
}
CALL cuMemPoolTrimTo(Gpu* pool, size_t keep) {
    ENTER
    if (keep != 0) return INVALID_VALUE;
    return pool->kept.clear(), SUCCESS;
}
CALL cuMemAllocAsync(unsigned long long* address, size_t bytes, Stream* stream) {
    ENTER_WITH(stream)
    if (bytes == 0) return INVALID_VALUE;
    Gpu* gpu = stream->gpu;
    auto fitting = gpu->kept.find(bytes);
    if (fitting != gpu->kept.end()) gpu->kept.erase(fitting);
    else if (reserved(gpu) + bytes > MEMORY) return OUT_OF_MEMORY;
    *address = (unsigned long long)aligned_alloc(256, (bytes + 255) / 256 * 256);
    return memory[*address] = {bytes, gpu}, SUCCESS;
}
CALL cuMemFreeAsync(unsigned long long address, Stream* stream) {
    ENTER_WITH(stream)
    if (!memory.count(address) || memory[address].gpu != stream->gpu) return INVALID_VALUE;
    put(stream, [address] {
        auto [bytes, gpu] = memory[address];
        if (gpu->threshold > 0) gpu->kept.insert(bytes);
        memory.erase(address);
        free((void*)address);
    });
    return SUCCESS;
}
CALL cuMemAllocHost_v2(void** address, size_t bytes) {
    ENTER
    *address = malloc(bytes);
    return pinned[*address] = bytes, SUCCESS;
}
CALL cuMemFreeHost(void* address) {
    ENTER
    if (!pinned.erase(address)) return INVALID_VALUE;
    return free(address), SUCCESS;
}

// Reads pinned memory late, as a GPU does; what is not pinned is staged at once.
CALL cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t bytes, Stream* stream) {
    ENTER_WITH(stream)
    if (!holds(stream->gpu, to, bytes)) return INVALID_VALUE;
    bool late = false;
    for (auto [start, size] : pinned) late = late || (from >= start && (char*)from + bytes <= (char*)start + size);
    if (late) return put(stream, [=] { memcpy((void*)to, from, bytes); }), SUCCESS;
    std::string staged((const char*)from, bytes);
    return put(stream, [=] { memcpy((void*)to, staged.data(), bytes); }), SUCCESS;
}
CALL cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, Stream* stream) {
    ENTER_WITH(stream)
    if (!holds(stream->gpu, from, bytes)) return INVALID_VALUE;
    return put(stream, [=] { memcpy(to, (void*)from, bytes); }), SUCCESS;
}
CALL cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, Stream* stream) {
    ENTER_WITH(stream)
    Gpu* gpu = stream->gpu;
    if (!holds(gpu, from, bytes) || !holds(gpu, to, bytes)) return INVALID_VALUE;
    return put(stream, [=] { copy(gpu, to, gpu, from, bytes); }), SUCCESS;
}
CALL cuMemcpyPeerAsync(unsigned long long to, Gpu* to_gpu, unsigned long long from, Gpu* from_gpu, size_t bytes,
                       Stream* stream) {
    ENTER_WITH(stream)
    if (!holds(from_gpu, from, bytes) || !holds(to_gpu, to, bytes)) return INVALID_VALUE;
    return put(stream, [=] { copy(to_gpu, to, from_gpu, from, bytes); }), SUCCESS;
}

// Machine code, an ELF file, for the GPU that this is not.
CALL cuModuleLoadData(void** module, const void* image) {
    ENTER
    if (memcmp(image, "\177ELF", 4) != 0) return INVALID_VALUE;
    *module = malloc(1);
    return modules[*module] = {}, SUCCESS;
}
CALL cuModuleUnload(void* module) {
    ENTER
    if (!modules.erase(module)) return INVALID_HANDLE;
    return free(module), SUCCESS;
}
CALL cuModuleGetFunction(void** function, void* module, const char* name) {
    ENTER
    if (strcmp(name, "add_f32") != 0 && strcmp(name, "attention_hopper_128_bf16") != 0) return NOT_FOUND;
    Function& made = modules[module][name];
    made.name = name;
    return *function = &made, SUCCESS;
}
CALL cuFuncGetAttribute(int* value, int which, Function*) {
    ENTER
    if (which != 1) return INVALID_VALUE;
    return *value = DECLARED, SUCCESS;
}
CALL cuFuncSetAttribute(Function* function, int which, int value) {
    ENTER
    if (which != 8 || value < 0 || value + DECLARED > OPT_IN) return INVALID_VALUE;
    return function->room = value, SUCCESS;
}
// Of bf16 in three dimensions, with the swizzle of 128 bytes. What a kernel gets of it is a text.
CALL cuTensorMapEncodeTiled(void* map, int type, unsigned dimensions, unsigned long long address, const unsigned long long* sizes,
                            const unsigned long long* strides, const unsigned* box, const unsigned* every, int interleave,
                            int swizzle, int promotion, int beyond) {
    ENTER
    if ((size_t)map % 64 || type != 9 || dimensions != 3 || interleave || swizzle != 3 || promotion > 3 || beyond) return INVALID_VALUE;
    if (address % 16 || strides[0] % 16 || strides[1] % 16 || 2 * box[0] > 128) return INVALID_VALUE;
    for (int i = 0; i < 3; i++) {
        if (sizes[i] == 0 || box[i] == 0 || box[i] > 256 || every[i] != 1) return INVALID_VALUE;
    }
    snprintf((char*)map, 128, "%llu: %llu %llu %llu, %llu %llu, %u %u %u", address, sizes[0], sizes[1], sizes[2], strides[0],
             strides[1], box[0], box[1], box[2]);
    return SUCCESS;
}
// out = a + b, of all that there is whatever the grid. Of attention only the first two arguments are looked at.
CALL cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                    unsigned threads_z, unsigned shared, Stream* stream, void** args, void** extra) {
    ENTER_WITH(stream)
    if (extra || x * y * z == 0 || threads_y * threads_z != 1) return INVALID_VALUE;
    if (shared > function->room) return INVALID_VALUE;
    char text[200];
    snprintf(text, sizeof text, "%s %u %u %u %u %u", function->name.c_str(), x, y, z, threads, shared);
    last_launch = text;
    if (function->name != "add_f32") {
        last_launch += " " + std::string((const char*)args[0]) + "; " + std::to_string(*(const int*)args[1]);
        return SUCCESS;
    }
    float *a, *b, *out;
    long long count;
    memcpy(&a, args[0], 8);
    memcpy(&b, args[1], 8);
    memcpy(&out, args[2], 8);
    memcpy(&count, args[3], 8);
    put(stream, [=] {
        for (long long i = 0; i < count; i++) out[i] = a[i] + b[i];
    });
    return SUCCESS;
}

// What is not given back, how often somebody waited, and the last launch.
extern "C" __attribute__((visibility("default"))) const char* fake_report() {
    static char text[300];
    int contexts = 0;
    for (Gpu& gpu : gpus) contexts += gpu.contexts;
    snprintf(text, sizeof text, "%zu memory %zu pinned %zu events %zu modules %zu streams %d contexts %lu waits %s", memory.size(),
             pinned.size(), events.size(), modules.size(), streams.size(), contexts, waits, last_launch.c_str());
    return text;
}
// Whether one GPU has access to the memory of another.
extern "C" __attribute__((visibility("default"))) bool fake_reaches(int reader, int owner) {
    return gpus[owner].readers.count(FIRST + reader);
}
