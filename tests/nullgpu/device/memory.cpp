// SPDX-License-Identifier: Apache-2.0

#include <sys/mman.h>

#include <atomic>
#include <map>
#include <mutex>

#include "model.h"

namespace nullgpu {
namespace {

constexpr int kMaxDevices = 16;

std::mutex mutex;
std::map<uintptr_t, Place> places;
std::atomic<size_t> taken[kMaxDevices];

size_t whole_pages(size_t num_bytes) { return (num_bytes + 4095) / 4096 * 4096; }

void remember(char* begin, size_t num_bytes, Memory memory) {
  const std::lock_guard<std::mutex> lock(mutex);
  places[reinterpret_cast<uintptr_t>(begin)] = {memory, current_device(), begin, num_bytes};
}

}  // namespace

bool take_bytes(size_t num_bytes) {
  std::atomic<size_t>& mine = taken[current_device()];
  if (mine + num_bytes > kMemoryBytes - kReservedBytes) return false;
  mine += num_bytes;
  return true;
}

void give_bytes(size_t num_bytes) { taken[current_device()] -= num_bytes; }

size_t free_bytes() { return kMemoryBytes - kReservedBytes - taken[current_device()]; }

void* allocate(size_t num_bytes, Memory memory) {
  const size_t size = whole_pages(num_bytes == 0 ? 1 : num_bytes);
  if (memory == Memory::kDevice && !take_bytes(size)) return nullptr;
  // Nothing is taken of the host's memory until it is written.
  void* begin = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (begin == MAP_FAILED) return nullptr;
  remember(static_cast<char*>(begin), size, memory);
  return begin;
}

bool release(void* pointer) {
  if (pointer == nullptr) return true;
  Place place;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = places.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == places.end()) return false;
    place = found->second;
    places.erase(found);
  }
  munmap(place.begin, place.num_bytes);
  if (place.memory == Memory::kDevice) taken[place.device] -= place.num_bytes;
  return true;
}

Place place_of(const void* pointer) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto next = places.upper_bound(reinterpret_cast<uintptr_t>(pointer));
  if (next == places.begin()) return {};
  const Place& place = std::prev(next)->second;
  return static_cast<const char*>(pointer) < place.begin + place.num_bytes ? place : Place{};
}

void* reserve(size_t num_bytes) {
  void* begin =
      mmap(nullptr, num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return begin == MAP_FAILED ? nullptr : begin;
}

void unreserve(void* pointer, size_t num_bytes) { munmap(pointer, num_bytes); }

void map(void* pointer, size_t num_bytes) {
  mprotect(pointer, num_bytes, PROT_READ | PROT_WRITE);
  remember(static_cast<char*>(pointer), num_bytes, Memory::kDevice);
}

// Its contents are lost, and who still reads it gets a segmentation fault.
void unmap(void* pointer, size_t num_bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    places.erase(reinterpret_cast<uintptr_t>(pointer));
  }
  madvise(pointer, num_bytes, MADV_DONTNEED);
  mprotect(pointer, num_bytes, PROT_NONE);
}

}  // namespace nullgpu
