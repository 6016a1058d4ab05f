// The words of gemm_simd.h with AVX2: a word is four registers.
#pragma once
#include "gemm_simd.h"

namespace mv::gemm {

constexpr int kMaxRows = 2;
constexpr int kMaxGroupRows = 2;
constexpr bool kHalves = true, kNibbleSums = true;

struct I32 { __m256i v[4]; };
struct F32 { __m256 v[4]; };
struct Bytes { __m256i v[4]; };
struct Halves { __m256i v[4]; };     // sums of nibble products, two for each channel
using Act = int16_t;
struct Quad { __m256i even, odd; };  // (x0, x2) and (x1, x3) in every lane

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
MV_INLINE __m256i splat_dword(const void* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return _mm256_set1_epi32(bits);
}
MV_INLINE Quad make_quad(const Act* x) { return {splat_dword(x), splat_dword(x + 2)}; }
// maddubs would saturate: 255 * 127 * 2 does not fit 16 bits.
MV_INLINE void dot(I32& acc, const Bytes& w, const Quad& x) {
  MV_EACH {
    __m256i even = _mm256_and_si256(w.v[i], _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w.v[i], 8);
    __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(even, x.even), _mm256_madd_epi16(odd, x.odd));
    acc.v[i] = _mm256_add_epi32(acc.v[i], sum);
  }
}
MV_INLINE Halves no_nibbles() { Halves r; MV_EACH r.v[i] = _mm256_setzero_si256(); return r; }
MV_INLINE void nibble_dot(Halves& acc, const Bytes& w, const int8_t* x) {
  __m256i quad = splat_dword(x);
  MV_EACH acc.v[i] = _mm256_add_epi16(acc.v[i], _mm256_maddubs_epi16(w.v[i], quad));
}
MV_INLINE void add_nibbles(I32& acc, const Halves& sums) {
  MV_EACH acc.v[i] = _mm256_add_epi32(acc.v[i], _mm256_madd_epi16(sums.v[i], _mm256_set1_epi16(1)));
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
MV_INLINE void fma_into(F32& acc, const F32& a, const F32& b) { acc = fma(a, b, acc); }
MV_INLINE F32 load_bf16_panel(const void* p) {  // channels 0 16 1 17 ...
  F32 r;
  MV_UNROLL for (int i = 0; i < 2; i++) {
    __m256i both = _mm256_loadu_si256(static_cast<const __m256i*>(p) + i);
    r.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    r.v[i + 2] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))));
  }
  return r;
}
template <int J>
MV_INLINE F32 byte_to_float(const Bytes& b) {
  F32 r;
  MV_EACH {
    __m256i byte = _mm256_and_si256(_mm256_srli_epi32(b.v[i], 8 * J), _mm256_set1_epi32(255));
    r.v[i] = _mm256_cvtepi32_ps(_mm256_sub_epi32(byte, _mm256_set1_epi32(128)));
  }
  return r;
}
#undef MV_EACH

MV_INLINE void store_panel(void* y, int dtype, const F32& a) {
  alignas(64) float values[kPanel];
  fstore(values, a);
  for (int i = 0; i < kPanel; i++) store_scalar(y, i, dtype, values[i]);
}

}  // namespace mv::gemm
