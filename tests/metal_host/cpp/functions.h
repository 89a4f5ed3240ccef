// namespace metal: numeric functions, overloaded for float, half, bfloat and vectors. Both arguments of min and max
// have one type, as in Metal. Small floats compute in float and round.
#pragma once
#include "vectors.h"

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_huge_valf()
#define MAXFLOAT __FLT_MAX__
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define HALF_MAX half(65504.0f)
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_SQRT2_F 1.41421356237309504880f
#define UINT_MAX 0xffffffffu
#define INT_MAX 0x7fffffff
#define INT_MIN (-INT_MAX - 1)

namespace metal {

template <typename T>
using if_integer = typename host::enable_if<host::is_integer<T>::value, T>::type;
template <typename T>
inline if_integer<T> max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
inline if_integer<T> min(T a, T b) {
  return b < a ? b : a;
}
#define OVERLOADS(NAME, CALL)                                                 \
  inline float NAME(float a) { return CALL; }                                 \
  inline half NAME(half b) { float a = b; return half(CALL); }                \
  inline bfloat NAME(bfloat b) { float a = b; return bfloat(CALL); }          \
  template <typename T, int N>                                                \
  inline vec<T, N> NAME(vec<T, N> a) {                                        \
    for (int i = 0; i < N; ++i) a[i] = NAME(a[i]);                            \
    return a;                                                                 \
  }
#define UNARY(NAME, CALL) \
  OVERLOADS(NAME, CALL)   \
  namespace precise {     \
  OVERLOADS(NAME, CALL)   \
  }                       \
  namespace fast {        \
  OVERLOADS(NAME, CALL)   \
  }
UNARY(rint, __builtin_rintf(a))
UNARY(round, __builtin_roundf(a))
UNARY(floor, __builtin_floorf(a))
UNARY(ceil, __builtin_ceilf(a))
UNARY(trunc, __builtin_truncf(a))
UNARY(fract, a - __builtin_floorf(a))
UNARY(exp, __builtin_expf(a))
UNARY(exp2, __builtin_exp2f(a))
UNARY(exp10, __builtin_powf(10.0f, a))
UNARY(log, __builtin_logf(a))
UNARY(log2, __builtin_log2f(a))
UNARY(log10, __builtin_log10f(a))
UNARY(sqrt, __builtin_sqrtf(a))
UNARY(rsqrt, 1.0f / __builtin_sqrtf(a))
UNARY(sin, __builtin_sinf(a))
UNARY(cos, __builtin_cosf(a))
UNARY(tan, __builtin_tanf(a))
UNARY(asin, __builtin_asinf(a))
UNARY(acos, __builtin_acosf(a))
UNARY(atan, __builtin_atanf(a))
UNARY(sinh, __builtin_sinhf(a))
UNARY(cosh, __builtin_coshf(a))
UNARY(tanh, __builtin_tanhf(a))
UNARY(fabs, __builtin_fabsf(a))
UNARY(sign, a > 0.0f ? 1.0f : a < 0.0f ? -1.0f : a == 0.0f ? a : 0.0f)
OVERLOADS(abs, __builtin_fabsf(a))
#undef UNARY
#undef OVERLOADS

#define BINARY(NAME, CALL)                                                                                 \
  inline float NAME(float a, float b) { return CALL; }                                                     \
  inline half NAME(half c, half d) { float a = c, b = d; return half(CALL); }                              \
  inline bfloat NAME(bfloat c, bfloat d) { float a = c, b = d; return bfloat(CALL); }                      \
  template <typename T, int N>                                                                             \
  inline vec<T, N> NAME(vec<T, N> a, vec<T, N> b) {                                                        \
    for (int i = 0; i < N; ++i) a[i] = NAME(a[i], b[i]);                                                   \
    return a;                                                                                              \
  }
BINARY(pow, __builtin_powf(a, b))
BINARY(powr, __builtin_powf(a, b))
BINARY(atan2, __builtin_atan2f(a, b))
BINARY(fmod, __builtin_fmodf(a, b))
BINARY(copysign, __builtin_copysignf(a, b))
BINARY(fmax, __builtin_fmaxf(a, b))
BINARY(fmin, __builtin_fminf(a, b))
BINARY(max, __builtin_fmaxf(a, b))
BINARY(min, __builtin_fminf(a, b))
#undef BINARY
namespace precise {
using metal::pow;
using metal::fmax;
using metal::fmin;
}  // namespace precise
namespace fast {
using metal::pow;
}

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return half(__builtin_fmaf(a, b, c)); }
inline float ldexp(float a, int b) { return __builtin_ldexpf(a, b); }
inline float step(float edge, float x) { return x < edge ? 0.0f : 1.0f; }
inline float mix(float x, float y, float a) { return x + (y - x) * a; }

