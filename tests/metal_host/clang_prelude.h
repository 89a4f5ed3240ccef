// What a Metal compiler and MLX's own header (mlx/backend/metal/kernels/utils.h) declare before a kernel, for clang.
// Declarations only: nothing here runs. Names follow the Metal Shading Language Specification, version 3.1:
// https://developer.apple.com/metal/Metal-Shading-Language-Specification.pdf
#pragma clang system_header

// Macros, so that these words are as reserved as they are in Metal.
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define half _Float16
#define bfloat __bf16
#define kernel __attribute__((annotate("kernel")))
#define vertex __attribute__((annotate("vertex")))
#define fragment __attribute__((annotate("fragment")))

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF (__builtin_inff())
#define FLT_MAX 3.40282347e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.19209290e-07f
#define MAXFLOAT FLT_MAX
#define M_PI_F 3.14159274f
#define M_LN2_F 0.693147182f
#define M_LOG2E_F 1.44269502f
#define INT_MAX 0x7fffffff
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 0xffffffffu
#define METAL_FUNC inline __attribute__((always_inline))
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uchar, uint8_t;
typedef unsigned short ushort, uint16_t;
typedef unsigned int uint, uint32_t;
typedef unsigned long ulong, uint64_t, size_t, uintptr_t;
typedef long ptrdiff_t, intptr_t;
typedef half float16_t;
typedef bfloat bfloat16_t;
struct complex64_t {
  float real, imag;
};

namespace metal {
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}
#define VECTORS(type, name)      \
  typedef metal::vec<type, 2> name##2; \
  typedef metal::vec<type, 3> name##3; \
  typedef metal::vec<type, 4> name##4;
VECTORS(bool, bool) VECTORS(char, char) VECTORS(uchar, uchar) VECTORS(short, short) VECTORS(ushort, ushort)
VECTORS(int, int) VECTORS(uint, uint) VECTORS(long, long) VECTORS(ulong, ulong)
VECTORS(_Float16, half) VECTORS(float, float)

