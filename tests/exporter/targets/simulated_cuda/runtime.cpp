// A simulated CUDA runtime: streams, events, memory and captured graphs by CUDA's rules, in this process's memory.
//
// ONNX Runtime's CUDA provider runs on it unchanged, so that the order of its calls, the threads they come from and
// what CUDA would refuse can be seen without a GPU. Kernels do nothing; copies and products of matrices are computed.
//
// Rules: "Stream capture" and "Stream synchronization behavior" in the CUDA Runtime API's reference. Where it does not
// say whether a call is safe while another thread captures in the global mode, the call is refused here.
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <cuda_runtime_api.h>

#include "simulated.h"

namespace {

using Operation = std::function<void()>;

struct Capture {
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  unsigned long long id;
  bool invalidated = false;
  std::vector<Operation> operations;
};

// What is given to a stream is done by a thread of its own, in order, after a short random delay.
struct Stream {
  bool blocking;
  std::deque<Operation> waiting;
  bool ended = false;
  size_t given = 0, done = 0;
  std::unique_ptr<Capture> capture;
  std::condition_variable changed;
  std::thread worker;
};

struct Event {
  size_t recorded = 0, reached = 0;
};

struct Graph {
  std::vector<Operation> operations;
};

// The first lock guards all that follows; the others are taken alone.
std::mutex lock;
std::condition_variable progressed;
std::map<uintptr_t, size_t> device_memory, pinned_memory;
std::set<Stream *> streams;
std::map<const void *, std::string> kernels;
std::map<std::string, long> counts;
std::vector<std::string> refused;
std::map<std::thread::id, int> thread_numbers;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode interaction = cudaStreamCaptureModeGlobal;
cudaError_t sticky = cudaSuccess;
unsigned call_us = 0, operation_us = 0, captured_us = 0;

int thread_number() {
  auto found = thread_numbers.emplace(std::this_thread::get_id(), static_cast<int>(thread_numbers.size()) + 1);
  return found.first->second;
}

cudaError_t answer(cudaError_t error) {
  if (error == cudaSuccess) error = sticky;
  if (error != cudaSuccess) last_error = error;
  return error;
}

void refuse(const std::string &what) {
  refused.push_back("thread " + std::to_string(thread_number()) + ": " + what);
}

void work(Stream *stream) {
  std::minstd_rand random(static_cast<unsigned>(reinterpret_cast<uintptr_t>(stream)));
  std::unique_lock<std::mutex> held(lock);
  while (true) {
    stream->changed.wait(held, [&] { return stream->ended || !stream->waiting.empty(); });
    if (stream->waiting.empty()) return;
    Operation operation = std::move(stream->waiting.front());
    stream->waiting.pop_front();
    held.unlock();
    if (operation_us) std::this_thread::sleep_for(std::chrono::microseconds(random() % operation_us));
    operation();
    held.lock();
    stream->done++;
    progressed.notify_all();
  }
}

Stream *make_stream(bool blocking) {
  auto *stream = new Stream{};
  stream->blocking = blocking;
  stream->worker = std::thread(work, stream);
  streams.insert(stream);
  return stream;
}

Stream *legacy() {
  static Stream *stream = make_stream(true);
  return stream;
}

Stream *stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return legacy();
  return reinterpret_cast<Stream *>(handle);
}

std::shared_ptr<Event> event_of(cudaEvent_t handle) { return *reinterpret_cast<std::shared_ptr<Event> *>(handle); }

void drain(std::unique_lock<std::mutex> &held, Stream *stream) {
  size_t until = stream->given;
  progressed.wait(held, [&] { return stream->done >= until; });
}

void drain_all(std::unique_lock<std::mutex> &held, bool only_blocking) {
  for (Stream *stream : std::vector<Stream *>(streams.begin(), streams.end()))
    if (streams.count(stream) && (stream->blocking || !only_blocking)) drain(held, stream);
}

