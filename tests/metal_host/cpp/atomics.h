// Atomic operations, relaxed only, as in Metal. 32 bits; float has no minimum, maximum or bit operations.
#pragma once
#include "simd.h"

namespace metal {

enum memory_order { memory_order_relaxed };

template <typename T>
struct atomic {
  static_assert(sizeof(T) == 4, "Metal's atomics are 32 bits wide");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

PLAIN float wrapping_add(float a, float b) {
  host_inexact = true;
  return a + b;
}
inline uint wrapping_add(uint a, uint b) { return a + b; }
inline int wrapping_add(int a, int b) { return int(uint(a) + uint(b)); }

#define ATOMIC_HERE memory_order, HERE

template <typename T>
PLAIN T atomic_load_explicit(const atomic<T>* object, ATOMIC_HERE) {
  host_atomic(object, sizeof(T), host::ATOMIC_READ, {file, line});
  return object->value;
}
template <typename T>
PLAIN void atomic_store_explicit(atomic<T>* object, typename itself<T>::type desired, ATOMIC_HERE) {
  host_atomic(object, sizeof(T), host::ATOMIC_WRITE, {file, line});
  object->value = desired;
}

#define ATOMIC(NAME, EXPRESSION, TYPES)                                                               \
  template <typename T>                                                                               \
  PLAIN T atomic_##NAME##_explicit(atomic<T>* object, typename itself<T>::type operand, ATOMIC_HERE) { \
    static_assert(TYPES, "atomic_" #NAME "_explicit has no overload for this type");                  \
    host_atomic(object, sizeof(T), host::ATOMIC_CHANGE, {file, line});                                \
    T old = object->value;                                                                            \
    object->value = T(EXPRESSION);                                                                    \
    return old;                                                                                       \
  }
ATOMIC(exchange, operand, true)
ATOMIC(fetch_add, wrapping_add(old, operand), true)
ATOMIC(fetch_sub, wrapping_add(old, -operand), true)
ATOMIC(fetch_max, max(old, operand), host::is_integer<T>::value)
ATOMIC(fetch_min, min(old, operand), host::is_integer<T>::value)
ATOMIC(fetch_and, old& operand, host::is_integer<T>::value)
ATOMIC(fetch_or, old | operand, host::is_integer<T>::value)
ATOMIC(fetch_xor, old ^ operand, host::is_integer<T>::value)
#undef ATOMIC

template <typename T>
PLAIN bool atomic_compare_exchange_weak_explicit(
    atomic<T>* object, T* expected, typename itself<T>::type desired, memory_order, ATOMIC_HERE) {
  host_atomic(object, sizeof(T), host::ATOMIC_READ, {file, line});
  if (__builtin_memcmp(&object->value, expected, sizeof(T)) == 0) {
    host_atomic(object, sizeof(T), host::ATOMIC_WRITE, {file, line});
    object->value = desired;
    return true;
  }
  *expected = object->value;
  return false;
}

#undef ATOMIC_HERE

}  // namespace metal
