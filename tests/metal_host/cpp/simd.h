// Barriers and SIMD-group operations, 32 lanes. Lanes that returned or do not exist take no part. Sums, products,
// minima and maxima are built as a tree: lane i with i + 16, then i + 8, ... i + 1.
#pragma once
#include "functions.h"
#include "interface.h"

#define HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_device_and_threadgroup = 3 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

inline void threadgroup_barrier(mem_flags flags, HERE) {
  host_barrier("threadgroup_barrier", {file, line}, true, uint(flags));
}
inline void simdgroup_barrier(mem_flags flags, HERE) {
  host_barrier("simdgroup_barrier", {file, line}, false, uint(flags));
}

template <typename T>
PLAIN const host::Lanes& exchange(const char* operation, host::Site site, T value, uint argument = 0) {
  static_assert(sizeof(T) <= 16, "SIMD operations take at most 16 bytes");
  return host_exchange(operation, site, &value, sizeof value, argument);
}

PLAIN bool is_active(const host::Lanes& lanes, uint lane) { return lane < 32 && (lanes.active >> lane & 1); }

template <typename T>
PLAIN T value_of(const host::Lanes& lanes, uint lane) {
  T value;
  __builtin_memcpy(&value, lanes.value[lane], sizeof value);
  return value;
}

template <typename T>
PLAIN T lane_or_fail(const char* operation, host::Site site, const host::Lanes& lanes, uint lane) {
  if (!is_active(lanes, lane)) {
    host_fail(site, operation);
  }
  return value_of<T>(lanes, lane);
}

template <typename T, typename Combine>
PLAIN T combine_lanes(const host::Lanes& lanes, Combine combine) {
  T value[32];
  uint active = lanes.active;
  for (uint i = 0; i < 32; ++i) {
    value[i] = value_of<T>(lanes, i);
  }
  for (uint step = 16; step > 0; step /= 2) {
    for (uint i = 0; i < step; ++i) {
      if (active >> (i + step) & 1) {
        value[i] = active >> i & 1 ? combine(value[i], value[i + step]) : value[i + step];
        active |= 1u << i;
      }
    }
  }
  return value[0];
}

