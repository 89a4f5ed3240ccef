// half and bfloat: 16-bit values that compute in float and round to nearest even after every operation.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

// No access in these functions is one of the kernel; the integers they combine wrap.
#define PLAIN __attribute__((no_sanitize("thread"), no_sanitize("undefined"), noinline)) inline

template <typename To, typename From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of the same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

namespace host {

inline uint half_bits(float value) {
  uint bits = as_type<uint>(value), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    return sign | 0x7e00 | (bits >> 13 & 0x1ff);
  }
  if (bits >= 0x477ff000) {  // rounds to 65536 or is infinite
    return sign | 0x7c00;
  }
  if (bits < 0x38800000) {  // below 2^-14 halves are multiples of 2^-24: the float adder rounds
    return sign | (as_type<uint>(as_type<float>(bits) + 0.5f) - 0x3f000000);
  }
  return sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

inline float half_value(uint bits) {
  uint sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) {
    return as_type<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  }
  if (rest < 0x400) {
    return as_type<float>(sign | as_type<uint>(float(rest) * 0x1p-24f));
  }
  return as_type<float>(sign | ((rest << 13) + 0x38000000));
}

inline uint bfloat_bits(float value) {
  uint bits = as_type<uint>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    return bits >> 16 | 0x40;
  }
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float bfloat_value(uint bits) { return as_type<float>(bits << 16); }

template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};

template <typename T>
struct is_integer {
  static constexpr bool value = false;
};
#define INTEGER(T)                            \
  template <>                                 \
  struct is_integer<T> {                      \
    static constexpr bool value = true;       \
  };
INTEGER(bool)
INTEGER(char)
INTEGER(int8_t)
INTEGER(uchar)
INTEGER(short)
INTEGER(ushort)
INTEGER(int)
INTEGER(uint)
INTEGER(long)
INTEGER(ulong)
INTEGER(long long)
INTEGER(unsigned long long)
#undef INTEGER

}  // namespace host

// A double would take one of two roads to these types, which is ambiguous: a forgotten suffix does not compile.
#define SMALL_FLOAT(NAME)                                                     \
  struct NAME {                                                               \
    uint16_t bits;                                                            \
    NAME() = default;                                                         \
    NAME(float value) : bits(uint16_t(host::NAME##_bits(value))) {}           \
    template <typename I, typename = typename host::enable_if<host::is_integer<I>::value>::type> \
    NAME(I value) : NAME(float(value)) {}                                     \
    operator float() const { return host::NAME##_value(bits); }               \
    NAME operator-() const {                                                  \
      NAME result;                                                            \
      result.bits = bits ^ 0x8000;                                            \
      return result;                                                          \
    }                                                                         \
    NAME operator+() const { return *this; }                                  \
    NAME& operator++() { return *this = NAME(float(*this) + 1.0f); }          \
    NAME& operator--() { return *this = NAME(float(*this) - 1.0f); }          \
  };                                                                          \
  SMALL_FLOAT_OPERATOR(NAME, +)                                               \
  SMALL_FLOAT_OPERATOR(NAME, -)                                               \
  SMALL_FLOAT_OPERATOR(NAME, *)                                               \
  SMALL_FLOAT_OPERATOR(NAME, /)
// half op half and half op integer round to half; with float the result is float, by conversion.
#define SMALL_FLOAT_OPERATOR(NAME, OP)                                                              \
  inline NAME operator OP(NAME a, NAME b) { return NAME(float(a) OP float(b)); }                    \
  inline float operator OP(NAME a, float b) { return float(a) OP b; }                               \
  inline float operator OP(float a, NAME b) { return a OP float(b); }                               \
  template <typename I>                                                                             \
  inline typename host::enable_if<host::is_integer<I>::value, NAME>::type operator OP(NAME a, I b) { \
    return a OP NAME(b);                                                                            \
  }                                                                                                 \
  template <typename I>                                                                             \
  inline typename host::enable_if<host::is_integer<I>::value, NAME>::type operator OP(I a, NAME b) { \
    return NAME(a) OP b;                                                                            \
  }                                                                                                 \
  template <typename B>                                                                             \
  inline NAME& operator OP##=(NAME& a, B b) {                                                       \
    return a = NAME(float(a) OP float(b));                                                          \
  }
SMALL_FLOAT(half)
SMALL_FLOAT(bfloat)
#undef SMALL_FLOAT
#undef SMALL_FLOAT_OPERATOR

inline half operator""h(long double value) { return half(float(value)); }

typedef half float16_t;
typedef bfloat bfloat16_t;
