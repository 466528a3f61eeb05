// What the simulated libraries share.
#pragma once
#include <cstddef>
#include <functional>

extern "C" {
// Give a stream something to do, in order, or record it where the stream is captured. Returns a cudaError_t.
int simulated_give(void *stream, const char *call, std::function<void()> *operation);
bool simulated_reachable(const char *call, const void *pointer, size_t bytes);
}
