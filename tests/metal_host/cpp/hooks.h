// The compiler calls these before each access to memory that is not a plain local (-fsanitize=thread) and where it
// finds undefined behaviour (-fsanitize=undefined). They stand in for the sanitizers' libraries.
#pragma once
#include "fibers.h"

namespace host {

// Who runs, and in which barrier interval for one kind of memory.
inline Event now(bool threadgroup, bool atomic) {
  uint32_t simd_interval = simd_groups[current / WIDTH].interval[threadgroup];
  return {group_number, intervals[threadgroup], simd_interval, uint16_t(current), atomic, false, false, false};
}

// Whether all that `before` stands for comes before `event`: by a barrier, or being the same thread.
inline bool ordered(const Event& before, const Event& event) {
  if (before.group != event.group || before.several_groups) {
    return before.group == 0;
  }
  if (before.interval != event.interval) {
    return true;
  }
  if (before.several_simdgroups || before.thread / WIDTH != event.thread / WIDTH) {
    return false;
  }
  return before.simd_interval != event.simd_interval || (before.thread == event.thread && !before.several);
}

// Adds an event to those of its kind that are not ordered with it.
inline void remember(Event& slot, Event event) {
  event.several_groups = slot.several_groups || (slot.group != 0 && slot.group != event.group);
  if (slot.group == event.group && slot.interval == event.interval) {
    bool same_simdgroup = slot.thread / WIDTH == event.thread / WIDTH;
    event.several_simdgroups = slot.several_simdgroups || !same_simdgroup;
    event.several = slot.simd_interval == event.simd_interval && (slot.several || slot.thread != event.thread);
    event.atomic = event.atomic && slot.atomic;
  }
  slot = event;
}

// A write that races with an access before it, unless it turns out to leave the value as it was.
struct Pending {
  char* address;
  Region* region;
  uint32_t bytes;
  const void* pc;
  Site site;
  Event other;
  const char* what;
  unsigned char before[16];
};

inline Pending pending;

[[noreturn]] __attribute__((format(printf, 3, 4))) inline void fail_access(
    const void* pc, Site site, const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  if (site.file) {
    fail(site.file, site.line, "%s", text);
  }
  fail_at(pc, "%s", text);
}

// `threadgroup tile[3]`, in a buffer that the next call reuses.
inline const char* element_name(const Region& region, int64_t element) {
  static char text[128];
  const char* kind = region.threadgroup ? "threadgroup " : "";
  snprintf(text, sizeof text, "%s%s[%lld]", kind, region.name, static_cast<long long>(element));
  return text;
}

// The sentence of every race: the running thread `verb` what `before` did.
[[noreturn]] inline void fail_race(
    const void* pc, Site site, const char* verb, const char* element, const Event& before, const char* did) {
  char who[64];
  snprintf(who, sizeof who, "thread %u of threadgroup %u", before.thread, before.group - 1);
  bool itself = before.group == group_number && before.thread == current;
  fail_access(pc, site, "race: thread %u of threadgroup %u %s %s that %s %s, no barrier between", current,
      group_number - 1, verb, element, itself ? "other threads" : who, did);
}

inline void settle_writes() {
  Pending& p = pending;
  if (p.bytes && memcmp(p.before, p.address, p.bytes) != 0) {
    int64_t element = (p.address - data(p.region - regions)) / p.region->granule;
    fail_race(p.pc, p.site, "writes", element_name(*p.region, element), p.other, p.what);
  }
  p.bytes = 0;
}

extern "C" char end;  // from the linker: the end of this program's globals

// Globals and the running thread's stack are not checked further.
inline bool harmless(uintptr_t address) {
  uintptr_t stack = uintptr_t(fibers[current].stack), first = uintptr_t(&__executable_start);
  return address - stack < STACK || address - first < uintptr_t(&end) - first;
}

[[noreturn]] inline void fail_far(const void* pc, Site site, const char* verb) {
  fail_access(pc, site, "%s out of bounds, far from every buffer, by thread %u of threadgroup %u", verb, current,
      group_number - 1);
}

inline Region* find_region(uintptr_t address, uint32_t bytes, const void* pc, Site site, const char* verb) {
  uintptr_t offset = address - uintptr_t(arena);
  if (offset >= REGIONS * SPAN) {
    if (!harmless(address)) {
      fail_far(pc, site, verb);
    }
    return nullptr;
  }
  Region& region = regions[offset / SPAN];
  if (region.bytes == 0 && region.granule == 0) {
    fail_far(pc, site, verb);
  }
  int64_t at = int64_t(offset % SPAN) - int64_t(MIDDLE);
  if (at < 0 || uint64_t(at) + bytes > region.bytes) {
    int64_t granule = region.granule;
    int64_t element = (at < 0 ? at - granule + 1 : at) / granule;
    fail_access(pc, site, "%s out of bounds: %s of %zu elements, by thread %u of threadgroup %u", verb,
        element_name(region, element), size_t(region.bytes / granule), current, group_number - 1);
  }
  return &region;
}

// One access to one element.
struct Touch {
  Region& region;
  Shadow& shadow;
  Event event;
  int64_t element;
  const void* pc;
  Site site;
};

inline void check_written(const Touch& t) {
  if (t.shadow.write.group == 0 && !t.region.prefilled) {
    fail_access(t.pc, t.site, "read of %s that nobody has written, by thread %u of threadgroup %u",
        element_name(t.region, t.element), current, group_number - 1);
  }
}

inline void check_read(const Touch& t) {
  const Event& write = t.shadow.write;
  if (!(t.event.atomic && write.atomic) && !ordered(write, t.event)) {
    fail_race(t.pc, t.site, "reads", element_name(t.region, t.element), write, "wrote");
  }
  remember(t.shadow.read, t.event);
}

inline void check_write(const Touch& t) {
  const Event &write = t.shadow.write, &read = t.shadow.read;
  const Event* other = nullptr;
  if (!(t.event.atomic && write.atomic) && !ordered(write, t.event)) {
    other = &write;
  } else if (!(t.event.atomic && read.atomic) && !ordered(read, t.event)) {
    other = &read;
  }
  const char* did = other == &write ? "wrote" : "read";
  if (other && t.event.atomic) {
    fail_race(t.pc, t.site, "atomically changes", element_name(t.region, t.element), *other, did);
  }
  if (other) {
    char* address = data(&t.region - regions) + t.element * t.region.granule;
    pending = {address, &t.region, t.region.granule, t.pc, t.site, *other, did, {}};
    memcpy(pending.before, address, t.region.granule);
    return;
  }
  if (t.event.atomic) {
    remember(t.shadow.write, t.event);
  } else {
    t.shadow.write = t.event;
  }
  t.shadow.pc = t.pc;
  t.shadow.site = t.site;
}

inline void on_access(const void* where, uint32_t bytes, Access access, const void* pc, Site site) {
  settle_writes();
  ++work;
  bool write = access == WRITE || access == ATOMIC_WRITE || access == ATOMIC_CHANGE;
  uintptr_t address = uintptr_t(where);
  Region* region = find_region(address, bytes, pc, site, write ? "write" : "read");
  if (!region) {
    return;
  }
  if (!region->shadow) {
    if (write) {
      fail_access(pc, site, "write to %s, which is not an output", region->name);
    }
    return;
  }
  Event event = now(region->threadgroup, access >= ATOMIC_READ);
  uintptr_t start = address - uintptr_t(data(region - regions));
  for (uint64_t i = start / region->granule; i <= (start + bytes - 1) / region->granule; ++i) {
    Shadow& shadow = region->shadow[i];
    if (region->threadgroup && shadow.write.group != event.group) {
      shadow = {};  // every threadgroup has its own
    }
    Touch touch = {*region, shadow, event, int64_t(i), pc, site};
    if (access != WRITE && access != ATOMIC_WRITE) {
      check_written(touch);
    }
    write ? check_write(touch) : check_read(touch);
  }
}

}  // namespace host

