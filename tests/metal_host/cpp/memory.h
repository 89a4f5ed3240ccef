// Buffers and threadgroup variables in one reserved range of addresses, 4 GB apart, so that an access outside a buffer
// is seen even when it is far outside. Each element remembers its last write and its last reads.
#pragma once
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "interface.h"
#include "report.h"

namespace host {

constexpr uint64_t SPAN = 1ull << 32, MIDDLE = SPAN / 2;
constexpr uint32_t BUFFERS = 96, VARIABLES = 32, REGIONS = BUFFERS + VARIABLES;

// An access and the barrier intervals it was in. Groups count from 1; 0 is nobody.
struct Event {
  uint32_t group, interval, simd_interval;
  uint16_t thread;
  bool atomic;
  bool several, several_simdgroups, several_groups;  // did it, unordered among themselves; `thread` is the last
};

struct Shadow {
  Event write, read;
  const void* pc;  // of the write, or
  Site site;       // if it was atomic
};

struct Region {
  char name[64];
  uint64_t bytes;
  uint32_t granule;  // bytes of an element
  bool writable, threadgroup, prefilled;
  Shadow* shadow;  // none for what nobody writes
};

inline char* arena;
inline Region regions[REGIONS];

inline char* data(uint32_t region) { return arena + region * SPAN + MIDDLE; }

inline void reserve_arena() {
  void* found = mmap(nullptr, REGIONS * SPAN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) {
    fail("runner", 0, "cannot reserve %zu GB of addresses", size_t(REGIONS * SPAN >> 30));
  }
  arena = static_cast<char*>(found);
}

inline char* open_region(uint32_t index, const char* name, uint64_t bytes, uint32_t granule, bool writable) {
  Region& region = regions[index];
  snprintf(region.name, sizeof region.name, "%s", name);
  region.bytes = bytes;
  region.granule = granule;
  region.writable = writable;
  if (bytes > MIDDLE || (bytes && mprotect(data(index), bytes, PROT_READ | PROT_WRITE) != 0)) {
    fail("runner", 0, "no memory for %s, %zu bytes", name, size_t(bytes));
  }
  if (writable) {
    region.shadow = static_cast<Shadow*>(calloc(bytes / granule + 1, sizeof(Shadow)));
  }
  return data(index);
}

}  // namespace host
