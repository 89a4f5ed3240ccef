// Vectors of 2 to 4 components, with one-letter members, [] and arithmetic by component. No swizzles.
#pragma once
#include "types.h"

namespace metal {

template <typename T, int N>
struct vec;

#define VECTOR_MEMBERS(N)                                                          \
  vec() = default;                                                                 \
  vec(T all) {                                                                     \
    for (int i = 0; i < N; ++i) (*this)[i] = all;                                  \
  }                                                                                \
  template <typename U>                                                            \
  explicit vec(const vec<U, N>& other) {                                           \
    for (int i = 0; i < N; ++i) (*this)[i] = T(other[i]);                          \
  }                                                                                \
  T& operator[](int i) { return (&x)[i]; }                                         \
  const T& operator[](int i) const { return (&x)[i]; }

template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec(T a, T b) : x(a), y(b) {}
  VECTOR_MEMBERS(2)
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec(T a, T b, T c) : x(a), y(b), z(c) {}
  VECTOR_MEMBERS(3)
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  VECTOR_MEMBERS(4)
};
#undef VECTOR_MEMBERS

// Bytes of what a thread can own by itself in an array of T: a component of a vector.
template <typename T>
constexpr uint unit_size = alignof(T);
template <typename T, int N>
constexpr uint unit_size<vec<T, N>> = sizeof(T);

template <typename T>
struct itself {
  typedef T type;
};

#define VECTOR_OPERATOR(OP)                                                                    \
  template <typename T, int N>                                                                 \
  inline vec<T, N> operator OP(vec<T, N> a, vec<T, N> b) {                                     \
    for (int i = 0; i < N; ++i) a[i] = a[i] OP b[i];                                           \
    return a;                                                                                  \
  }                                                                                            \
  template <typename T, int N>                                                                 \
  inline vec<T, N> operator OP(vec<T, N> a, typename itself<T>::type b) {                      \
    return a OP vec<T, N>(b);                                                                  \
  }                                                                                            \
  template <typename T, int N>                                                                 \
  inline vec<T, N> operator OP(typename itself<T>::type a, vec<T, N> b) {                      \
    return vec<T, N>(a) OP b;                                                                  \
  }                                                                                            \
  template <typename T, int N, typename B>                                                     \
  inline vec<T, N>& operator OP##=(vec<T, N>& a, B b) {                                        \
    return a = a OP b;                                                                         \
  }
VECTOR_OPERATOR(+)
VECTOR_OPERATOR(-)
VECTOR_OPERATOR(*)
VECTOR_OPERATOR(/)
VECTOR_OPERATOR(%)
VECTOR_OPERATOR(&)
VECTOR_OPERATOR(|)
VECTOR_OPERATOR(^)
VECTOR_OPERATOR(<<)
VECTOR_OPERATOR(>>)
#undef VECTOR_OPERATOR

template <typename T, int N>
inline vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; ++i) a[i] = -a[i];
  return a;
}

template <typename T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a.x * b.x;
  for (int i = 1; i < N; ++i) sum += a[i] * b[i];
  return sum;
}

#define VECTOR_NAMES(T)     \
  typedef vec<T, 2> T##2;   \
  typedef vec<T, 3> T##3;   \
  typedef vec<T, 4> T##4;
VECTOR_NAMES(float)
VECTOR_NAMES(half)
VECTOR_NAMES(bfloat)
VECTOR_NAMES(uint)
VECTOR_NAMES(int)
VECTOR_NAMES(uchar)
VECTOR_NAMES(char)
VECTOR_NAMES(ushort)
VECTOR_NAMES(short)
VECTOR_NAMES(ulong)
VECTOR_NAMES(bool)
#undef VECTOR_NAMES

}  // namespace metal