#define HOOK(name, size, access)                                                          \
  extern "C" void __tsan_##name##size(void* address) {                                    \
    host::on_access(address, size, host::access, __builtin_return_address(0), host::Site{}); \
  }
#define HOOKS(size)                              \
  HOOK(read, size, READ)                         \
  HOOK(write, size, WRITE)                       \
  HOOK(volatile_read, size, READ)                \
  HOOK(volatile_write, size, WRITE)              \
  HOOK(unaligned_read, size, READ)               \
  HOOK(unaligned_write, size, WRITE)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" {
void __tsan_read_range(void* address, unsigned long bytes) {
  host::on_access(address, uint32_t(bytes), host::READ, __builtin_return_address(0), host::Site{});
}
void __tsan_write_range(void* address, unsigned long bytes) {
  host::on_access(address, uint32_t(bytes), host::WRITE, __builtin_return_address(0), host::Site{});
}
// clang's, for copies of structs and arrays.
void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
  host::on_access(from, uint32_t(bytes), host::READ, __builtin_return_address(0), host::Site{});
  host::on_access(to, uint32_t(bytes), host::WRITE, __builtin_return_address(0), host::Site{});
  return memmove(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, unsigned long bytes) { return __tsan_memcpy(to, from, bytes); }
void* __tsan_memset(void* to, int value, unsigned long bytes) {
  host::on_access(to, uint32_t(bytes), host::WRITE, __builtin_return_address(0), host::Site{});
  return memset(to, value, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}

void host_atomic(const void* address, uint32_t bytes, host::Access access, host::Site site) {
  host::on_access(address, bytes, access, nullptr, site);
}
void host_fail(host::Site site, const char* text) { fail(site.file, site.line, "%s", text); }

// The data of every handler starts with a SourceLocation.
struct UndefinedAt {
  const char* file;
  uint32_t line, column;
};
[[noreturn]] inline void fail_undefined(const UndefinedAt& at, const void* pc, const char* text) {
  size_t length = at.file ? strlen(at.file) : 0;
  if (length > 6 && strcmp(at.file + length - 6, ".metal") == 0) {
    fail(at.file, int(at.line), "undefined behaviour: %s", text);
  }
  fail_at(pc, "undefined behaviour: %s", text);  // in one of our headers, called from a body
}
#define UNDEFINED(name, text)                                        \
  extern "C" void __ubsan_handle_##name##_abort(UndefinedAt* at) {   \
    fail_undefined(*at, __builtin_return_address(0), text);          \
  }
UNDEFINED(out_of_bounds, "index out of the array's bounds")
UNDEFINED(shift_out_of_bounds, "shift by a wrong number of bits")
UNDEFINED(add_overflow, "signed addition overflows")
UNDEFINED(sub_overflow, "signed subtraction overflows")
UNDEFINED(mul_overflow, "signed multiplication overflows")
UNDEFINED(negate_overflow, "signed negation overflows")
UNDEFINED(divrem_overflow, "division by zero or signed division overflows")
UNDEFINED(float_cast_overflow, "a float outside the range of the integer type it is cast to")
UNDEFINED(load_invalid_value, "a bool that is neither true nor false")
