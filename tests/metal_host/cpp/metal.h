// What a kernel's body sees: Metal's names in C++. Address spaces are words without meaning here; the compiler's
// sanitizer hooks check every access (hooks.h) and static_checks.py checks the address spaces.
#pragma once
#include "atomics.h"

#define device
#define constant
#define thread
#define threadgroup
#define kernel

using namespace metal;

namespace host {
inline uint3 triple(Triple t) { return uint3(t.x, t.y, t.z); }
inline uint groups_of(uint width, Triple t) { return (t.x * t.y * t.z + width - 1) / width; }

// The array or value that all threads of a threadgroup share.
template <typename T>
PLAIN T& shared(uint index, const char* name, uint granule, HERE) {
  return *static_cast<T*>(host_threadgroup(name, index, sizeof(T), granule, {file, line}));
}
}  // namespace host