namespace metal {
template <typename T, T V>
struct integral_constant {
  static constexpr T value = V;
};
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <typename T, typename U> struct is_same : false_type {};
template <typename T> struct is_same<T, T> : true_type {};
template <bool B, typename T, typename F> struct conditional { typedef T type; };
template <typename T, typename F> struct conditional<false, T, F> { typedef F type; };
template <bool B, typename T, typename F> using conditional_t = typename conditional<B, T, F>::type;
template <bool B, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool B, typename T = void> using enable_if_t = typename enable_if<B, T>::type;
template <typename T> struct is_floating_point : false_type {};
template <> struct is_floating_point<float> : true_type {};
template <> struct is_floating_point<half> : true_type {};
template <> struct is_floating_point<bfloat> : true_type {};
template <typename T> struct is_integral : false_type {};
template <typename T> struct is_unsigned : integral_constant<bool, is_integral<T>::value && (T(-1) > T(0))> {};
template <typename T> struct is_signed : integral_constant<bool, !is_unsigned<T>::value> {};
template <typename T> struct make_unsigned;
template <typename T> struct make_signed;
template <typename T> using make_unsigned_t = typename make_unsigned<T>::type;
template <typename T> using make_signed_t = typename make_signed<T>::type;
#define INTEGERS(plain, u)                                        \
  template <> struct is_integral<plain> : true_type {};           \
  template <> struct is_integral<u> : true_type {};               \
  template <> struct make_unsigned<plain> { typedef u type; };    \
  template <> struct make_unsigned<u> { typedef u type; };        \
  template <> struct make_signed<plain> { typedef plain type; };  \
  template <> struct make_signed<u> { typedef plain type; };
INTEGERS(char, uchar) INTEGERS(short, ushort) INTEGERS(int, uint) INTEGERS(long, ulong)

// Not Metal's: what the overload sets below accept. `shuffled` types fit a 32-bit register; bool and 64 bits do not go.
template <typename T> struct element { typedef T type; };
template <typename T, int N> struct element<T __attribute__((ext_vector_type(N)))> { typedef T type; };
template <typename T> using element_t = typename element<T>::type;
template <typename T> using floating = enable_if_t<is_floating_point<element_t<T>>::value, T>;
template <typename T> using integer = enable_if_t<is_integral<element_t<T>>::value, T>;
template <typename T>
using number = enable_if_t<is_floating_point<element_t<T>>::value || is_integral<element_t<T>>::value, T>;
template <typename T> using shuffled = enable_if_t<sizeof(element_t<T>) <= 4, number<T>>;
template <typename T> using truth = conditional_t<is_same<T, element_t<T>>::value, bool, T>;

template <typename T>
struct numeric_limits {
  static constexpr T max();
  static constexpr T min();
  static constexpr T lowest();
  static constexpr T infinity();
  static constexpr T quiet_NaN();
  static constexpr T epsilon();
  static constexpr int digits = 0;
};

// Plain overloads in Metal, so that arguments of two types are an error there as here.
#define ONE(name) template <typename T> floating<T> name(T x);
#define TWO(name) template <typename T> floating<T> name(T x, T y);
#define MATH                                                                                                    \
  ONE(acos) ONE(acosh) ONE(asin) ONE(asinh) ONE(atan) ONE(atanh) ONE(ceil) ONE(cos) ONE(cosh) ONE(cospi)        \
  ONE(exp) ONE(exp2) ONE(exp10) ONE(fabs) ONE(floor) ONE(fract) ONE(log) ONE(log2) ONE(log10) ONE(rint)         \
  ONE(round) ONE(rsqrt) ONE(saturate) ONE(sign) ONE(sin) ONE(sinh) ONE(sinpi) ONE(sqrt) ONE(tan) ONE(tanh)      \
  ONE(trunc) TWO(atan2) TWO(copysign) TWO(divide) TWO(fdim) TWO(fmax) TWO(fmin) TWO(fmod) TWO(nextafter)        \
  TWO(pow) TWO(powr) TWO(step)
MATH
namespace fast { MATH }
namespace precise { MATH }
template <typename T> number<T> abs(T x);
template <typename T> number<T> max(T x, T y);
template <typename T> number<T> min(T x, T y);
template <typename T> number<T> max3(T x, T y, T z);
template <typename T> number<T> min3(T x, T y, T z);
template <typename T> number<T> median3(T x, T y, T z);
template <typename T> number<T> clamp(T x, T low, T high);
template <typename T> floating<T> fma(T x, T y, T z);
template <typename T> floating<T> mix(T x, T y, T t);
template <typename T> floating<T> smoothstep(T low, T high, T x);
template <typename T> floating<T> ldexp(T x, int exponent);
template <typename T> floating<T> frexp(T x, thread int& exponent);
template <typename T> floating<T> modf(T x, thread T& whole);
template <typename T> floating<T> sincos(T x, thread T& cosine);
template <typename T> int ilogb(floating<T> x);
template <typename T> enable_if_t<is_same<T, floating<T>>::value, truth<T>> isnan(T x);
template <typename T> enable_if_t<is_same<T, floating<T>>::value, truth<T>> isinf(T x);
template <typename T> enable_if_t<is_same<T, floating<T>>::value, truth<T>> isfinite(T x);
template <typename T> enable_if_t<is_same<T, floating<T>>::value, truth<T>> signbit(T x);
template <typename T> T select(T no, T yes, truth<T> choice);
template <typename T> element_t<T> dot(T x, T y);
template <typename T> element_t<T> length(T x);
template <typename T> bool all(T x);
template <typename T> bool any(T x);
template <typename T> integer<T> absdiff(T x, T y);
template <typename T> integer<T> addsat(T x, T y);
template <typename T> integer<T> subsat(T x, T y);
template <typename T> integer<T> hadd(T x, T y);
template <typename T> integer<T> rhadd(T x, T y);
template <typename T> integer<T> mulhi(T x, T y);
template <typename T> integer<T> mul24(T x, T y);
template <typename T> integer<T> mad24(T x, T y, T z);
template <typename T> integer<T> madhi(T x, T y, T z);
template <typename T> integer<T> madsat(T x, T y, T z);
template <typename T> integer<T> rotate(T x, T bits);
template <typename T> integer<T> clz(T x);
template <typename T> integer<T> ctz(T x);
template <typename T> integer<T> popcount(T x);
template <typename T> integer<T> reverse_bits(T x);
template <typename T> integer<T> extract_bits(T x, uint offset, uint bits);
template <typename T> integer<T> insert_bits(T base, T insert, uint offset, uint bits);

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags x, mem_flags y);
void threadgroup_barrier(mem_flags flags);
void simdgroup_barrier(mem_flags flags);

