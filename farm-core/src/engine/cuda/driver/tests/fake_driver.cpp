// A driver without a GPU, for tests of what the driver is asked for. It is as lazy as a driver may be: what is put on a stream
// happens when somebody waits for it and not before. It refuses calls on a thread that has not made the context its own,
// and addresses that it has not given out. Memory is the host's.
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

namespace {

constexpr int SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
              NOT_FOUND = 500;
constexpr size_t MEMORY = 64 << 20;
constexpr unsigned ROOM = 48 << 10, DECLARED = 1 << 10, OPT_IN = CAPABILITY == 90 ? 227 << 10 : 100 << 10;

struct Function {
    std::string name;
    unsigned room = ROOM - DECLARED;
};
struct Event {
    bool timed = false;
    unsigned long at = 0;  // what is on the stream before it
};

std::mutex mutex;
std::map<unsigned long long, size_t> memory;
std::map<void*, size_t> pinned;
// What was freed and not given back to the system.
std::multiset<size_t> kept;
std::set<Event*> events;
std::map<void*, std::map<std::string, Function>> modules;
std::deque<std::function<void()>> queue;
unsigned long queued = 0, done = 0, waits = 0;
int contexts = 0, streams = 0;
unsigned long long threshold = 0;
std::string last_launch;
thread_local bool current = false;

size_t reserved() {
    size_t sum = 0;
    for (auto [_, bytes] : memory) sum += bytes;
    for (size_t bytes : kept) sum += bytes;
    return sum;
}

void put(std::function<void()> work) {
    queue.push_back(std::move(work));
    queued += 1;
}

void run_to(unsigned long end) {
    for (; done < end; done++) {
        queue.front()();
        queue.pop_front();
    }
}

bool holds(unsigned long long address, size_t bytes) {
    auto next = memory.upper_bound(address);
    if (next == memory.begin()) return false;
    auto [start, size] = *std::prev(next);
    return address + bytes <= start + size;
}

}  // namespace

#define CALL extern "C" __attribute__((visibility("default"))) int
#define ENTER                                   \
    std::lock_guard<std::mutex> lock(mutex);    \
    if (!current) return INVALID_CONTEXT;

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
CALL cuDeviceGet(int* device, int index) { return *device = 40 + index, SUCCESS; }
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
CALL cuDeviceGetDefaultMemPool(void** pool, int) { return *pool = &memory, SUCCESS; }
CALL cuDevicePrimaryCtxRetain(void** context, int) { return *context = &contexts, contexts += 1, SUCCESS; }
CALL cuDevicePrimaryCtxRelease_v2(int) { return contexts -= 1, SUCCESS; }
CALL cuCtxSetCurrent(void* context) { return current = context == &contexts, SUCCESS; }

CALL cuStreamCreate(void** stream, unsigned flags) {
    ENTER
    if (flags != 1) return INVALID_VALUE;
    return *stream = &queue, streams += 1, SUCCESS;
}
CALL cuStreamDestroy_v2(void*) {
    ENTER
    run_to(queued);
    return streams -= 1, SUCCESS;
}
CALL cuStreamSynchronize(void* stream) {
    ENTER
    if (stream != &queue) return INVALID_HANDLE;
    waits += 1;
    run_to(queued);
    return SUCCESS;
}
// There is one queue for all streams.
CALL cuStreamWaitEvent(void* stream, Event* event, unsigned flags) {
    ENTER
    if (stream != &queue || !events.count(event) || flags != 0) return INVALID_HANDLE;
    return SUCCESS;
}

CALL cuEventCreate(void** event, unsigned flags) {
    ENTER
    Event* made = new Event;
    made->timed = flags == 0;
    events.insert(made);
    return *event = made, SUCCESS;
}
CALL cuEventDestroy_v2(Event* event) {
    ENTER
    if (!events.erase(event)) return INVALID_HANDLE;
    delete event;
    return SUCCESS;
}
CALL cuEventRecord(Event* event, void* stream) {
    ENTER
    if (!events.count(event) || stream != &queue) return INVALID_HANDLE;
    return event->at = queued, SUCCESS;
}
CALL cuEventSynchronize(Event* event) {
    ENTER
    if (!events.count(event)) return INVALID_HANDLE;
    waits += 1;
    run_to(event->at);
    return SUCCESS;
}
// A millisecond for everything that was on the stream between them.
CALL cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
    ENTER
    if (!start->timed || !end->timed || done < end->at) return INVALID_HANDLE;
    return *milliseconds = (float)(end->at - start->at), SUCCESS;
}

