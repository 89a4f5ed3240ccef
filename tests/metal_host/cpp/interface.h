// What the compiled body and the runtime know of each other. Plain types only: the two are compiled apart.
#pragma once
#include <stdint.h>

namespace host {

struct Triple {
  uint32_t x, y, z;
};

// Where one thread is, for the kernel's attributes.
struct Place {
  Triple position_in_grid, position_in_threadgroup, threadgroup_position;
  Triple threads, dispatched_threads, threadgroups, grid;  // of this threadgroup, of a whole one, in the grid
  uint32_t index;                                          // in the threadgroup
};

// The lanes' values at a SIMD operation. Lanes that returned or do not exist are not active.
struct Lanes {
  unsigned char value[32][16];
  uint32_t argument[32];
  uint32_t active;
};

struct Site {
  const char* file;
  int line;
};

enum Access { READ, WRITE, ATOMIC_READ, ATOMIC_WRITE, ATOMIC_CHANGE };
enum Fence { DEVICE = 1, THREADGROUP = 2 };

}  // namespace host

// Defined by the body.
void host_kernel(void* const* buffers, const host::Place& place);
// Defined by the runtime.
const host::Lanes& host_exchange(
    const char* operation, host::Site site, const void* value, uint32_t bytes, uint32_t argument);
uint32_t host_lane();
void host_barrier(const char* operation, host::Site site, bool whole_group, uint32_t fences);
void host_atomic(const void* address, uint32_t bytes, host::Access access, host::Site site);
void* host_threadgroup(const char* name, uint32_t index, uint64_t bytes, uint32_t granule, host::Site site);
// Float atomics round in the order of the threads: results are then compared with a tolerance.
extern bool host_inexact;
[[noreturn]] void host_fail(host::Site site, const char* text);
