// A simulated CUDA runtime: streams, events, memory and captured graphs by CUDA's rules, in this process's memory.
//
// ONNX Runtime's CUDA provider and torch run on it unchanged, so that the order of their calls, the threads they come
// from and what CUDA would refuse can be seen without a GPU. Kernels do nothing; copies and products are computed.
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

#include "gpu.cpp"
#include "memory.cpp"
#include "device.cpp"
#include "streams.cpp"
#include "graphs.cpp"
#include "kernels.cpp"