CALL cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER
    return *free = MEMORY - reserved(), *total = MEMORY, SUCCESS;
}
CALL cuMemPoolSetAttribute(void* pool, int which, void* value) {
    if (pool != &memory || which != 4) return INVALID_VALUE;
    return memcpy(&threshold, value, 8), SUCCESS;
}
CALL cuMemPoolGetAttribute(void* pool, int which, void* value) {
    ENTER
    unsigned long long used = 0, all = reserved();
    for (auto [_, bytes] : memory) used += bytes;
    if (pool != &memory || (which != 5 && which != 7)) return INVALID_VALUE;
    return memcpy(value, which == 5 ? &all : &used, 8), SUCCESS;
}
CALL cuMemPoolTrimTo(void* pool, size_t keep) {
    ENTER
    if (pool != &memory || keep != 0) return INVALID_VALUE;
    return kept.clear(), SUCCESS;
}
CALL cuMemAllocAsync(unsigned long long* address, size_t bytes, void* stream) {
    ENTER
    if (stream != &queue || bytes == 0) return INVALID_VALUE;
    auto fitting = kept.find(bytes);
    if (fitting != kept.end()) kept.erase(fitting);
    else if (reserved() + bytes > MEMORY) return OUT_OF_MEMORY;
    *address = (unsigned long long)aligned_alloc(256, (bytes + 255) / 256 * 256);
    return memory[*address] = bytes, SUCCESS;
}
CALL cuMemFreeAsync(unsigned long long address, void* stream) {
    ENTER
    if (stream != &queue || !memory.count(address)) return INVALID_VALUE;
    put([address] {
        if (threshold > 0) kept.insert(memory[address]);
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
CALL cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t bytes, void* stream) {
    ENTER
    if (stream != &queue || !holds(to, bytes)) return INVALID_VALUE;
    bool late = false;
    for (auto [start, size] : pinned) late = late || (from >= start && (char*)from + bytes <= (char*)start + size);
    if (late) return put([=] { memcpy((void*)to, from, bytes); }), SUCCESS;
    std::string staged((const char*)from, bytes);
    return put([=] { memcpy((void*)to, staged.data(), bytes); }), SUCCESS;
}
CALL cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, void* stream) {
    ENTER
    if (stream != &queue || !holds(from, bytes)) return INVALID_VALUE;
    return put([=] { memcpy(to, (void*)from, bytes); }), SUCCESS;
}
CALL cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void* stream) {
    ENTER
    if (stream != &queue || !holds(from, bytes) || !holds(to, bytes)) return INVALID_VALUE;
    return put([=] { memcpy((void*)to, (void*)from, bytes); }), SUCCESS;
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
    if (strcmp(name, "add_f32") != 0 && strcmp(name, "attention_hopper_128") != 0) return NOT_FOUND;
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
                    unsigned threads_z, unsigned shared, void* stream, void** args, void** extra) {
    ENTER
    if (stream != &queue || extra || x * y * z == 0 || threads_y * threads_z != 1) return INVALID_VALUE;
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
    put([=] {
        for (long long i = 0; i < count; i++) out[i] = a[i] + b[i];
    });
    return SUCCESS;
}

// What is not given back, how often somebody waited, and the last launch.
extern "C" __attribute__((visibility("default"))) const char* fake_report() {
    static char text[300];
    snprintf(text, sizeof text, "%zu memory %zu pinned %zu events %zu modules %d streams %d contexts %lu waits %s", memory.size(),
             pinned.size(), events.size(), modules.size(), streams, contexts, waits, last_launch.c_str());
    return text;
}
