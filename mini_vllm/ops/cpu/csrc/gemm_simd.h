// Words that matrix kernels are written in, at each instruction-set level: 32 lanes are one panel of output channels.
//
// I32 and F32 hold one number for each of the 32 channels; Bytes holds four consecutive k of each (128 bytes, as a
// panel stores them). dot() adds, lane by lane, four products of an unsigned weight byte and a signed activation byte.
// With AVX-512 its second operand is broadcast out of memory, and it is inline assembly: gcc 12 neither folds the
// broadcast nor keeps a tile's accumulators in registers when they go through intrinsics.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "abi.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define MV_GEMM_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MV_GEMM_AVX2 1
#endif
#if defined(MV_GEMM_AVX512) || defined(MV_GEMM_AVX2)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define MV_INLINE inline __attribute__((always_inline))
// Tiles are functions of their own: inlined into one big one, gcc spills what they accumulate.
#define MV_TILE __attribute__((noinline))
#define MV_UNROLL _Pragma("GCC unroll 16")

namespace mv::gemm {

constexpr int kPanel = 32;         // output channels side by side
constexpr int kQuadBytes = 128;    // a panel's bytes for four consecutive k

MV_INLINE float bf16_to_f32(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

MV_INLINE uint16_t f32_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

MV_INLINE float f16_to_f32(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7fff, bits;
  if (body >= 0x7c00) {
    bits = sign | 0x7f800000 | ((body & 0x3ff) << 13);
  } else if (body >= 0x400) {
    bits = sign | ((body << 13) + (112u << 23));
  } else {  // subnormal: body * 2^-24
    float f = float(body) * 0x1p-24f;
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t f32_to_f16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  float a = std::fabs(f);
  if (!(a == a)) return sign | 0x7e00;
  if (a >= 65520.f) return sign | 0x7c00;
  if (a < 0x1p-14f) return sign | uint16_t(std::nearbyint(a * 0x1p24f));
  bits &= 0x7fffffff;
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | uint16_t((bits - (112u << 23)) >> 13);
}

MV_INLINE float load_scalar(const void* p, int64_t i, int dtype) {
  if (dtype == kF32) return static_cast<const float*>(p)[i];
  uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == kBF16 ? bf16_to_f32(h) : f16_to_f32(h);
}

MV_INLINE void store_scalar(void* p, int64_t i, int dtype, float f) {
  if (dtype == kF32) static_cast<float*>(p)[i] = f;
  else static_cast<uint16_t*>(p)[i] = dtype == kBF16 ? f32_to_bf16(f) : f32_to_f16(f);
}

MV_INLINE int64_t element_size(int dtype) { return dtype == kF32 ? 4 : 2; }

#if defined(MV_GEMM_AVX512)

constexpr int kMaxRows = 12;      // rows of an int8 tile: 24 of the 32 registers accumulate
constexpr int kMaxGroupRows = 8;  // rows of a tile that scales group by group

struct I32 { __m512i v[2]; };
struct F32 { __m512 v[2]; };
struct Bytes { __m512i v[2]; };
using Quad = const int8_t*;

MV_INLINE void prefetch_l1(const void* p) { asm volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(p))); }
MV_INLINE void prefetch_l2(const void* p) { asm volatile("prefetcht1 %0" ::"m"(*static_cast<const char*>(p))); }
MV_INLINE I32 isplat(int32_t x) { return {{_mm512_set1_epi32(x), _mm512_set1_epi32(x)}}; }
MV_INLINE I32 iadd(I32 a, I32 b) { return {{_mm512_add_epi32(a.v[0], b.v[0]), _mm512_add_epi32(a.v[1], b.v[1])}}; }
MV_INLINE Bytes load_bytes(const void* p) {
  return {{_mm512_loadu_si512(p), _mm512_loadu_si512(static_cast<const char*>(p) + 64)}};
}
MV_INLINE Bytes low_nibbles(Bytes b) {
  __m512i mask = _mm512_set1_epi8(15);
  return {{_mm512_and_si512(b.v[0], mask), _mm512_and_si512(b.v[1], mask)}};
}
MV_INLINE Bytes high_nibbles(Bytes b) {
  __m512i mask = _mm512_set1_epi8(15);
  return {{_mm512_and_si512(_mm512_srli_epi16(b.v[0], 4), mask), _mm512_and_si512(_mm512_srli_epi16(b.v[1], 4), mask)}};
}
MV_INLINE void store_bytes(void* p, Bytes b) {
  _mm512_storeu_si512(p, b.v[0]);
  _mm512_storeu_si512(static_cast<char*>(p) + 64, b.v[1]);
}
MV_INLINE Quad make_quad(const int8_t* x) { return x; }
MV_INLINE void dot_lanes(__m512i& acc, __m512i w, Quad x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x)));
}
MV_INLINE void dot(I32& acc, const Bytes& w, Quad x) {
  dot_lanes(acc.v[0], w.v[0], x);
  dot_lanes(acc.v[1], w.v[1], x);
}
MV_INLINE F32 fsplat(float x) { return {{_mm512_set1_ps(x), _mm512_set1_ps(x)}}; }
MV_INLINE F32 fload(const float* p) { return {{_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}}; }
MV_INLINE void fstore(float* p, F32 a) {
  _mm512_storeu_ps(p, a.v[0]);
  _mm512_storeu_ps(p + 16, a.v[1]);
}
MV_INLINE F32 load_f16(const void* p) {
  auto h = static_cast<const __m256i*>(p);
  return {{_mm512_cvtph_ps(_mm256_loadu_si256(h)), _mm512_cvtph_ps(_mm256_loadu_si256(h + 1))}};
}
MV_INLINE F32 to_float(I32 a) { return {{_mm512_cvtepi32_ps(a.v[0]), _mm512_cvtepi32_ps(a.v[1])}}; }
MV_INLINE F32 fmul(F32 a, F32 b) { return {{_mm512_mul_ps(a.v[0], b.v[0]), _mm512_mul_ps(a.v[1], b.v[1])}}; }
MV_INLINE F32 fadd(F32 a, F32 b) { return {{_mm512_add_ps(a.v[0], b.v[0]), _mm512_add_ps(a.v[1], b.v[1])}}; }
MV_INLINE F32 fma(F32 a, F32 b, F32 c) {
  return {{_mm512_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm512_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
MV_INLINE void store_panel(void* y, int dtype, F32 a) {
  if (dtype == kF32) return fstore(static_cast<float*>(y), a);
  auto h = static_cast<__m256i*>(y);
  for (int i = 0; i < 2; i++) {
    __m256i half = dtype == kBF16 ? (__m256i)_mm512_cvtneps_pbh(a.v[i])
                                  : _mm512_cvtps_ph(a.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(h + i, half);
  }
}

#elif defined(MV_GEMM_AVX2)

constexpr int kMaxRows = 2;
constexpr int kMaxGroupRows = 2;

struct I32 { __m256i v[4]; };
struct F32 { __m256 v[4]; };
struct Bytes { __m256i v[4]; };
struct Quad { __m256i even, odd; };  // (x0, x2) and (x1, x3) as 16-bit pairs in every lane

#define MV_EACH MV_UNROLL for (int i = 0; i < 4; i++)
MV_INLINE void prefetch_l1(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
MV_INLINE void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
MV_INLINE I32 isplat(int32_t x) { I32 r; MV_EACH r.v[i] = _mm256_set1_epi32(x); return r; }
MV_INLINE I32 iadd(I32 a, I32 b) { MV_EACH a.v[i] = _mm256_add_epi32(a.v[i], b.v[i]); return a; }
MV_INLINE Bytes load_bytes(const void* p) {
  Bytes r;
  MV_EACH r.v[i] = _mm256_loadu_si256(static_cast<const __m256i*>(p) + i);
  return r;
}
MV_INLINE void store_bytes(void* p, Bytes b) { MV_EACH _mm256_storeu_si256(static_cast<__m256i*>(p) + i, b.v[i]); }
MV_INLINE Bytes low_nibbles(Bytes b) {
  MV_EACH b.v[i] = _mm256_and_si256(b.v[i], _mm256_set1_epi8(15));
  return b;
}
MV_INLINE Bytes high_nibbles(Bytes b) {
  MV_EACH b.v[i] = _mm256_and_si256(_mm256_srli_epi16(b.v[i], 4), _mm256_set1_epi8(15));
  return b;
}
MV_INLINE Quad make_quad(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  __m256i all = _mm256_set1_epi32(four);
  return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
}
// maddubs would saturate: 255 * 127 * 2 does not fit 16 bits.
MV_INLINE void dot(I32& acc, const Bytes& w, const Quad& x) {
  MV_EACH {
    __m256i even = _mm256_and_si256(w.v[i], _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w.v[i], 8);
    __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(even, x.even), _mm256_madd_epi16(odd, x.odd));
    acc.v[i] = _mm256_add_epi32(acc.v[i], sum);
  }
}
MV_INLINE F32 fsplat(float x) { F32 r; MV_EACH r.v[i] = _mm256_set1_ps(x); return r; }
MV_INLINE F32 fload(const float* p) { F32 r; MV_EACH r.v[i] = _mm256_loadu_ps(p + 8 * i); return r; }
MV_INLINE void fstore(float* p, F32 a) { MV_EACH _mm256_storeu_ps(p + 8 * i, a.v[i]); }
MV_INLINE F32 load_f16(const void* p) {
  F32 r;
  MV_EACH r.v[i] = _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p) + i));
  return r;
}
MV_INLINE F32 to_float(I32 a) { F32 r; MV_EACH r.v[i] = _mm256_cvtepi32_ps(a.v[i]); return r; }
MV_INLINE F32 fmul(F32 a, F32 b) { MV_EACH a.v[i] = _mm256_mul_ps(a.v[i], b.v[i]); return a; }
MV_INLINE F32 fadd(F32 a, F32 b) { MV_EACH a.v[i] = _mm256_add_ps(a.v[i], b.v[i]); return a; }
MV_INLINE F32 fma(F32 a, F32 b, F32 c) { MV_EACH c.v[i] = _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]); return c; }
#undef MV_EACH

