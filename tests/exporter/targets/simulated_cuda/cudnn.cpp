// A simulated cuDNN, of which ONNX Runtime looks up by name what encoders need: descriptors can be made and set, and
// reductions do nothing. Convolutions are not simulated.
#include <cstddef>

namespace {
int one;
}

#define MAKES(name) int name(void **made) { *made = &one; return 0; }
#define DOES_NOTHING(name) int name() { return 0; }

extern "C" {
MAKES(cudnnCreate)
MAKES(cudnnCreateTensorDescriptor)
MAKES(cudnnCreateReduceTensorDescriptor)
DOES_NOTHING(cudnnDestroy)
DOES_NOTHING(cudnnDestroyTensorDescriptor)
DOES_NOTHING(cudnnDestroyReduceTensorDescriptor)
DOES_NOTHING(cudnnSetStream)
DOES_NOTHING(cudnnSetTensorNdDescriptor)
DOES_NOTHING(cudnnSetReduceTensorDescriptor)
DOES_NOTHING(cudnnReduceTensor)
DOES_NOTHING(cudnnSoftmaxForward)

int cudnnGetReductionIndicesSize(void *, void *, void *, void *, size_t *bytes) { *bytes = 0; return 0; }
int cudnnGetReductionWorkspaceSize(void *, void *, void *, void *, size_t *bytes) { *bytes = 0; return 0; }
size_t cudnnGetVersion() { return 91000; }
const char *cudnnGetErrorString(int) { return "a status of the simulated cuDNN"; }
}