// Whether a call that is unsafe while something is captured may be made now; if not, the capture is lost.
cudaError_t unsafe(const char *call) {
  cudaError_t result = cudaSuccess;
  if (interaction == cudaStreamCaptureModeRelaxed) return result;
  for (Stream *stream : streams) {
    Capture *capture = stream->capture.get();
    if (!capture || capture->mode == cudaStreamCaptureModeRelaxed) continue;
    bool own = capture->thread == std::this_thread::get_id();
    bool global = capture->mode == cudaStreamCaptureModeGlobal && interaction == cudaStreamCaptureModeGlobal;
    if (own || global) {
      capture->invalidated = true;
      refuse(std::string(call) + (own ? " while it captures" : " while another thread captures"));
      result = cudaErrorStreamCaptureUnsupported;
    }
  }
  return result;
}

cudaStreamCaptureStatus status_of(const Capture *capture) {
  if (!capture) return cudaStreamCaptureStatusNone;
  return capture->invalidated ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

cudaError_t give(std::unique_lock<std::mutex> &held, cudaStream_t handle, const char *call, Operation operation) {
  Stream *stream = stream_of(handle);
  counts[call]++;
  if (stream->capture && captured_us) {
    held.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(captured_us));
    held.lock();
  }
  if (Capture *capture = stream->capture.get()) {
    if (capture->invalidated) return cudaErrorStreamCaptureInvalidated;
    capture->operations.push_back(std::move(operation));
    return cudaSuccess;
  }
  if (stream == legacy())
    for (Stream *other : streams)
      if (other->capture && other->blocking) {
        other->capture->invalidated = true;
        refuse(std::string(call) + " on the legacy stream while a blocking stream is captured");
        return cudaErrorStreamCaptureImplicit;
      }
  if (stream == legacy()) drain_all(held, true);
  else if (stream->blocking) drain(held, legacy());
  stream->waiting.push_back(std::move(operation));
  stream->given++;
  stream->changed.notify_all();
  return cudaSuccess;
}

bool lies_in(const std::map<uintptr_t, size_t> &memory, const void *pointer, size_t bytes) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = memory.upper_bound(address);
  if (after == memory.begin()) return false;
  --after;
  return address + bytes <= after->first + after->second;
}

// What the device touches has to be its own memory and still there.
bool reachable(const char *call, const void *pointer, size_t bytes) {
  std::lock_guard<std::mutex> held(lock);
  if (lies_in(device_memory, pointer, bytes) || lies_in(pinned_memory, pointer, bytes)) return true;
  refuse(std::string(call) + " touches memory that is not the device's, or has been freed");
  sticky = cudaErrorIllegalAddress;
  return false;
}

cudaError_t allocate(std::map<uintptr_t, size_t> &memory, void **pointer, size_t bytes) {
  size_t room = (bytes + 255) / 256 * 256;
  *pointer = std::aligned_alloc(256, room ? room : 256);
  std::memset(*pointer, 0xFF, room ? room : 256);  // as floating-point numbers: NaN
  memory[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
  return cudaSuccess;
}

void release(std::map<uintptr_t, size_t> &memory, void *pointer) {
  if (!pointer) return;
  auto found = memory.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == memory.end()) {
    refuse("freed what is not allocated");
    return;
  }
  std::memset(pointer, 0xFF, found->second);
  memory.erase(found);
  std::free(pointer);
}

void copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
  bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (to_device && !reachable("a copy", to, bytes)) return;
  if (from_device && !reachable("a copy", from, bytes)) return;
  std::memcpy(to, from, bytes);
}

// Pageable memory is read before the call returns.
Operation staged_copy(void *to, const void *from, size_t bytes) {
  auto *begin = static_cast<const char *>(from);
  auto staged = std::make_shared<std::vector<char>>(begin, begin + bytes);
  return [=] { copy(to, staged->data(), bytes, cudaMemcpyHostToDevice); };
}

// The caller's turn, after a short random time of its own: what several threads do meets in many orders.
struct Held : std::unique_lock<std::mutex> {
  explicit Held(std::mutex &mutex) : std::unique_lock<std::mutex>(mutex, std::defer_lock) {
    thread_local std::minstd_rand random(static_cast<unsigned>(std::hash<std::thread::id>{}(std::this_thread::get_id())));
    if (call_us) std::this_thread::sleep_for(std::chrono::microseconds(random() % call_us));
    this->lock();
  }
};

}  // namespace

