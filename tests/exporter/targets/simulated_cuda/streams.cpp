// Streams and events.
extern "C" {
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
}
