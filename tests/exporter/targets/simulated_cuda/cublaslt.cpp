// A simulated cuBLASLt: its handle can be made and let go, and it has no algorithms.
extern "C" {
int cublasLtCreate(void **handle) { static int one; *handle = &one; return 0; }
int cublasLtDestroy(void *) { return 0; }
}