// What tests ask and say.
extern "C" {
// How long, at most, a call takes; what is given to a stream waits until it is done; recording it takes in a capture.
void simulated_delays(unsigned call, unsigned operation, unsigned captured) {
  call_us = call, operation_us = operation, captured_us = captured;
}

long simulated_count(const char *call) {
  Held held(lock);
  return counts[call];
}

// Bytes of the device's memory that are allocated.
size_t simulated_held() {
  Held held(lock);
  size_t bytes = 0;
  for (auto &one : device_memory) bytes += one.second;
  return bytes;
}

// The refused calls, a line each; returns how many there were.
long simulated_refused(char *text, size_t room) {
  Held held(lock);
  std::string all;
  for (auto &line : refused) all += line + "\n";
  std::snprintf(text, room, "%s", all.c_str());
  return static_cast<long>(refused.size());
}

void simulated_forget() {
  Held held(lock);
  refused.clear();
  counts.clear();
}

int simulated_give(void *stream, const char *call, std::function<void()> *operation) {
  Held held(lock);
  return answer(give(held, static_cast<cudaStream_t>(stream), call, std::move(*operation)));
}

bool simulated_reachable(const char *call, const void *pointer, size_t bytes) {
  return reachable(call, pointer, bytes);
}

// A kernel: y = 2 x + 1, and the sum of each row of x.
int simulated_affine(void *stream, const float *x, float *y, float *total, size_t rows, size_t width) {
  Held held(lock);
  return answer(give(held, static_cast<cudaStream_t>(stream), __func__, [=] {
    size_t bytes = rows * width * sizeof(float);
    if (!reachable("a kernel", x, bytes) || !reachable("a kernel", y, bytes)) return;
    if (!reachable("a kernel", total, rows * sizeof(float))) return;
    for (size_t row = 0; row < rows; row++) {
      float sum = 0;
      for (size_t i = row * width; i < (row + 1) * width; i++) sum += x[i], y[i] = 2 * x[i] + 1;
      total[row] = sum;
    }
  }));
}

// The device.
cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = size_t{8} << 30; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
  std::memset(properties, 0, sizeof *properties);
  std::strcpy(properties->name, "a simulated GPU");
  properties->totalGlobalMem = size_t{8} << 30;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = properties->sharedMemPerMultiprocessor = 101376;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->major = 8;
  properties->minor = 9;
  properties->multiProcessorCount = 64;
  properties->maxThreadsPerMultiProcessor = 1536;
  properties->maxBlocksPerMultiProcessor = 24;
  properties->l2CacheSize = 48 << 20;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = properties.maxThreadsPerBlock; break;
    case cudaDevAttrWarpSize: *value = properties.warpSize; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(properties.sharedMemPerBlock); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(properties.sharedMemPerBlockOptin); break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = properties.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = properties.maxGridSize[0]; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  Held held(lock);
  counts[__func__]++;
  if (auto error = unsafe(__func__)) return answer(error);
  drain_all(held, false);
  return answer(cudaSuccess);
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int room, int) {
  std::snprintf(id, static_cast<size_t>(room), "0000:00:00.0");
  return cudaSuccess;
}

// Errors.
cudaError_t cudaGetLastError() { auto error = last_error; last_error = cudaSuccess; return error; }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    default: return "an error of the simulated GPU";
  }
}

const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureImplicit: return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    default: return "not simulated";
  }
}

// Memory.
cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  Held held(lock);
  counts[__func__]++;
  if (auto error = unsafe(__func__)) return answer(error);
  return answer(allocate(device_memory, pointer, bytes));
}

cudaError_t cudaFree(void *pointer) {
  Held held(lock);
  counts[__func__]++;
  if (auto error = unsafe(__func__)) return answer(error);
  drain_all(held, false);
  release(device_memory, pointer);
  return answer(cudaSuccess);
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned) {
  Held held(lock);
  counts[__func__]++;
  if (auto error = unsafe(__func__)) return answer(error);
  return answer(allocate(pinned_memory, pointer, bytes));
}

cudaError_t cudaMallocHost(void **pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }

