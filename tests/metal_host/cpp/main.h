// Reads a call from stdin, runs the grid in several orders of threads, compares the outputs and writes them to stdout.
#pragma once
#include <math.h>
#include <signal.h>

#include "groups.h"

namespace host {

// The same in runner.py.
struct CallHeader {
  uint32_t grid[3], threadgroup[3], buffers, seconds;
};
enum Role { INPUT, OUTPUT, FILLED_OUTPUT };
struct BufferHeader {
  char name[64];
  uint64_t bytes;
  uint32_t granule, role, float32, reserved;
};

struct Output {
  uint32_t region;
  BufferHeader header;
  char *start, *result;
};

inline Output outputs[BUFFERS];
inline uint32_t output_count;

inline void read_exactly(void* to, size_t bytes) {
  if (bytes && fread(to, 1, bytes, stdin) != bytes) {
    fail("runner", 0, "the call ends early");
  }
}

// Endless loops, and what the hooks cannot see: a thread's stack that overflows.
inline void on_signal(int number, siginfo_t*, void* context) {
  const void* at = nullptr;
#if defined(__linux__) && defined(__x86_64__)
  at = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
#elif defined(__linux__) && defined(__aarch64__)
  at = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc + 1);
#endif
  fail_at(at, number == SIGALRM ? "still running when its time is up" : "the process got signal %d", number);
}

