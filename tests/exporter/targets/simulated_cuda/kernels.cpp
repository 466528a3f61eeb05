// Kernels: launches are given to their stream, and do nothing.
extern "C" {
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

void **__cudaRegisterFatBinary(void *) { static void *handle; return &handle; }
char __cudaInitModule(void **) { return 1; }
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}

void __cudaRegisterFunction(void **, const char *, char *, const char *, int, void *, void *, void *, void *, int *) {}

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
