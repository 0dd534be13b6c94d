// Vectors of float and double in the compiler's own vector types, and the few functions the losses
// need: exp2, log, loads and stores with conversion from bf16 and fp16, reductions in fixed order.
//
// Included once per instruction set (FASTKD_ISA). Everything has internal linkage, so that no copy
// made for a wide instruction set can end up in the code of a narrow one. The build switches
// contraction off: a fused multiply-add happens where `fma` is written and nowhere else, which is
// what makes `a*x - b*y` exactly 0 for equal products.
//
// Polynomials: minimax fits by the Remez exchange, made for this file.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FASTKD_INLINE static inline __attribute__((always_inline))

namespace fastkd {
namespace FASTKD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T, int Bytes>
struct Sized {
  typedef T V __attribute__((vector_size(Bytes)));
};
template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef std::int32_t I __attribute__((vector_size(kBytes)));
  static constexpr int n = kBytes / 4;
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef std::int64_t I __attribute__((vector_size(kBytes)));
  static constexpr int n = kBytes / 8;
};
typedef Lanes<float>::V VF;
typedef Lanes<double>::V VD;
typedef Lanes<float>::I IF;
typedef Lanes<double>::I ID;
typedef std::uint32_t UF __attribute__((vector_size(kBytes)));
typedef std::uint16_t HF __attribute__((vector_size(kBytes / 2)));

struct bf16 {
  std::uint16_t bits;
};
struct fp16 {
  std::uint16_t bits;
};

template <class T>
FASTKD_INLINE typename Lanes<T>::V splat(T x) {
  return x - (typename Lanes<T>::V){};  // x - 0 keeps the sign of zero; 0 + x would not
}

template <class T>
FASTKD_INLINE typename Lanes<T>::V load(const T* p) {
  typename Lanes<T>::V v;
  __builtin_memcpy(&v, p, kBytes);
  return v;
}

template <class T>
FASTKD_INLINE void store(T* p, typename Lanes<T>::V v) {
  __builtin_memcpy(p, &v, kBytes);
}

