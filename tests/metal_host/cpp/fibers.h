// Each GPU thread is a fiber that gives way at a barrier or a SIMD operation. Threadgroups run one after another.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include "memory.h"

namespace host {

constexpr uint32_t THREADS = 1024, WIDTH = 32;
constexpr size_t STACK = 256 << 10, GUARD = 16 << 10;

enum State { READY, AT_SIMD, AT_SIMD_BARRIER, AT_BARRIER, DONE };

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  char* stack;
  Place place;
  State state;
  const char* operation;  // it waits at
  Site site;
  uint32_t fences, exchanges;
};

struct SimdGroup {
  Lanes lanes[2];  // a fast lane is at most one operation ahead of a slow one
  uint32_t interval[2];
};

inline Fiber fibers[THREADS];
inline SimdGroup simd_groups[THREADS / WIDTH];
inline uint32_t group_size, group_number, current;  // of threads, from 1, index of the running thread
inline uint32_t clock_ticks, intervals[2];          // [device, threadgroup]: barriers passed
inline uint64_t work;                               // accesses and operations, what a run costs
inline jmp_buf home;
inline void* kernel_buffers[BUFFERS];

inline void settle_writes();

inline void give_way(State state) {
  settle_writes();
  Fiber& fiber = fibers[current];
  fiber.state = state;
  if (!_setjmp(fiber.at)) {
    _longjmp(home, 1);
  }
}

// A fiber serves one thread after another. _setjmp is a fast switch once makecontext has made the stack.
inline void fiber_main() {
  for (;;) {
    host_kernel(kernel_buffers, fibers[current].place);
    give_way(DONE);
  }
}

inline void make_stack(Fiber& fiber) {
  void* found = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED || mprotect(found, GUARD, PROT_NONE) != 0) {
    fail("runner", 0, "no memory for a thread's stack");
  }
  fiber.stack = static_cast<char*>(found);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack + GUARD;
  fiber.start.uc_stack.ss_size = STACK - GUARD;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
}

// Runs a thread until it gives way.
inline void resume(uint32_t index) {
  current = index;
  Fiber& fiber = fibers[index];
  if (_setjmp(home)) {
    return;
  }
  if (fiber.stack) {
    _longjmp(fiber.at, 1);
  }
  make_stack(fiber);
  setcontext(&fiber.start);
}

}  // namespace host