#define CLASSIFY(NAME, CALL)                        \
  inline bool NAME(float a) { return CALL; }        \
  inline bool NAME(half b) { float a = b; return CALL; } \
  inline bool NAME(bfloat b) { float a = b; return CALL; }
CLASSIFY(isnan, a != a)
CLASSIFY(isinf, __builtin_fabsf(a) == INFINITY)
CLASSIFY(isfinite, __builtin_fabsf(a) < INFINITY)
CLASSIFY(signbit, as_type<uint>(a) >> 31)
#undef CLASSIFY

template <typename T>
inline if_integer<T> abs(T a) {
  return a < 0 ? T(-a) : a;
}
template <typename T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <typename T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}

template <typename T>
inline if_integer<T> popcount(T a) {
  ulong bits = sizeof(T) == 8 ? ulong(a) : ulong(a) & ((1ul << (8 * sizeof(T) % 64)) - 1);
  return T(__builtin_popcountl(bits));
}
template <typename T>
inline if_integer<T> clz(T a) {
  int width = 8 * sizeof(T);
  ulong bits = sizeof(T) == 8 ? ulong(a) : ulong(a) & ((1ul << (width % 64)) - 1);
  return T(bits == 0 ? width : __builtin_clzl(bits) - (64 - width));
}
template <typename T>
inline if_integer<T> ctz(T a) {
  return T(a == 0 ? 8 * sizeof(T) : __builtin_ctzl(ulong(a)));
}
inline uint mulhi(uint a, uint b) { return uint(ulong(a) * b >> 32); }
inline int mulhi(int a, int b) { return int(long(a) * b >> 32); }
inline ulong mulhi(ulong a, ulong b) { return ulong((unsigned __int128)a * b >> 64); }
inline uint reverse_bits(uint a) {
  uint result = 0;
  for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
  return result;
}
inline uint rotate(uint a, uint by) { return a << (by & 31) | a >> (-by & 31); }
inline uint extract_bits(uint a, uint offset, uint bits) {
  return bits == 0 ? 0 : bits >= 32 ? a >> offset : a >> offset & ((1u << bits) - 1);
}

template <typename T>
struct numeric_limits {
  static constexpr bool is_signed = T(-1) < T(0);
  static constexpr int digits = int(8 * sizeof(T)) - is_signed;
  static constexpr T max() { return T(~0ul >> (64 - digits)); }
  static constexpr T min() { return is_signed ? T(-max() - 1) : T(0); }
  static constexpr T lowest() { return min(); }
};
template <>
struct numeric_limits<float> {
  static constexpr float max() { return __FLT_MAX__; }
  static constexpr float min() { return __FLT_MIN__; }
  static constexpr float lowest() { return -__FLT_MAX__; }
  static constexpr float epsilon() { return __FLT_EPSILON__; }
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
};
#define SMALL_LIMITS(NAME, MAX, MIN, EPSILON)                       \
  template <>                                                       \
  struct numeric_limits<NAME> {                                     \
    static NAME max() { return NAME(MAX); }                         \
    static NAME min() { return NAME(MIN); }                         \
    static NAME lowest() { return NAME(-MAX); }                     \
    static NAME epsilon() { return NAME(EPSILON); }                 \
    static NAME infinity() { return NAME(__builtin_inff()); }       \
    static NAME quiet_NaN() { return NAME(__builtin_nanf("")); }    \
  };
SMALL_LIMITS(half, 65504.0f, 0x1p-14f, 0x1p-10f)
SMALL_LIMITS(bfloat, 0x1.fep127f, 0x1p-126f, 0x1p-7f)
#undef SMALL_LIMITS

}  // namespace metal