#define REDUCTION(NAME, EXPRESSION)                                                                          \
  template <typename T>                                                                                      \
  PLAIN T NAME(T value, HERE) {                                                                              \
    return combine_lanes<T>(exchange(#NAME, {file, line}, value), [](T a, T b) { return T(EXPRESSION); });   \
  }
REDUCTION(simd_sum, a + b)
REDUCTION(simd_product, a* b)
REDUCTION(simd_max, max(a, b))
REDUCTION(simd_min, min(a, b))
REDUCTION(simd_and, a& b)
REDUCTION(simd_or, a | b)
REDUCTION(simd_xor, a ^ b)
#undef REDUCTION

// The lanes before this one, in their order, and this one if inclusive.
#define PREFIX(NAME, OP, FIRST, LAST)                                                  \
  template <typename T>                                                                \
  PLAIN T NAME(T value, HERE) {                                                        \
    const host::Lanes& lanes = exchange(#NAME, {file, line}, value);                   \
    T result = T(FIRST);                                                               \
    for (uint lane = 0; lane < host_lane() + LAST; ++lane) {                           \
      if (is_active(lanes, lane)) {                                                    \
        result = T(result OP value_of<T>(lanes, lane));                                \
      }                                                                                \
    }                                                                                  \
    return result;                                                                     \
  }
PREFIX(simd_prefix_exclusive_sum, +, 0, 0)
PREFIX(simd_prefix_inclusive_sum, +, 0, 1)
PREFIX(simd_prefix_exclusive_product, *, 1, 0)
PREFIX(simd_prefix_inclusive_product, *, 1, 1)
#undef PREFIX

template <typename T>
PLAIN T simd_shuffle(T value, ushort lane, HERE) {
  const host::Lanes& lanes = exchange("simd_shuffle", {file, line}, value);
  return lane_or_fail<T>("simd_shuffle from a lane that is not active", {file, line}, lanes, lane);
}
template <typename T>
PLAIN T simd_shuffle_xor(T value, ushort mask, HERE) {
  const host::Lanes& lanes = exchange("simd_shuffle_xor", {file, line}, value);
  return lane_or_fail<T>("simd_shuffle_xor from a lane that is not active", {file, line}, lanes, host_lane() ^ mask);
}
// Lanes without a source keep their value.
template <typename T>
PLAIN T simd_shuffle_up(T value, ushort delta, HERE) {
  const host::Lanes& lanes = exchange("simd_shuffle_up", {file, line}, value);
  return host_lane() < delta ? value
      : lane_or_fail<T>("simd_shuffle_up from a lane that is not active", {file, line}, lanes, host_lane() - delta);
}
template <typename T>
PLAIN T simd_shuffle_down(T value, ushort delta, HERE) {
  const host::Lanes& lanes = exchange("simd_shuffle_down", {file, line}, value);
  return host_lane() + delta >= 32 ? value
      : lane_or_fail<T>("simd_shuffle_down from a lane that is not active", {file, line}, lanes, host_lane() + delta);
}
template <typename T>
PLAIN T simd_shuffle_rotate_up(T value, ushort delta, HERE) {
  const host::Lanes& lanes = exchange("simd_shuffle_rotate_up", {file, line}, value);
  return lane_or_fail<T>("simd_shuffle_rotate_up from a lane that is not active", {file, line}, lanes,
      (host_lane() - delta) & 31);
}
template <typename T>
PLAIN T simd_shuffle_rotate_down(T value, ushort delta, HERE) {
  const host::Lanes& lanes = exchange("simd_shuffle_rotate_down", {file, line}, value);
  return lane_or_fail<T>("simd_shuffle_rotate_down from a lane that is not active", {file, line}, lanes,
      (host_lane() + delta) & 31);
}
template <typename T>
PLAIN T simd_broadcast(T value, ushort lane, HERE) {
  const host::Lanes& lanes = exchange("simd_broadcast", {file, line}, value, lane);
  for (uint i = 0; i < 32; ++i) {
    if (is_active(lanes, i) && lanes.argument[i] != lane) {
      host_fail({file, line}, "simd_broadcast of different lanes in one SIMD-group");
    }
  }
  return lane_or_fail<T>("simd_broadcast from a lane that is not active", {file, line}, lanes, lane);
}
template <typename T>
PLAIN T simd_broadcast_first(T value, HERE) {
  const host::Lanes& lanes = exchange("simd_broadcast_first", {file, line}, value);
  return value_of<T>(lanes, uint(__builtin_ctz(lanes.active)));
}

struct simd_vote {
  typedef ulong vote_t;
  uint votes, active;
  explicit operator vote_t() const { return votes; }
  bool all() const { return votes == active; }
  bool any() const { return votes != 0; }
};
PLAIN simd_vote simd_vote_at(const char* operation, bool value, host::Site site) {
  const host::Lanes& lanes = exchange(operation, site, value);
  uint votes = 0;
  for (uint i = 0; i < 32; ++i) {
    votes |= uint(is_active(lanes, i) && lanes.value[i][0]) << i;
  }
  return {votes, lanes.active};
}
inline simd_vote simd_ballot(bool value, HERE) { return simd_vote_at("simd_ballot", value, {file, line}); }
inline bool simd_all(bool value, HERE) { return simd_vote_at("simd_all", value, {file, line}).all(); }
inline bool simd_any(bool value, HERE) { return simd_vote_at("simd_any", value, {file, line}).any(); }
inline simd_vote simd_active_threads_mask(HERE) { return simd_vote_at("simd_active_threads_mask", true, {file, line}); }
PLAIN bool simd_is_first(HERE) {
  return uint(__builtin_ctz(exchange("simd_is_first", {file, line}, true).active)) == host_lane();
}

}  // namespace metal
