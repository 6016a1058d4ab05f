// Words that matrix kernels are written in, at each instruction-set level: 32 lanes are one panel of output channels.
//
// I32 and F32 hold one number for each of the 32 channels; Bytes holds four consecutive k of each (128 bytes, as a
// panel stores them). dot() adds, lane by lane, four products of an unsigned weight byte and a signed activation; a
// level without such an instruction (VNNI) multiplies 16-bit pairs, for which activations are stored as `Act` of 16
// bits in the order k0 k2 k1 k3 (kHalves). Weights below 16 cannot overflow 16 bits when pairs of bytes are summed,
// up to kMostNibbleDots times, which is twice as fast again (kNibbleSums). All sums are exact.
// What accumulates goes through inline assembly with AVX-512: gcc 12 spills tiles written with intrinsics alone.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "abi.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define MV_GEMM_AVX512 1
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define MV_GEMM_VNNI 1
#endif
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
constexpr int kMostNibbleDots = 8; // 8 * 2 * 15 * 127 < 2^15

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

}  // namespace mv::gemm

#if defined(MV_GEMM_AVX512)
#include "gemm_simd_avx512.h"
#elif defined(MV_GEMM_AVX2)
#include "gemm_simd_avx2.h"
#else
#include "gemm_simd_portable.h"
#endif