#define ACROSS(group)                                                                                       \
  template <typename T> shuffled<T> group##_sum(T x);                                                       \
  template <typename T> shuffled<T> group##_product(T x);                                                   \
  template <typename T> shuffled<T> group##_max(T x);                                                       \
  template <typename T> shuffled<T> group##_min(T x);                                                       \
  template <typename T> integer<shuffled<T>> group##_and(T x);                                              \
  template <typename T> integer<shuffled<T>> group##_or(T x);                                               \
  template <typename T> integer<shuffled<T>> group##_xor(T x);                                              \
  template <typename T> shuffled<T> group##_prefix_exclusive_sum(T x);                                      \
  template <typename T> shuffled<T> group##_prefix_inclusive_sum(T x);                                      \
  template <typename T> shuffled<T> group##_prefix_exclusive_product(T x);                                  \
  template <typename T> shuffled<T> group##_prefix_inclusive_product(T x);                                  \
  template <typename T> shuffled<T> group##_broadcast(T x, ushort lane);                                    \
  template <typename T> shuffled<T> group##_broadcast_first(T x);                                           \
  template <typename T> shuffled<T> group##_shuffle(T x, ushort lane);                                      \
  template <typename T> shuffled<T> group##_shuffle_down(T x, ushort delta);                                \
  template <typename T> shuffled<T> group##_shuffle_up(T x, ushort delta);                                  \
  template <typename T> shuffled<T> group##_shuffle_xor(T x, ushort mask);                                  \
  template <typename T> shuffled<T> group##_shuffle_rotate_down(T x, ushort delta);                         \
  template <typename T> shuffled<T> group##_shuffle_rotate_up(T x, ushort delta);                           \
  template <typename T> shuffled<T> group##_shuffle_and_fill_down(T x, T fill, ushort delta);               \
  template <typename T> shuffled<T> group##_shuffle_and_fill_up(T x, T fill, ushort delta);                 \
  bool group##_all(bool x);                                                                                 \
  bool group##_any(bool x);                                                                                 \
  bool group##_is_first();
ACROSS(simd) ACROSS(quad)
struct simd_vote {
  typedef ulong vote_t;
  explicit constexpr simd_vote(vote_t votes = 0);
  constexpr bool all() const;
  constexpr bool any() const;
  explicit constexpr operator vote_t() const;
};
simd_vote simd_ballot(bool x);
simd_vote simd_active_threads_mask();

