// The words of gemm_simd.h with AVX-512: a word is two registers. With or without VNNI and BF16.
#pragma once
#include "gemm_simd.h"

namespace mv::gemm {

constexpr int kMaxRows = 12;  // rows of an int8 tile: 24 of the 32 registers accumulate

struct I32 { __m512i v[2]; };
struct F32 { __m512 v[2]; };
struct Bytes { __m512i v[2]; };
struct Halves { __m512i v[2]; };  // sums of nibble products, two for each channel

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
MV_INLINE __m512i splat_dword(const void* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return _mm512_set1_epi32(bits);
}
MV_INLINE void add_lanes(__m512i& acc, __m512i x) { asm("vpaddd %1, %0, %0" : "+v"(acc) : "v"(x)); }
MV_INLINE void add_halves(__m512i& acc, __m512i x) { asm("vpaddw %1, %0, %0" : "+v"(acc) : "v"(x)); }
MV_INLINE void fma_lanes(__m512& acc, __m512 a, __m512 b) { asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }

#if defined(MV_GEMM_VNNI)

constexpr int kMaxGroupRows = 8;  // rows of a tile that scales group by group
constexpr bool kHalves = false, kNibbleSums = false;
using Act = int8_t;
using Quad = const int8_t*;
MV_INLINE Quad make_quad(const Act* x) { return x; }
MV_INLINE void dot_lanes(__m512i& acc, __m512i w, Quad x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x)));
}
MV_INLINE void dot(I32& acc, const Bytes& w, Quad x) {
  dot_lanes(acc.v[0], w.v[0], x);
  dot_lanes(acc.v[1], w.v[1], x);
}

#else

constexpr int kMaxGroupRows = 6;
constexpr bool kHalves = true, kNibbleSums = true;
using Act = int16_t;
struct Quad { __m512i even, odd; };  // (x0, x2) and (x1, x3) in every lane
MV_INLINE Quad make_quad(const Act* x) { return {splat_dword(x), splat_dword(x + 2)}; }
MV_INLINE void dot(I32& acc, const Bytes& w, const Quad& x) {
  MV_UNROLL for (int i = 0; i < 2; i++) {
    add_lanes(acc.v[i], _mm512_madd_epi16(_mm512_and_si512(w.v[i], _mm512_set1_epi16(255)), x.even));
    add_lanes(acc.v[i], _mm512_madd_epi16(_mm512_srli_epi16(w.v[i], 8), x.odd));
  }
}

#endif

MV_INLINE Halves no_nibbles() { return {{_mm512_setzero_si512(), _mm512_setzero_si512()}}; }
MV_INLINE void nibble_dot(Halves& acc, const Bytes& w, const int8_t* x) {
  __m512i quad = splat_dword(x);
  add_halves(acc.v[0], _mm512_maddubs_epi16(w.v[0], quad));
  add_halves(acc.v[1], _mm512_maddubs_epi16(w.v[1], quad));
}
MV_INLINE void add_nibbles(I32& acc, const Halves& sums) {
  MV_UNROLL for (int i = 0; i < 2; i++) add_lanes(acc.v[i], _mm512_madd_epi16(sums.v[i], _mm512_set1_epi16(1)));
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
// acc + a * b, for accumulators of tiles.
MV_INLINE void fma_into(F32& acc, const F32& a, const F32& b) {
  fma_lanes(acc.v[0], a.v[0], b.v[0]);
  fma_lanes(acc.v[1], a.v[1], b.v[1]);
}

// 32 numbers of a panel as floats: bfloat16 ones lie as channels 0 16 1 17 ..., so that halves of dwords are vectors.
MV_INLINE F32 load_bf16_panel(const void* p) {
  __m512i both = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
           _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))))}};
}
// Byte J of every channel's four, minus 128.
template <int J>
MV_INLINE F32 byte_to_float(const Bytes& b) {
  const __m512i magic = _mm512_set1_epi32(0x4b000000);  // 2^23, whose lowest bits count ones
  F32 r;
  MV_UNROLL for (int i = 0; i < 2; i++) {
    __m512i shifted = J == 0 ? b.v[i] : _mm512_srli_epi32(b.v[i], 8 * J);
    __m512i bits = _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi32(255), magic, 0xea);  // (a & b) | c
    r.v[i] = _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(8388736.f));
  }
  return r;
}

#if defined(MV_GEMM_VNNI)
MV_INLINE __m256i to_bf16(__m512 a) { return (__m256i)_mm512_cvtneps_pbh(a); }
#else
MV_INLINE __m256i to_bf16(__m512 a) {
  __m512i bits = _mm512_castps_si512(a), one = _mm512_set1_epi32(1);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#endif
MV_INLINE void store_panel(void* y, int dtype, F32 a) {
  if (dtype == kF32) return fstore(static_cast<float*>(y), a);
  auto h = static_cast<__m256i*>(y);
  for (int i = 0; i < 2; i++) {
    __m256i half = dtype == kBF16 ? to_bf16(a.v[i])
                                  : _mm512_cvtps_ph(a.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(h + i, half);
  }
}

}  // namespace mv::gemm