#if defined(__AVX512F__)
FASTKD_INLINE VF fma(VF a, VF b, VF c) { return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FASTKD_INLINE VD fma(VD a, VD b, VD c) { return (VD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
FASTKD_INLINE VF max(VF a, VF b) { return (VF)_mm512_max_ps((__m512)a, (__m512)b); }
FASTKD_INLINE VD max(VD a, VD b) { return (VD)_mm512_max_pd((__m512d)a, (__m512d)b); }
FASTKD_INLINE VF min(VF a, VF b) { return (VF)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
FASTKD_INLINE VF fma(VF a, VF b, VF c) { return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FASTKD_INLINE VD fma(VD a, VD b, VD c) { return (VD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
FASTKD_INLINE VF max(VF a, VF b) { return (VF)_mm256_max_ps((__m256)a, (__m256)b); }
FASTKD_INLINE VD max(VD a, VD b) { return (VD)_mm256_max_pd((__m256d)a, (__m256d)b); }
FASTKD_INLINE VF min(VF a, VF b) { return (VF)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__aarch64__)
FASTKD_INLINE VF fma(VF a, VF b, VF c) { return (VF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
FASTKD_INLINE VD fma(VD a, VD b, VD c) { return (VD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
FASTKD_INLINE VF max(VF a, VF b) { return a > b ? a : b; }
FASTKD_INLINE VD max(VD a, VD b) { return a > b ? a : b; }
FASTKD_INLINE VF min(VF a, VF b) { return a < b ? a : b; }
#else
FASTKD_INLINE VF fma(VF a, VF b, VF c) { return a * b + c; }
FASTKD_INLINE VD fma(VD a, VD b, VD c) { return a * b + c; }
FASTKD_INLINE VF max(VF a, VF b) { return a > b ? a : b; }
FASTKD_INLINE VD max(VD a, VD b) { return a > b ? a : b; }
FASTKD_INLINE VF min(VF a, VF b) { return a < b ? a : b; }
#endif
// In all of them max(a, b) and min(a, b) are b when either is NaN.

// Lane l of the result is lane order[l] of v.
#if defined(__AVX512F__)
FASTKD_INLINE VF permute(VF v, IF order) { return (VF)_mm512_permutexvar_ps((__m512i)order, (__m512)v); }
#elif defined(__AVX2__)
FASTKD_INLINE VF permute(VF v, IF order) { return (VF)_mm256_permutevar8x32_ps((__m256)v, (__m256i)order); }
#elif defined(__clang__)
FASTKD_INLINE VF permute(VF v, IF order) {
  VF moved{};
  for (int l = 0; l < Lanes<float>::n; ++l) moved[l] = v[order[l]];
  return moved;
}
#else
FASTKD_INLINE VF permute(VF v, IF order) { return __builtin_shuffle(v, order); }
#endif

// The first `count` numbers at p, then `fill`; nothing beyond them is read. 0 < count < Lanes<T>::n.
#if defined(__AVX512F__)
FASTKD_INLINE VF load_first(const float* p, int count, float fill) {
  return (VF)_mm512_mask_loadu_ps((__m512)splat(fill), static_cast<__mmask16>((1u << count) - 1), p);
}
FASTKD_INLINE VD load_first(const double* p, int count, double fill) {
  return (VD)_mm512_mask_loadu_pd((__m512d)splat(fill), static_cast<__mmask8>((1u << count) - 1), p);
}
#elif defined(__AVX2__)
FASTKD_INLINE VF load_first(const float* p, int count, float fill) {
  const IF here = IF{0, 1, 2, 3, 4, 5, 6, 7} < count;
  return here ? (VF)_mm256_maskload_ps(p, (__m256i)here) : splat(fill);
}
FASTKD_INLINE VD load_first(const double* p, int count, double fill) {
  const ID here = ID{0, 1, 2, 3} < static_cast<std::int64_t>(count);
  return here ? (VD)_mm256_maskload_pd(p, (__m256i)here) : splat(fill);
}
#else
template <class T>
FASTKD_INLINE typename Lanes<T>::V load_first(const T* p, int count, T fill) {
  T x[Lanes<T>::n];
  for (int l = 0; l < Lanes<T>::n; ++l) x[l] = l < count ? p[l] : fill;
  return load(x);
}
#endif

// 2^(x*c) for x*c <= 0: relative error below 1e-7 (float), 2e-16 (double) plus the error of x*c.
// Below the smallest normal number the result is exactly 0; NaN stays NaN.
FASTKD_INLINE VF exp2_of(VF x, VF c) {
  const VF magic = splat(0x1.8p23f);
  const VF k = fma(x, c, magic);
  const VF f = fma(x, c, magic - k);
  VF q = splat(0x1.446c7cp-13f);
  q = fma(q, f, splat(0x1.5f0896p-10f));
  q = fma(q, f, splat(0x1.3b29e4p-7f));
  q = fma(q, f, splat(0x1.c6af6cp-5f));
  q = fma(q, f, splat(0x1.ebfbe0p-3f));
  q = fma(q, f, splat(0x1.62e430p-1f));
  q = fma(q, f, splat(1.0f));
  const VF scale = (VF)(((IF)k << 23) + 0x3f800000);
  const IF tiny = k < (0x1.8p23f - 126.0f);
  return (VF)(~tiny & (IF)(q * scale));
}
FASTKD_INLINE VD exp2_of(VD x, VD c) {
  const VD magic = splat(0x1.8p52);
  const VD k = fma(x, c, magic);
  const VD f = fma(x, c, magic - k);
  VD q = splat(0x1.c4c8f39ba71f0p-36);
  q = fma(q, f, splat(0x1.e9ec1fb659d10p-32));
  q = fma(q, f, splat(0x1.e4cef67eab5e7p-28));
  q = fma(q, f, splat(0x1.b524ebd1481a9p-24));
  q = fma(q, f, splat(0x1.62c022494fc79p-20));
  q = fma(q, f, splat(0x1.ffcbfc6da6e6cp-17));
  q = fma(q, f, splat(0x1.430912f86a0ccp-13));
  q = fma(q, f, splat(0x1.5d87fe78a3f9cp-10));
  q = fma(q, f, splat(0x1.3b2ab6fba4e7dp-7));
  q = fma(q, f, splat(0x1.c6b08d704a0c6p-5));
  q = fma(q, f, splat(0x1.ebfbdff82c58fp-3));
  q = fma(q, f, splat(0x1.62e42fefa39efp-1));
  q = fma(q, f, splat(1.0));
  const VD scale = (VD)(((ID)k << 52) + 0x3ff0000000000000);
  const ID tiny = k < (0x1.8p52 - 1022.0);
  return (VD)(~tiny & (ID)(q * scale));
}

// Natural logarithm of positive normal numbers, within 1 ulp (float), and of NaN; others: no promise.
FASTKD_INLINE VF log_of(VF x) {
  // Split at sqrt(1/2) so that the mantissa lies around 1.
  const IF e = ((IF)x - 0x3f3504f3) >> 23;
  const VF f = (VF)((IF)x - (e << 23)) - 1.0f;
  const VF n = __builtin_convertvector(e, VF);
  VF q = splat(0x1.2c564ep-4f);
  q = fma(q, f, splat(-0x1.dd96bap-4f));
  q = fma(q, f, splat(0x1.dc8e5ep-4f));
  q = fma(q, f, splat(-0x1.fbc4e8p-4f));
  q = fma(q, f, splat(0x1.23dd1ap-3f));
  q = fma(q, f, splat(-0x1.55625cp-3f));
  q = fma(q, f, splat(0x1.999d36p-3f));
  q = fma(q, f, splat(-0x1.ffffe6p-3f));
  q = fma(q, f, splat(0x1.555554p-2f));
  const VF ff = f * f;
  // ln 2 in two parts: n * hi is exact.
  VF y = fma(q * f, ff, n * splat(-2.12194440e-4f));
  y = fma(ff, splat(-0.5f), y);
  return fma(n, splat(0.693359375f), f + y) + (x - x);  // NaN stays NaN
}
FASTKD_INLINE VD log_of(VD x) {
  VD y{};
  for (int l = 0; l < Lanes<double>::n; ++l) y[l] = __builtin_log(x[l]);
  return y;
}

// (exp(-u) - 1 + u) for |u| <= 1, accurate relative to itself: about u*u/2, never negative.
FASTKD_INLINE VF phi_of(VF u) {
  VF q = splat(-0x1.7416ecp-19f);
  q = fma(q, u, splat(0x1.a96222p-16f));
  q = fma(q, u, splat(-0x1.a028cap-13f));
  q = fma(q, u, splat(0x1.6bffb2p-10f));
  q = fma(q, u, splat(-0x1.1110e0p-7f));
  q = fma(q, u, splat(0x1.55557ap-5f));
  q = fma(q, u, splat(-0x1.555556p-3f));
  q = fma(q, u, splat(0x1.000000p-1f));
  return q * (u * u);
}
FASTKD_INLINE VD phi_of(VD u) {
  VD q = splat(0x1.b03f6ca6980a6p-45);
  q = fma(q, u, splat(-0x1.b4728b92f91c7p-41));
  q = fma(q, u, splat(0x1.939bbbd57f718p-37));
  q = fma(q, u, splat(-0x1.611b7a0ccfce9p-33));
  q = fma(q, u, splat(0x1.1eed84115efbep-29));
  q = fma(q, u, splat(-0x1.ae646409c763cp-26));
  q = fma(q, u, splat(0x1.27e4fb89b10aep-22));
  q = fma(q, u, splat(-0x1.71de3a4a696dep-19));
  q = fma(q, u, splat(0x1.a01a019ffdedcp-16));
  q = fma(q, u, splat(-0x1.a01a01a0232f3p-13));
  q = fma(q, u, splat(0x1.6c16c16c16d54p-10));
  q = fma(q, u, splat(-0x1.11111111110dbp-7));
  q = fma(q, u, splat(0x1.5555555555555p-5));
  q = fma(q, u, splat(-0x1.5555555555555p-3));
  q = fma(q, u, splat(0x1.0000000000000p-1));
  return q * (u * u);
}

// Sum and maximum over the lanes, always in the same order: the halves are folded onto each other.
template <class T, int Bytes, class Op>
FASTKD_INLINE T fold(typename Sized<T, Bytes>::V v, Op op) {
  if constexpr (Bytes == 2 * sizeof(T)) {
    return op(v[0], v[1]);
  } else {
    typename Sized<T, Bytes / 2>::V low, high;
    __builtin_memcpy(&low, &v, Bytes / 2);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + Bytes / 2, Bytes / 2);
    return fold<T, Bytes / 2>(op(low, high), op);
  }
}
template <class T>
FASTKD_INLINE T lane_sum(typename Lanes<T>::V v) {
  return fold<T, kBytes>(v, [](auto a, auto b) { return a + b; });
}
template <class T>
FASTKD_INLINE T lane_max(typename Lanes<T>::V v) {
  return fold<T, kBytes>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// One number in and out of the storage types, by bit arithmetic where the compiler has no type.
FASTKD_INLINE float widen(float x) { return x; }
FASTKD_INLINE double widen(double x) { return x; }
FASTKD_INLINE float widen(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
FASTKD_INLINE float widen(fp16 x) {
  // Scaling by 2^112 places the exponent and makes normal numbers of subnormal ones.
  const std::uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  float y;
  __builtin_memcpy(&y, &magnitude, 4);
  y *= 0x1p112f;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &y, 4);
  // An exponent of all ones is infinity or NaN in both formats.
  bits |= (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  bits |= (x.bits & 0x8000u) << 16;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

template <class T>
FASTKD_INLINE void narrow(T x, float* out) {
  *out = static_cast<float>(x);
}
template <class T>
FASTKD_INLINE void narrow(T x, double* out) {
  *out = x;
}
template <class T>
FASTKD_INLINE void narrow(T x, bf16* out) {
  const float y = static_cast<float>(x);
  std::uint32_t bits;
  __builtin_memcpy(&bits, &y, 4);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<std::uint16_t>(y != y ? 0x7fc0u : rounded);
}
template <class T>
FASTKD_INLINE void narrow(T x, fp16* out) {
  const float y = static_cast<float>(x);
  std::uint32_t bits;
  __builtin_memcpy(&bits, &y, 4);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 65536 and more, infinity included
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below the smallest normal: the adder rounds
    float small;
    __builtin_memcpy(&small, &magnitude, 4);
    small += 0.5f;
    std::uint32_t small_bits;
    __builtin_memcpy(&small_bits, &small, 4);
    half = small_bits - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(half | sign);
}

// n contiguous numbers between a storage type and the working type.
template <class Src, class T>
FASTKD_INLINE void widen_row(const Src* in, T* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(widen(in[i]));
}
template <class T, class Dst>
FASTKD_INLINE void narrow_row(const T* in, Dst* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) narrow(in[i], out + i);
}

// As many numbers as a vector of the working type holds, from and to a storage type.
FASTKD_INLINE VF load_wide(const float* p) { return load(p); }
FASTKD_INLINE VD load_wide(const double* p) { return load(p); }
FASTKD_INLINE VF load_wide(const bf16* p) {
  HF bits;
  __builtin_memcpy(&bits, p, kBytes / 2);
  return (VF)(__builtin_convertvector(bits, UF) << 16);
}
FASTKD_INLINE VF load_wide(const fp16* p) {
#if defined(__AVX512F__)
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VF v{};
  for (int l = 0; l < Lanes<float>::n; ++l) v[l] = widen(p[l]);
  return v;
#endif
}
FASTKD_INLINE void store_narrow(float* p, VF v) { store(p, v); }
FASTKD_INLINE void store_narrow(double* p, VD v) { store(p, v); }
FASTKD_INLINE void store_narrow(bf16* p, VF v) {
  const UF bits = (UF)v;
  const UF rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UF quiet = UF{} + 0x7fc0u;
  const HF half = __builtin_convertvector(v != v ? quiet : rounded, HF);
  __builtin_memcpy(p, &half, kBytes / 2);
}
FASTKD_INLINE void store_narrow(fp16* p, VF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int l = 0; l < Lanes<float>::n; ++l) narrow(v[l], p + l);
#endif
}

// Sums of neighbours: a0+a1, a2+a3, .., b0+b1, b2+b3, ..
template <class T>
FASTKD_INLINE typename Lanes<T>::V pair_sums(typename Lanes<T>::V a, typename Lanes<T>::V b) {
  constexpr int n = Lanes<T>::n;
#if defined(__clang__)
  typename Lanes<T>::V sums{};
  for (int l = 0; l < n / 2; ++l) {
    sums[l] = a[2 * l] + a[2 * l + 1];
    sums[l + n / 2] = b[2 * l] + b[2 * l + 1];
  }
  return sums;
#else
  typename Lanes<T>::I even{};
  for (int l = 0; l < n; ++l) even[l] = 2 * l;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
#endif
}
// Lane l of the result is the sum over the lanes of v[l]; v is used up.
template <class T>
FASTKD_INLINE typename Lanes<T>::V lane_sums(typename Lanes<T>::V* v) {
  for (int rows = Lanes<T>::n; rows > 1; rows /= 2)
    for (int r = 0; r < rows / 2; ++r) v[r] = pair_sums<T>(v[2 * r], v[2 * r + 1]);
  return v[0];
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