inline void catch_signals(uint32_t seconds) {
  static char stack[64 << 10];
  stack_t other = {};
  other.ss_sp = stack;
  other.ss_size = sizeof stack;
  sigaltstack(&other, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int numbers[] = {SIGALRM, SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  for (int number : numbers) {
    sigaction(number, &action, nullptr);
  }
  alarm(seconds);
}

inline void read_buffer(uint32_t index) {
  BufferHeader header;
  read_exactly(&header, sizeof header);
  char* at = open_region(index, header.name, header.bytes, header.granule, header.role != INPUT);
  kernel_buffers[index] = at;
  if (header.role != OUTPUT) {
    read_exactly(at, header.bytes);
  } else {
    memset(at, 0xa5, header.bytes);
  }
  if (header.role != INPUT) {
    regions[index].prefilled = header.role == FILLED_OUTPUT;
    Output& output = outputs[output_count++];
    output = {index, header, static_cast<char*>(malloc(header.bytes)), static_cast<char*>(malloc(header.bytes))};
    memcpy(output.start, at, header.bytes);
  }
}

struct Shuffle {
  uint32_t* order;
  uint64_t state;
  uint32_t next(uint32_t below) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t((state >> 33) % below);
  }
  // kind 0 forward, 1 backward, others shuffled.
  void fill(uint32_t count, int kind) {
    for (uint32_t i = 0; i < count; ++i) {
      order[i] = kind == 1 ? count - 1 - i : i;
    }
    for (uint32_t i = count; kind > 1 && i > 1; --i) {
      uint32_t j = next(i), kept = order[i - 1];
      order[i - 1] = order[j];
      order[j] = kept;
    }
  }
};

inline void place_threads(const CallHeader& call, Triple groups, uint32_t group) {
  const uint32_t *grid = call.grid, *whole = call.threadgroup;
  Triple at = {group % groups.x, group / groups.x % groups.y, group / groups.x / groups.y};
  auto least = [](uint32_t a, uint32_t b) { return a < b ? a : b; };
  Triple size = {least(whole[0], grid[0] - at.x * whole[0]), least(whole[1], grid[1] - at.y * whole[1]),
      least(whole[2], grid[2] - at.z * whole[2])};
  group_size = size.x * size.y * size.z;
  for (uint32_t i = 0; i < group_size; ++i) {
    Triple in = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    fibers[i].place = {{at.x * whole[0] + in.x, at.y * whole[1] + in.y, at.z * whole[2] + in.z}, in, at, size,
        {whole[0], whole[1], whole[2]}, groups, {grid[0], grid[1], grid[2]}, i};
  }
}

inline void run_grid(const CallHeader& call, int kind) {
  auto split = [&](int axis) { return (call.grid[axis] + call.threadgroup[axis] - 1) / call.threadgroup[axis]; };
  Triple groups = {split(0), split(1), split(2)};
  uint32_t count = groups.x * groups.y * groups.z;
  Shuffle group_order{static_cast<uint32_t*>(malloc(count * sizeof(uint32_t))), uint64_t(kind)};
  group_order.fill(count, kind);
  uint32_t threads[THREADS];
  Shuffle thread_order{threads, uint64_t(kind) + 100};
  for (uint32_t i = 0; i < count; ++i) {
    place_threads(call, groups, group_order.order[i]);
    group_number = group_order.order[i] + 1;
    thread_order.fill(group_size, kind);
    run_group(threads);
  }
  free(group_order.order);
}

inline void check_written(const Output& output) {
  const Region& region = regions[output.region];
  for (size_t i = 0; !region.prefilled && i < region.bytes / region.granule; ++i) {
    if (region.shadow[i].write.group == 0) {
      fail("runner", 0, "no thread writes %s[%zu] and there is no init_value", region.name, i);
    }
  }
}

// Equal, or, where float atomics added in another order, equal but for rounding.
inline void compare_with_first(const Output& output) {
  const char* found = data(output.region);
  uint32_t granule = output.header.granule;
  size_t count = output.header.bytes / granule;
  bool tolerant = host_inexact && output.header.float32;
  auto value = [](const char* from, size_t i) {
    float result;
    memcpy(&result, from + 4 * i, 4);
    return result;
  };
  float largest = 0;
  for (size_t i = 0; tolerant && i < count; ++i) {
    largest = fmaxf(largest, fabsf(value(output.result, i)));
  }
  for (size_t i = 0; i < count; ++i) {
    if (memcmp(found + i * granule, output.result + i * granule, granule) == 0) {
      continue;
    }
    float first = tolerant ? value(output.result, i) : 0;
    if (!tolerant || !(fabsf(value(found, i) - first) <= 1e-5f * fabsf(first) + 1e-6f * largest)) {
      const Shadow& last = regions[output.region].shadow[i];
      fail_access(last.pc, last.site, "the order of threads changes %s[%zu]", output.header.name, i);
    }
  }
}

inline void prepare(const Output& output) {
  memcpy(data(output.region), output.start, output.header.bytes);
  memset(regions[output.region].shadow, 0, (output.header.bytes / output.header.granule + 1) * sizeof(Shadow));
}

// Four orders for small calls, two for middling ones, one for big ones.
inline int orders_for(uint64_t cost) { return cost <= 3000000 ? 4 : cost <= 30000000 ? 2 : 1; }

inline void run_call(const CallHeader& call) {
  int orders = 1;
  for (int kind = 0; kind < orders; ++kind) {
    for (uint32_t i = 0; i < output_count; ++i) {
      prepare(outputs[i]);
    }
    run_grid(call, kind);
    for (uint32_t i = 0; i < output_count; ++i) {
      check_written(outputs[i]);
      if (kind == 0) {
        memcpy(outputs[i].result, data(outputs[i].region), outputs[i].header.bytes);
      } else {
        compare_with_first(outputs[i]);
      }
    }
    orders = kind == 0 ? orders_for(work) : orders;
  }
}

}  // namespace host

bool host_inexact;

int main() {
  using namespace host;
  reserve_arena();
  CallHeader call;
  read_exactly(&call, sizeof call);
  for (uint32_t i = 0; i < call.buffers; ++i) {
    read_buffer(i);
  }
  catch_signals(call.seconds);
  run_call(call);
  for (uint32_t i = 0; i < output_count; ++i) {
    fwrite(outputs[i].result, 1, outputs[i].header.bytes, stdout);
  }
  fflush(stdout);
  _exit(0);
}
