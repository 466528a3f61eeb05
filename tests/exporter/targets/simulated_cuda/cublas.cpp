// A simulated cuBLAS: products of matrices of FP32 numbers are computed, the others are given to the stream and do
// nothing. Column-major, as in cuBLAS.
#include <cstdint>
#include <functional>

#include "simulated.h"

namespace {

struct Handle {
  void *stream = nullptr;
  int math_mode = 0;
};

constexpr int success = 0, execution_failed = 13;
constexpr int float32 = 0;  // CUDA_R_32F

int give(Handle *handle, const char *call, std::function<void()> operation) {
  return simulated_give(handle->stream, call, &operation) ? execution_failed : success;
}

int multiply(Handle *handle, bool turn_a, bool turn_b, int m, int n, int k, float alpha, const float *a, int lda,
             int64_t stride_a, const float *b, int ldb, int64_t stride_b, float beta, float *c, int ldc, int64_t stride_c,
             int batch) {
  return give(handle, "cublasGemm", [=] {
    auto spans = [](int rows, int columns, int leading, int64_t stride, int count) {
      return sizeof(float) * (stride * (count - 1) + int64_t{leading} * (columns - 1) + rows);
    };
    if (m == 0 || n == 0 || batch == 0) return;
    if (!simulated_reachable("a product", a, spans(turn_a ? k : m, turn_a ? m : k, lda, stride_a, batch)) ||
        !simulated_reachable("a product", b, spans(turn_b ? n : k, turn_b ? k : n, ldb, stride_b, batch)) ||
        !simulated_reachable("a product", c, spans(m, n, ldc, stride_c, batch)))
      return;
    for (int one = 0; one < batch; one++)
      for (int column = 0; column < n; column++)
        for (int row = 0; row < m; row++) {
          double sum = 0;
          for (int i = 0; i < k; i++)
            sum += double{a[one * stride_a + (turn_a ? i + int64_t{row} * lda : row + int64_t{i} * lda)]} *
                   b[one * stride_b + (turn_b ? column + int64_t{i} * ldb : i + int64_t{column} * ldb)];
          float &result = c[one * stride_c + row + int64_t{column} * ldc];
          result = static_cast<float>(alpha * sum + (beta == 0 ? 0 : beta * result));
        }
  });
}

}  // namespace

extern "C" {
int cublasCreate_v2(Handle **handle) { *handle = new Handle; return success; }
int cublasDestroy_v2(Handle *handle) { delete handle; return success; }
int cublasSetStream_v2(Handle *handle, void *stream) { handle->stream = stream; return success; }
int cublasGetMathMode(Handle *handle, int *mode) { *mode = handle->math_mode; return success; }
int cublasSetMathMode(Handle *handle, int mode) { handle->math_mode = mode; return success; }
int cublasSetWorkspace_v2(Handle *, void *, size_t) { return success; }
int cublasGetPointerMode_v2(Handle *, int *mode) { *mode = 0; return success; }
int cublasSetPointerMode_v2(Handle *, int) { return success; }
const char *cublasGetStatusName(int) { return "a status of the simulated cuBLAS"; }
const char *cublasGetStatusString(int) { return "a status of the simulated cuBLAS"; }

int cublasSgemm_v2(Handle *handle, int turn_a, int turn_b, int m, int n, int k, const float *alpha, const float *a, int lda,
                   const float *b, int ldb, const float *beta, float *c, int ldc) {
  return multiply(handle, turn_a, turn_b, m, n, k, *alpha, a, lda, 0, b, ldb, 0, *beta, c, ldc, 0, 1);
}

int cublasSgemmStridedBatched(Handle *handle, int turn_a, int turn_b, int m, int n, int k, const float *alpha, const float *a,
                              int lda, long long stride_a, const float *b, int ldb, long long stride_b, const float *beta,
                              float *c, int ldc, long long stride_c, int batch) {
  return multiply(handle, turn_a, turn_b, m, n, k, *alpha, a, lda, stride_a, b, ldb, stride_b, *beta, c, ldc, stride_c, batch);
}

int cublasGemmEx(Handle *handle, int turn_a, int turn_b, int m, int n, int k, const void *alpha, const void *a, int type_a,
                 int lda, const void *b, int type_b, int ldb, const void *beta, void *c, int type_c, int ldc, int, int) {
  if (type_a != float32 || type_b != float32 || type_c != float32) return give(handle, "cublasGemmEx", [] {});
  return multiply(handle, turn_a, turn_b, m, n, k, *static_cast<const float *>(alpha), static_cast<const float *>(a), lda, 0,
                  static_cast<const float *>(b), ldb, 0, *static_cast<const float *>(beta), static_cast<float *>(c), ldc, 0, 1);
}

int cublasGemmStridedBatchedEx(Handle *handle, int turn_a, int turn_b, int m, int n, int k, const void *alpha, const void *a,
                               int type_a, int lda, long long stride_a, const void *b, int type_b, int ldb,
                               long long stride_b, const void *beta, void *c, int type_c, int ldc, long long stride_c,
                               int batch, int, int) {
  if (type_a != float32 || type_b != float32 || type_c != float32) return give(handle, "cublasGemmStridedBatchedEx", [] {});
  return multiply(handle, turn_a, turn_b, m, n, k, *static_cast<const float *>(alpha), static_cast<const float *>(a), lda,
                  stride_a, static_cast<const float *>(b), ldb, stride_b, *static_cast<const float *>(beta),
                  static_cast<float *>(c), ldc, stride_c, batch);
}

int cublasSgeam(Handle *handle, ...) { return give(handle, "cublasSgeam", [] {}); }
int cublasSgemmBatched(Handle *handle, ...) { return give(handle, "cublasSgemmBatched", [] {}); }
int cublasGemmBatchedEx(Handle *handle, ...) { return give(handle, "cublasGemmBatchedEx", [] {}); }
}