#else

constexpr int kMaxRows = 4;
constexpr int kMaxGroupRows = 4;

struct I32 { int32_t v[kPanel]; };
struct F32 { float v[kPanel]; };
struct Bytes { uint8_t v[kQuadBytes]; };
using Quad = const int8_t*;

#define MV_EACH for (int i = 0; i < kPanel; i++)
MV_INLINE void prefetch_l1(const void*) {}
MV_INLINE void prefetch_l2(const void*) {}
MV_INLINE I32 isplat(int32_t x) { I32 r; MV_EACH r.v[i] = x; return r; }
MV_INLINE I32 iadd(I32 a, const I32& b) { MV_EACH a.v[i] += b.v[i]; return a; }
MV_INLINE Bytes load_bytes(const void* p) { Bytes r; std::memcpy(r.v, p, kQuadBytes); return r; }
MV_INLINE void store_bytes(void* p, const Bytes& b) { std::memcpy(p, b.v, kQuadBytes); }
MV_INLINE Bytes low_nibbles(Bytes b) { for (uint8_t& byte : b.v) byte &= 15; return b; }
MV_INLINE Bytes high_nibbles(Bytes b) { for (uint8_t& byte : b.v) byte >>= 4; return b; }
MV_INLINE Quad make_quad(const int8_t* x) { return x; }
MV_INLINE void dot(I32& acc, const Bytes& w, Quad x) {
  MV_EACH acc.v[i] += w.v[4 * i] * x[0] + w.v[4 * i + 1] * x[1] + w.v[4 * i + 2] * x[2] + w.v[4 * i + 3] * x[3];
}
MV_INLINE F32 fsplat(float x) { F32 r; MV_EACH r.v[i] = x; return r; }
MV_INLINE F32 fload(const float* p) { F32 r; std::memcpy(r.v, p, sizeof r.v); return r; }
MV_INLINE void fstore(float* p, const F32& a) { std::memcpy(p, a.v, sizeof a.v); }
MV_INLINE F32 load_f16(const void* p) { F32 r; MV_EACH r.v[i] = load_scalar(p, i, kF16); return r; }
MV_INLINE F32 to_float(const I32& a) { F32 r; MV_EACH r.v[i] = float(a.v[i]); return r; }
MV_INLINE F32 fmul(F32 a, const F32& b) { MV_EACH a.v[i] *= b.v[i]; return a; }
MV_INLINE F32 fadd(F32 a, const F32& b) { MV_EACH a.v[i] += b.v[i]; return a; }
MV_INLINE F32 fma(const F32& a, const F32& b, F32 c) { MV_EACH c.v[i] += a.v[i] * b.v[i]; return c; }
#undef MV_EACH

#endif

#if !defined(MV_GEMM_AVX512)
inline void store_panel(void* y, int dtype, const F32& a) {
  alignas(64) float values[kPanel];
  fstore(values, a);
  for (int i = 0; i < kPanel; i++) store_scalar(y, i, dtype, values[i]);
}
#endif

}  // namespace mv::gemm