cudaError_t cudaFreeHost(void *pointer) {
  Held held(lock);
  counts[__func__]++;
  if (auto error = unsafe(__func__)) return answer(error);
  drain_all(held, false);
  release(pinned_memory, pointer);
  return answer(cudaSuccess);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer) {
  Held held(lock);
  std::memset(attributes, 0, sizeof *attributes);
  if (lies_in(device_memory, pointer, 1)) attributes->type = cudaMemoryTypeDevice;
  else if (lies_in(pinned_memory, pointer, 1)) attributes->type = cudaMemoryTypeHost;
  attributes->devicePointer = attributes->hostPointer = const_cast<void *>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
  Held held(lock);
  if (auto error = unsafe(__func__)) return answer(error);
  bool pageable = kind == cudaMemcpyHostToDevice && !lies_in(pinned_memory, from, bytes);
  auto operation = pageable ? staged_copy(to, from, bytes) : Operation([=] { copy(to, from, bytes, kind); });
  auto error = give(held, nullptr, __func__, std::move(operation));
  // From pageable memory it may return before the device has the bytes.
  if (error == cudaSuccess && !pageable) drain(held, legacy());
  return answer(error);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  Held held(lock);
  bool captured = stream_of(stream)->capture != nullptr;
  if (kind == cudaMemcpyHostToDevice && !captured && !lies_in(pinned_memory, from, bytes))
    return answer(give(held, stream, __func__, staged_copy(to, from, bytes)));
  auto error = give(held, stream, __func__, [=] { copy(to, from, bytes, kind); });
  if (error == cudaSuccess && kind == cudaMemcpyDeviceToHost && !captured && !lies_in(pinned_memory, to, bytes))
    drain(held, stream_of(stream));  // and written when it returns
  return answer(error);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  Held held(lock);
  return answer(give(held, stream, __func__, [=] {
    for (size_t row = 0; row < height; row++)
      copy(static_cast<char *>(to) + row * to_pitch, static_cast<const char *>(from) + row * from_pitch, width, kind);
  }));
}

cudaError_t cudaMemset(void *to, int value, size_t bytes) {
  Held held(lock);
  if (auto error = unsafe(__func__)) return answer(error);
  return answer(give(held, nullptr, __func__, [=] {
    if (reachable("a fill", to, bytes)) std::memset(to, value, bytes);
  }));
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
  Held held(lock);
  return answer(give(held, stream, __func__, [=] {
    if (reachable("a fill", to, bytes)) std::memset(to, value, bytes);
  }));
}

// Streams and events.
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  Held held(lock);
  counts[__func__]++;
  *stream = reinterpret_cast<cudaStream_t>(make_stream(!(flags & cudaStreamNonBlocking)));
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Stream *stream = stream_of(handle);
  {
    Held held(lock);
    counts[__func__]++;
    if (stream->capture) refuse("a stream is destroyed while it is captured");
    drain(held, stream);
    streams.erase(stream);
    stream->ended = true;
    stream->changed.notify_all();
  }
  stream->worker.join();
  return cudaSuccess;  // what it was stays in memory: another thread may be waiting until it is empty
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Held held(lock);
  counts[__func__]++;
  if (auto error = unsafe(__func__)) return answer(error);
  if (stream_of(handle) == legacy()) drain_all(held, true);
  drain(held, stream_of(handle));
  return answer(cudaSuccess);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus *status) {
  Held held(lock);
  *status = status_of(stream_of(handle)->capture.get());
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) { *priority = 0; return cudaSuccess; }

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Held held(lock);
  if (auto error = unsafe(__func__)) return answer(error);
  Stream *stream = stream_of(handle);
  return stream->done < stream->given ? cudaErrorNotReady : answer(cudaSuccess);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **, const cudaGraphEdgeData **, size_t *) {
  Held held(lock);
  Capture *capture = stream_of(handle)->capture.get();
  *status = status_of(capture);
  if (capture && id) *id = capture->id;
  if (graph) *graph = nullptr;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
  std::swap(*mode, interaction);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new std::shared_ptr<Event>(std::make_shared<Event>()));
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

