// The simulated GPU: its streams, what is captured, and what is refused meanwhile.
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

// The lock guards all that follows, and what streams and events hold.
std::mutex lock;
std::condition_variable progressed;
std::map<uintptr_t, size_t> device_memory, pinned_memory;
std::set<Stream *> streams;
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

// The refused calls, a line each; returns how many there were.
long simulated_refused(char *text, size_t room) {
  Held held(lock);
  std::string all;
  for (auto &line : refused) all += line + "\n";
  std::snprintf(text, room, "%s", all.c_str());
  return static_cast<long>(refused.size());
}

int simulated_give(void *stream, const char *call, std::function<void()> *operation) {
  Held held(lock);
  return answer(give(held, static_cast<cudaStream_t>(stream), call, std::move(*operation)));
}
}
