// Barriers, SIMD operations and the order in which the threads of a threadgroup run.
#pragma once
#include "hooks.h"

namespace host {

inline const char* state_name(const Fiber& fiber) { return fiber.state == DONE ? "returned" : fiber.operation; }

[[noreturn]] inline void fail_divergent(const Fiber& one, const Fiber& other) {
  char place[256] = "";
  if (other.state != DONE) {
    snprintf(place, sizeof place, " at %s:%d", other.site.file, other.site.line);
  }
  fail(one.site.file, one.site.line, "divergent %s: thread %u of threadgroup %u waits here, thread %u %s%s",
      one.operation, one.place.index, group_number - 1, other.place.index,
      other.state == DONE ? "has returned" : state_name(other), place);
}

inline bool same_site(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.site.line == b.site.line && strcmp(a.site.file, b.site.file) == 0 &&
      strcmp(a.operation, b.operation) == 0;
}

inline void pass(uint32_t interval[2], uint32_t fences) {
  ++clock_ticks;
  for (int kind = 0; kind < 2; ++kind) {
    if (fences >> kind & 1) {
      interval[kind] = clock_ticks;
    }
  }
}

// Lets a SIMD-group go on whose live lanes all wait at the same operation.
inline bool release_simd_group(uint32_t first, uint32_t last) {
  Fiber* waiting = nullptr;
  for (uint32_t i = first; i < last && !waiting; ++i) {
    if (fibers[i].state == AT_SIMD || fibers[i].state == AT_SIMD_BARRIER) {
      waiting = &fibers[i];
    }
  }
  if (!waiting) {
    return false;
  }
  uint32_t active = 0;
  for (uint32_t i = first; i < last; ++i) {
    bool left = fibers[i].state == DONE && waiting->state == AT_SIMD;
    if (!left && !same_site(fibers[i], *waiting)) {
      fail_divergent(*waiting, fibers[i]);
    }
    active |= uint32_t(!left) << (i - first);
  }
  SimdGroup& group = simd_groups[first / WIDTH];
  if (waiting->state == AT_SIMD_BARRIER) {
    pass(group.interval, waiting->fences);
  } else {
    group.lanes[waiting->exchanges & 1].active = active;
  }
  for (uint32_t i = first; i < last; ++i) {
    if (active >> (i - first) & 1) {
      fibers[i].state = READY;
    }
  }
  return true;
}

// Called when no thread can run: either all returned or all are at one barrier.
inline bool release_group() {
  Fiber* waiting = nullptr;
  for (uint32_t i = 0; i < group_size && !waiting; ++i) {
    waiting = fibers[i].state == AT_BARRIER ? &fibers[i] : nullptr;
  }
  if (!waiting) {
    return false;
  }
  for (uint32_t i = 0; i < group_size; ++i) {
    if (!same_site(fibers[i], *waiting)) {
      fail_divergent(*waiting, fibers[i]);
    }
  }
  pass(intervals, waiting->fences);
  for (uint32_t i = 0; i < group_size; ++i) {
    fibers[i].state = READY;
  }
  return true;
}

// Runs the threads whose places are set, in `order`.
inline void run_group(const uint32_t* order) {
  pass(intervals, DEVICE | THREADGROUP);
  for (uint32_t i = 0; i < group_size; ++i) {
    fibers[i].state = READY;
    fibers[i].exchanges = 0;
  }
  for (bool running = true; running;) {
    for (uint32_t i = 0; i < group_size; ++i) {
      if (fibers[order[i]].state == READY) {
        resume(order[i]);
      }
    }
    running = false;
    for (uint32_t first = 0; first < group_size; first += WIDTH) {
      running |= release_simd_group(first, first + WIDTH < group_size ? first + WIDTH : group_size);
    }
    running = running || release_group();
  }
}

}  // namespace host

uint32_t host_lane() { return host::current % host::WIDTH; }

const host::Lanes& host_exchange(
    const char* operation, host::Site site, const void* value, uint32_t bytes, uint32_t argument) {
  using namespace host;
  Fiber& fiber = fibers[current];
  Lanes& lanes = simd_groups[current / WIDTH].lanes[fiber.exchanges & 1];
  memcpy(lanes.value[current % WIDTH], value, bytes);
  lanes.argument[current % WIDTH] = argument;
  fiber.operation = operation;
  fiber.site = site;
  ++work;
  give_way(AT_SIMD);
  ++fiber.exchanges;
  return lanes;
}

void host_barrier(const char* operation, host::Site site, bool whole_group, uint32_t fences) {
  using namespace host;
  Fiber& fiber = fibers[current];
  fiber.operation = operation;
  fiber.site = site;
  fiber.fences = fences;
  ++work;
  give_way(whole_group ? AT_BARRIER : AT_SIMD_BARRIER);
}

void* host_threadgroup(const char* name, uint32_t index, uint64_t bytes, uint32_t granule, host::Site site) {
  using namespace host;
  Region& region = regions[BUFFERS + index];
  if (index >= VARIABLES) {
    fail(site.file, site.line, "more than %u threadgroup variables", VARIABLES);
  }
  if (!region.shadow) {
    open_region(BUFFERS + index, name, bytes, granule, true);
    region.threadgroup = true;
    uint64_t total = 0;
    for (uint32_t i = 0; i < VARIABLES; ++i) {
      total += regions[BUFFERS + i].bytes;
    }
    if (total > 32768) {
      fail(site.file, site.line, "%zu bytes of threadgroup memory, 32768 at most", size_t(total));
    }
  }
  return data(BUFFERS + index);
}