enum memory_order { memory_order_relaxed };
template <typename T>
struct atomic {
  static_assert(is_same<T, int>::value || is_same<T, uint>::value || is_same<T, float>::value ||
                    is_same<T, bool>::value || is_same<T, ulong>::value,
                "Metal has atomics of int, uint, float, bool and ulong only");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;
// Not Metal's: the value of an atomic, from the pointer alone; and where fetch_add of a float is allowed.
template <typename T> struct same { typedef T type; };
template <typename T> using given = typename same<T>::type;
#define CHANGE(name, space, allowed) \
  template <typename T> enable_if_t<allowed, T> name(volatile space atomic<T>* object, given<T> value, memory_order order);
#define ATOMICS(space, floats)                                                                                \
  template <typename T> T atomic_load_explicit(const volatile space atomic<T>* object, memory_order order);   \
  template <typename T>                                                                                       \
  void atomic_store_explicit(volatile space atomic<T>* object, given<T> value, memory_order order);           \
  template <typename T>                                                                                       \
  bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>* object, thread T* expected,            \
                                             given<T> desired, memory_order success, memory_order failure);   \
  CHANGE(atomic_exchange_explicit, space, true)                                                               \
  CHANGE(atomic_fetch_add_explicit, space, sizeof(T) == 4 && (is_integral<T>::value || floats))               \
  CHANGE(atomic_fetch_sub_explicit, space, sizeof(T) == 4 && (is_integral<T>::value || floats))               \
  CHANGE(atomic_fetch_min_explicit, space, sizeof(T) == 4 && is_integral<T>::value)                           \
  CHANGE(atomic_fetch_max_explicit, space, sizeof(T) == 4 && is_integral<T>::value)                           \
  CHANGE(atomic_fetch_and_explicit, space, sizeof(T) == 4 && is_integral<T>::value)                           \
  CHANGE(atomic_fetch_or_explicit, space, sizeof(T) == 4 && is_integral<T>::value)                            \
  CHANGE(atomic_fetch_xor_explicit, space, sizeof(T) == 4 && is_integral<T>::value)
ATOMICS(device, true) ATOMICS(threadgroup, false)

// float4(a, b, c, d): clang's vectors have no such constructors in C++, so a macro turns them into these functions.
#define MAKE(type, name)                                                                                      \
  template <typename A> constexpr name##2 make_##name##2(A x);                                                \
  template <typename A, typename B> constexpr name##2 make_##name##2(A x, B y);                               \
  template <typename A> constexpr name##3 make_##name##3(A x);                                                \
  template <typename A, typename B> constexpr name##3 make_##name##3(A x, B y);                               \
  template <typename A, typename B, typename C> constexpr name##3 make_##name##3(A x, B y, C z);              \
  template <typename A> constexpr name##4 make_##name##4(A x);                                                \
  template <typename A, typename B> constexpr name##4 make_##name##4(A x, B y);                               \
  template <typename A, typename B, typename C> constexpr name##4 make_##name##4(A x, B y, C z);              \
  template <typename A, typename B, typename C, typename D> constexpr name##4 make_##name##4(A x, B y, C z, D w);
MAKE(char, char) MAKE(uchar, uchar) MAKE(short, short) MAKE(ushort, ushort) MAKE(int, int) MAKE(uint, uint)
MAKE(_Float16, half) MAKE(float, float)
}  // namespace metal
#define char2(...) make_char2(__VA_ARGS__)
#define char4(...) make_char4(__VA_ARGS__)
#define uchar2(...) make_uchar2(__VA_ARGS__)
#define uchar4(...) make_uchar4(__VA_ARGS__)
#define ushort2(...) make_ushort2(__VA_ARGS__)
#define ushort4(...) make_ushort4(__VA_ARGS__)
#define int2(...) make_int2(__VA_ARGS__)
#define int4(...) make_int4(__VA_ARGS__)
#define uint2(...) make_uint2(__VA_ARGS__)
#define uint3(...) make_uint3(__VA_ARGS__)
#define uint4(...) make_uint4(__VA_ARGS__)
#define half2(...) make_half2(__VA_ARGS__)
#define half4(...) make_half4(__VA_ARGS__)
#define float2(...) make_float2(__VA_ARGS__)
#define float3(...) make_float3(__VA_ARGS__)
#define float4(...) make_float4(__VA_ARGS__)

using namespace metal;
template <typename To, typename From>
enable_if_t<sizeof(To) == sizeof(From), To> as_type(From x);

// Names that MLX's header takes in the global namespace: a helper that defines one again does not compile on a Mac.
template <typename T, typename U> inline T ceildiv(T n, U m) { return (n + m - 1) / m; }
template <typename U, typename T> inline U cast_to(T value) { return static_cast<U>(value); }
inline float log1p(float x) { return x; }
template <typename U> struct Limits {
  static const constant U max, min, finite_max, finite_min;
};
template <typename U> struct WorkPerThread {};
template <bool condition, typename T, typename U> struct ConditionalType {};
