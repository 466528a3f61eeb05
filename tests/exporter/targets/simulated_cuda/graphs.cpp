// Captured graphs.
extern "C" {
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
}
