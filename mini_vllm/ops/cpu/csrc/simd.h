// Vectors of floats as wide as the instruction set has them, written with the compiler's vector extensions, so that
// one source serves every level: kLanes is 16 with AVX-512, 8 with AVX2, else 4 (SSE2, NEON). Memory may be unaligned.
// bf16 and f16 numbers are widened when loaded and rounded to nearest, ties to even, when stored.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MV_INLINE inline __attribute__((always_inline))

namespace mv {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class To, class From>
MV_INLINE To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <size_t... I>
MV_INLINE F32 splat(float x, std::index_sequence<I...>) { return F32{(static_cast<void>(I), x)...}; }
MV_INLINE F32 splat(float x) { return splat(x, std::make_index_sequence<kLanes>()); }
MV_INLINE I32 lane_numbers() {
  I32 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}
MV_INLINE F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
MV_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
MV_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }

// --- memory ------------------------------------------------------------------------------------------------

template <class Vector, class T>
MV_INLINE Vector load_raw(const T* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

MV_INLINE F32 load(const float* p) { return load_raw<F32>(p); }
MV_INLINE void store(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }

// GCC splits these conversions into halves where one instruction would do.
MV_INLINE U32 widen(U16 v) {
#if defined(__AVX512F__)
  return as<U32>(_mm512_cvtepu16_epi32(as<__m256i>(v)));
#elif defined(__AVX2__)
  return as<U32>(_mm256_cvtepu16_epi32(as<__m128i>(v)));
#else
  return __builtin_convertvector(v, U32);
#endif
}
MV_INLINE U16 narrow(U32 v) {
#if defined(__AVX512F__)
  return as<U16>(_mm512_cvtepi32_epi16(as<__m512i>(v)));
#else
  return __builtin_convertvector(v, U16);
#endif
}

MV_INLINE F32 load(const bf16* p) { return as<F32>(widen(load_raw<U16>(p)) << 16); }
MV_INLINE void store(bf16* p, F32 v) {
  U32 bits = as<U32>(v);
  U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v != v ? U32{} + 0x7fc0 : rounded;
  U16 halves = narrow(rounded);
  std::memcpy(p, &halves, sizeof halves);
}

// One number at a time, for processors without conversions of f16.
inline float f16_to_float(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 0x3ff;
  if (exponent == 31) return as<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return as<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  float magnitude = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -magnitude : magnitude;
}
inline uint16_t float_to_f16(float x) {
  uint32_t bits = as<uint32_t>(x), magnitude = bits & 0x7fffffff;
  uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {  // subnormal: let the adder round it to a multiple of 2^-24
    float sum = as<float>(magnitude) + 0.5f;
    return uint16_t(sign | (as<uint32_t>(sum) - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

MV_INLINE F32 load(const f16* p) {
#if defined(__AVX512F__)
  return as<F32>(_mm512_cvtph_ps(load_raw<__m256i>(p)));
#elif defined(__F16C__)
  return as<F32>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#else
  F32 v;
  for (int i = 0; i < kLanes; ++i) v[i] = f16_to_float(p[i].bits);
  return v;
#endif
}
MV_INLINE void store(f16* p, F32 v) {
#if defined(__AVX512F__)
  auto narrow = _mm512_cvtps_ph(as<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &narrow, sizeof narrow);
#elif defined(__F16C__)
  auto narrow = _mm256_cvtps_ph(as<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &narrow, sizeof narrow);
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_f16(v[i]);
#endif
}

// The first `count` (at most kLanes) elements; the other lanes are 0, and their memory is not touched.
template <class T>
MV_INLINE F32 load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T padded[kLanes] = {};
  for (int i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}
template <class T>
MV_INLINE void store_some(T* p, F32 v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T padded[kLanes];
  store(padded, v);
  for (int i = 0; i < count; ++i) p[i] = padded[i];
}

// What `v` becomes when it is stored as T and read again.
MV_INLINE F32 rounded_to(const float*, F32 v) { return v; }
template <class T>
MV_INLINE F32 rounded_to(const T*, F32 v) {
  T stored[kLanes];
  store(stored, v);
  return load(stored);
}

// --- across lanes --------------------------------------------------------------------------------------------

template <class Op>
MV_INLINE float reduce(F32 v, Op op) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = op(lanes[i], lanes[i + width]);
  return lanes[0];
}
MV_INLINE float sum(F32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(as<__m512>(v));
#else
  return reduce(v, [](float a, float b) { return a + b; });
#endif
}
MV_INLINE float highest(F32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(as<__m512>(v));
#else
  return reduce(v, [](float a, float b) { return a > b ? a : b; });
#endif
}

template <size_t... I>
MV_INLINE F32 zip_low(F32 a, F32 b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I % 2 * kLanes + I / 2)...);
}
template <size_t... I>
MV_INLINE F32 zip_high(F32 a, F32 b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I % 2 * kLanes + I / 2 + kLanes / 2)...);
}
// kLanes vectors as rows of a square become its columns. Each round zips row i with row i + half; after log2 rounds
// the bits of the row number and of the column number have changed places.
MV_INLINE void transpose(F32 (&rows)[kLanes]) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    F32 next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = zip_low(rows[i], rows[i + kLanes / 2], lanes);
      next[2 * i + 1] = zip_high(rows[i], rows[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// --- functions -----------------------------------------------------------------------------------------------

// exp(x) to about one unit in the last place; 0 below -87.3, infinite above 88.72; NaN stays NaN.
MV_INLINE F32 exp(F32 x) {
  F32 clamped = x > 88.72f ? splat(88.72f) : x;
  clamped = clamped < -88.0f ? splat(-88.0f) : clamped;
  F32 shifted = clamped * 1.44269504088896341f + 12582912.0f;  // rounds to the nearest integer
  F32 n = shifted - 12582912.0f;
  F32 r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  F32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  I32 exponent = (as<I32>(shifted) - 0x4b400000) << 23;
  F32 result = as<F32>(as<I32>(p) + exponent);
  result = x < -87.3f ? F32{} : result;
  result = x > 88.72f ? splat(__builtin_inff()) : result;
  return x != x ? x : result;
}

// tanh(x); near 0 by its series, where the formula would cancel.
MV_INLINE F32 tanh(F32 x) {
  F32 s = x * x;
  F32 series = x + x * s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835))));
  F32 bounded = x > 10.0f ? splat(10.0f) : x;
  bounded = bounded < -10.0f ? splat(-10.0f) : bounded;
  F32 formula = 1.0f - 2.0f / (exp(bounded + bounded) + 1.0f);
  return s < 0.0625f ? series : (x != x ? x : formula);
}

}  // namespace mv