// What streams still have to do with it, they do.
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Held held(lock);
  delete reinterpret_cast<std::shared_ptr<Event> *>(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  Held held(lock);
  auto made = event_of(event);
  if (stream_of(stream)->capture) return answer(cudaErrorNotSupported);  // it would spread the capture to others
  size_t number = ++made->recorded;
  return answer(give(held, stream, "cudaEventRecord", [=] {
    std::lock_guard<std::mutex> again(lock);
    made->reached = number;
    progressed.notify_all();
  }));
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Held held(lock);
  counts[__func__]++;
  if (auto error = unsafe(__func__)) return answer(error);
  auto made = event_of(event);
  size_t until = made->recorded;
  progressed.wait(held, [&] { return made->reached >= until; });
  return answer(cudaSuccess);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  Held held(lock);
  if (auto error = unsafe(__func__)) return answer(error);
  auto made = event_of(event);
  return made->reached < made->recorded ? cudaErrorNotReady : answer(cudaSuccess);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Held held(lock);
  auto made = event_of(event);
  if (stream_of(stream)->capture) return answer(cudaErrorNotSupported);
  size_t until = made->recorded;
  return answer(give(held, stream, __func__, [=] {
    std::unique_lock<std::mutex> again(lock);
    progressed.wait(again, [&] { return made->reached >= until; });
  }));
}

// Captured graphs.
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Held held(lock);
  counts[__func__]++;
  Stream *stream = stream_of(handle);
  if (stream == legacy()) return answer(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return answer(cudaErrorIllegalState);
  stream->capture = std::make_unique<Capture>();
  stream->capture->mode = mode;
  stream->capture->thread = std::this_thread::get_id();
  stream->capture->id = static_cast<unsigned long long>(counts[__func__]);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
  Held held(lock);
  counts[__func__]++;
  Stream *stream = stream_of(handle);
  *graph = nullptr;
  if (!stream->capture) return answer(cudaErrorIllegalState);
  std::unique_ptr<Capture> capture = std::move(stream->capture);
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
    return answer(cudaErrorStreamCaptureWrongThread);
  if (capture->invalidated) return answer(cudaErrorStreamCaptureInvalidated);
  *graph = reinterpret_cast<cudaGraph_t>(new Graph{std::move(capture->operations)});
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long) {
  Held held(lock);
  counts[__func__]++;
  if (auto error = unsafe(__func__)) return answer(error);
  auto *made = new std::shared_ptr<Graph>(std::make_shared<Graph>(*reinterpret_cast<Graph *>(graph)));
  *executable = reinterpret_cast<cudaGraphExec_t>(made);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *nodes) {
  *nodes = reinterpret_cast<Graph *>(graph)->operations.size();
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph *>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  Held held(lock);
  counts[__func__]++;
  if (auto error = unsafe(__func__)) return answer(error);
  delete reinterpret_cast<std::shared_ptr<Graph> *>(executable);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  Held held(lock);
  std::shared_ptr<Graph> graph = *reinterpret_cast<std::shared_ptr<Graph> *>(executable);
  return answer(give(held, stream, __func__, [graph] {
    for (auto &operation : graph->operations) operation();
  }));
}

// Kernels.
void **__cudaRegisterFatBinary(void *) { static void *handle; return &handle; }
char __cudaInitModule(void **) { return 1; }
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}

void __cudaRegisterFunction(void **, const char *function, char *, const char *name, int, void *, void *, void *, void *,
                            int *) {
  Held held(lock);
  kernels[function] = name;
}

struct Configuration { dim3 grid, block; size_t shared; void *stream; };
thread_local std::vector<Configuration> configurations;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  auto last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<void **>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void *>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t stream) {
  Held held(lock);
  return answer(give(held, stream, "cudaLaunchKernel", [] {}));
}

cudaError_t cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t stream) {
  Held held(lock);
  return answer(give(held, stream, __func__, [] {}));
}

cudaError_t cudaLaunchCooperativeKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t stream) {
  Held held(lock);
  return answer(give(held, stream, "cudaLaunchKernel", [] {}));
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *, void **) {
  Held held(lock);
  return answer(give(held, configuration->stream, "cudaLaunchKernel", [] {}));
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  Held held(lock);
  return answer(give(held, stream, __func__, [=] { function(data); }));
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->ptxVersion = attributes->binaryVersion = 89;
  attributes->numRegs = 32;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *status) {
  *function = nullptr;
  if (status) *status = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
}
