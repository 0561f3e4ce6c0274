// SPDX-License-Identifier: Apache-2.0

#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>

#include "fiber.h"

namespace ems::emulator {
namespace {

// Turns of waiting threads after which nothing can come any more.
constexpr int kMaxIdleTurns = 1 << 20;
constexpr int64_t kMaxGridYZ = 65535;
constexpr unsigned char kPoison = 0xff;  // NaN in every float format

// Shared memory that a CTA may ask for, in KiB, by compute capability: "maximum amount of shared
// memory per thread block" in the CUDA programming guide's table of technical specifications. Not
// shared_limits.h, which is what the kernels believe.
struct SharedLimit {
  int capability;
  int64_t kib;
};
constexpr SharedLimit kSharedLimits[] = {
    {80, 163},  {86, 99},   {87, 163}, {89, 99},  {90, 227},
    {100, 227}, {103, 227}, {120, 99}, {121, 99},
};

struct CudaThread {
  Thread state;
  Fiber fiber;
};

// One CTA at a time; the threads are kept for the next one.
struct Scheduler {
  std::vector<std::unique_ptr<CudaThread>> threads;
  std::vector<Warp> warps;
  Cta cta;
  int num_threads = 0;
  int current = 0;
  std::vector<int> ready;
  int num_at_cta_barrier = 0;
  int num_idle_turns = 0;
  int num_done = 0;
  Fiber main;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  std::minstd_rand random{2412};

  // A random thread that can go on, made the current one; main when there is none.
  Fiber& next() {
    if (ready.empty() || error != nullptr) return main;
    const size_t pick = random() % ready.size();
    current = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    return threads[current]->fiber;
  }

  void yield() {
    Fiber& self = threads[current]->fiber;
    Fiber& other = next();
    if (&other != &self) self.switch_to(other);
  }
};

thread_local Scheduler scheduler;

void enter() {
  try {
    (*scheduler.body)();
  } catch (...) {
    scheduler.error = std::current_exception();
  }
  Scheduler& s = scheduler;
  ++s.num_done;
  s.yield();
}

void run_cta(const char* name) {
  Scheduler& s = scheduler;
  std::memset(s.cta.shared.data(), kPoison, s.cta.shared.lines.size() * sizeof(SharedLine));
  s.warps.assign((s.num_threads + kWarpSize - 1) / kWarpSize, Warp{});
  s.ready.clear();
  s.num_at_cta_barrier = s.num_done = s.num_idle_turns = 0;
  s.error = nullptr;
  for (int i = 0; i < s.num_threads; ++i) {
    s.threads[i]->state = Thread{};
    s.threads[i]->state.index = i;
    s.threads[i]->fiber.prepare(&enter);
    s.ready.push_back(i);
  }
  s.main.switch_to(s.next());
  if (s.error != nullptr) std::rethrow_exception(s.error);
  if (s.num_done != s.num_threads) {
    throw std::runtime_error(std::string(name) +
                             ": threads wait at a barrier that others passed by");
  }
}

}  // namespace

Thread& thread() { return scheduler.threads[scheduler.current]->state; }
Warp& warp() { return scheduler.warps[scheduler.current / kWarpSize]; }
Cta& cta() { return scheduler.cta; }

void sync_cta() {
  Scheduler& s = scheduler;
  s.num_idle_turns = 0;
  if (++s.num_at_cta_barrier == s.num_threads) {
    s.num_at_cta_barrier = 0;
    for (int i = 0; i < s.num_threads; ++i) s.ready.push_back(i);
  }
  s.yield();
}

void sync_warp() {
  Scheduler& s = scheduler;
  s.num_idle_turns = 0;
  const int first = s.current / kWarpSize * kWarpSize;
  const int size = std::min(kWarpSize, s.num_threads - first);
  if (++warp().num_waiting == size) {
    warp().num_waiting = 0;
    for (int i = first; i < first + size; ++i) s.ready.push_back(i);
  }
  s.yield();
}

void give_way() {
  Scheduler& s = scheduler;
  require(++s.num_idle_turns < kMaxIdleTurns, "threads wait for what never comes");
  s.ready.push_back(s.current);
  s.yield();
}

int compute_capability() {
  const char* value = std::getenv("EMS_EMULATED_CAPABILITY");
  return value == nullptr ? 89 : std::atoi(value);
}

int64_t max_shared_bytes() {
  for (const auto& [capability, kib] : kSharedLimits) {
    if (capability == compute_capability()) return kib << 10;
  }
  throw std::runtime_error("EMS_EMULATED_CAPABILITY=" + std::to_string(compute_capability()) +
                           " is no GPU that the emulator knows");
}

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

void run(const char* name, int64_t x, int64_t y, int64_t z, int num_threads, int64_t shared_bytes,
         const std::function<void()>& body) {
  require(num_threads % kWarpSize == 0 && num_threads <= 1024, "a CTA has 1 to 32 whole warps");
  if (shared_bytes > max_shared_bytes()) {
    throw std::runtime_error(std::string(name) + ": a CTA asks for " +
                             std::to_string(shared_bytes) + " bytes of shared memory, the GPU " +
                             "gives " + std::to_string(max_shared_bytes()));
  }
  require(y <= kMaxGridYZ && z <= kMaxGridYZ, "a grid has at most 65535 CTAs in y and z");
  Scheduler& s = scheduler;
  s.body = &body;
  s.num_threads = num_threads;
  while (static_cast<int>(s.threads.size()) < num_threads) {
    s.threads.push_back(std::make_unique<CudaThread>());
  }
  s.cta.shared.num_bytes = shared_bytes;
  s.cta.shared.lines.resize((shared_bytes + sizeof(SharedLine) - 1) / sizeof(SharedLine));
  for (int64_t cta = 0; cta < x * y * z; ++cta) {
    s.cta.x = cta % x;
    s.cta.y = cta / x % y;
    s.cta.z = cta / x / y;
    run_cta(name);
  }
}

}  // namespace ems::emulator
