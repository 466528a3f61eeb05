// Memory of the device and of the host, and copies.
namespace {

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

}  // namespace

extern "C" {
// Bytes of the device's memory that are allocated.
size_t simulated_held() {
  Held held(lock);
  size_t bytes = 0;
  for (auto &one : device_memory) bytes += one.second;
  return bytes;
}

bool simulated_reachable(const char *call, const void *pointer, size_t bytes) {
  return reachable(call, pointer, bytes);
}

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
}
