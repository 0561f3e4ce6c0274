// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "model.h"

namespace nullgpu {

struct Capture {
  unsigned long long id;
  Stream* origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool invalid = false;
  std::set<Stream*> streams;
  // Of the streams beside the origin, those whose work it has not waited for.
  std::set<Stream*> unjoined;
  std::vector<Work> nodes;
};

namespace {

// CUDA's own handles of the default streams.
constexpr uintptr_t kMaxDefaultHandle = 2;

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;
std::map<int, Stream> default_streams;
std::set<std::unique_ptr<Stream>> streams;
std::vector<std::unique_ptr<Capture>> captures;  // those under way
int next_stream = 100;
int next_graph = 1;
unsigned long long next_capture = 1;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

bool is_mine(const Capture& capture) { return capture.thread == std::this_thread::get_id(); }

cudaError_t invalidate(Capture& capture, const char* what, const Stream* stream) {
  capture.invalid = true;
  return refuse(what, cudaErrorStreamCaptureUnsupported, stream);
}

}  // namespace

Stream& stream_of(void* handle) {
  const Lock lock(mutex);
  if (reinterpret_cast<uintptr_t>(handle) > kMaxDefaultHandle) {
    return *static_cast<Stream*>(handle);
  }
  const int device = current_device();
  return default_streams.try_emplace(device, Stream{device, device}).first->second;
}

void* create_stream() {
  const Lock lock(mutex);
  auto stream = std::make_unique<Stream>(Stream{next_stream++, current_device()});
  return streams.insert(std::move(stream)).first->get();
}

cudaError_t destroy_stream(void* handle) {
  const Lock lock(mutex);
  const auto found = std::find_if(streams.begin(), streams.end(),
                                  [&](const auto& stream) { return stream.get() == handle; });
  if (found == streams.end()) return cudaErrorInvalidResourceHandle;
  streams.erase(found);
  return cudaSuccess;
}

cudaError_t record_event(Event& event, Stream& stream) {
  const Lock lock(mutex);
  event = {&stream, stream.capture};
  return cudaSuccess;
}

cudaError_t wait_event(Stream& stream, const Event& event) {
  const Lock lock(mutex);
  const bool is_live = std::any_of(captures.begin(), captures.end(), [&](const auto& capture) {
    return capture.get() == event.capture;
  });
  if (!is_live) return cudaSuccess;
  Capture& capture = *event.capture;
  if (stream.capture != nullptr && stream.capture != &capture) {
    capture.invalid = stream.capture->invalid = true;
    return refuse("cudaStreamWaitEvent", cudaErrorStreamCaptureMerge, &stream);
  }
  // A stream that waits for one that is being captured is captured from then on, and stands for it.
  stream.capture = &capture;
  capture.streams.insert(&stream);
  capture.unjoined.erase(event.stream);
  if (&stream != capture.origin) capture.unjoined.insert(&stream);
  return cudaSuccess;
}

cudaError_t begin_capture(Stream& stream, cudaStreamCaptureMode mode) {
  const Lock lock(mutex);
  if (stream.capture != nullptr) {
    return refuse("cudaStreamBeginCapture", cudaErrorIllegalState, &stream);
  }
  if (&stream == &stream_of(nullptr)) {
    return refuse("cudaStreamBeginCapture", cudaErrorStreamCaptureUnsupported, &stream);
  }
  auto capture = std::make_unique<Capture>();
  capture->id = next_capture++;
  capture->origin = &stream;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->streams.insert(&stream);
  stream.capture = capture.get();
  captures.push_back(std::move(capture));
  note("capture", "eager", "begin", &stream);
  return cudaSuccess;
}

cudaError_t end_capture(Stream& stream, Graph** graph) {
  const Lock lock(mutex);
  *graph = nullptr;
  Capture* capture = stream.capture;
  if (capture == nullptr || capture->origin != &stream) {
    return refuse("cudaStreamEndCapture", cudaErrorIllegalState, &stream);
  }
  cudaError_t status = cudaSuccess;
  if (capture->invalid) {
    status = refuse("cudaStreamEndCapture", cudaErrorStreamCaptureInvalidated, &stream);
  } else if (!capture->unjoined.empty()) {
    status = refuse("cudaStreamEndCapture", cudaErrorStreamCaptureUnjoined, &stream);
  } else {
    *graph = new Graph{next_graph++, std::move(capture->nodes)};
  }
  for (Stream* member : capture->streams) member->capture = nullptr;
  captures.erase(std::find_if(captures.begin(), captures.end(),
                              [&](const auto& each) { return each.get() == capture; }));
  note("capture", "eager", "end", &stream);
  return status;
}

cudaStreamCaptureStatus capture_status(const Stream& stream, unsigned long long* id) {
  const Lock lock(mutex);
  if (stream.capture == nullptr) return cudaStreamCaptureStatusNone;
  if (id != nullptr) *id = stream.capture->id;
  return stream.capture->invalid ? cudaStreamCaptureStatusInvalidated
                                 : cudaStreamCaptureStatusActive;
}

cudaStreamCaptureMode exchange_mode(cudaStreamCaptureMode mode) {
  std::swap(mode, thread_mode);
  return mode;
}

cudaError_t check_unsafe(const char* what) {
  const Lock lock(mutex);
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (const auto& capture : captures) {
    const bool forbids =
        capture->mode == cudaStreamCaptureModeGlobal
            ? is_mine(*capture) || thread_mode == cudaStreamCaptureModeGlobal
            : capture->mode == cudaStreamCaptureModeThreadLocal && is_mine(*capture);
    if (forbids) return invalidate(*capture, what, capture->origin);
  }
  return cudaSuccess;
}

cudaError_t synchronize(const char* what, Stream* stream) {
  const Lock lock(mutex);
  for (const auto& capture : captures) {
    if (stream == nullptr || stream->capture == capture.get()) {
      return invalidate(*capture, what, stream);
    }
  }
  note("synchronize", "eager", what, stream);
  return cudaSuccess;
}

cudaError_t submit(Stream& stream, Work work) {
  {
    const Lock lock(mutex);
    if (stream.device != current_device()) {
      return refuse(work.name.c_str(), cudaErrorInvalidResourceHandle, &stream);
    }
    if (Capture* capture = stream.capture) {
      if (capture->invalid) {
        return refuse(work.name.c_str(), cudaErrorStreamCaptureInvalidated, &stream);
      }
      note(work.kind, "captured", work.name, &stream);
      if (&stream != capture->origin) capture->unjoined.insert(&stream);
      capture->nodes.push_back(std::move(work));
      return cudaSuccess;
    }
    const bool is_beside = std::any_of(captures.begin(), captures.end(),
                                       [](const auto& capture) { return is_mine(*capture); });
    note(work.kind, is_beside ? "beside" : "eager", work.name, &stream);
  }
  if (work.run) work.run();
  return cudaSuccess;
}

cudaError_t launch_graph(const Graph& graph, Stream& stream) {
  return submit(stream, {"graph", std::to_string(graph.id), [&graph, &stream] {
                           for (const Work& node : graph.nodes) {
                             note(node.kind, "replayed", node.name, &stream);
                             if (node.run) node.run();
                           }
                         }});
}

}  // namespace nullgpu
