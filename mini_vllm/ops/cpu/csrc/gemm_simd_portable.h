// The words of gemm_simd.h in plain C++, which compilers turn into whatever vectors there are.
#pragma once
#include "gemm_simd.h"

namespace mv::gemm {

constexpr int kMaxRows = 4;
constexpr int kMaxGroupRows = 4;
constexpr bool kHalves = false, kNibbleSums = true;

struct I32 { int32_t v[kPanel]; };
struct F32 { float v[kPanel]; };
struct Bytes { uint8_t v[kQuadBytes]; };
using Halves = I32;
using Act = int8_t;
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
MV_INLINE Halves no_nibbles() { return isplat(0); }
MV_INLINE void nibble_dot(Halves& acc, const Bytes& w, const int8_t* x) { dot(acc, w, x); }
MV_INLINE void add_nibbles(I32& acc, const Halves& sums) { acc = iadd(acc, sums); }
MV_INLINE F32 fsplat(float x) { F32 r; MV_EACH r.v[i] = x; return r; }
MV_INLINE F32 fload(const float* p) { F32 r; std::memcpy(r.v, p, sizeof r.v); return r; }
MV_INLINE void fstore(float* p, const F32& a) { std::memcpy(p, a.v, sizeof a.v); }
MV_INLINE F32 load_f16(const void* p) { F32 r; MV_EACH r.v[i] = load_scalar(p, i, kF16); return r; }
MV_INLINE F32 to_float(const I32& a) { F32 r; MV_EACH r.v[i] = float(a.v[i]); return r; }
MV_INLINE F32 fmul(F32 a, const F32& b) { MV_EACH a.v[i] *= b.v[i]; return a; }
MV_INLINE F32 fadd(F32 a, const F32& b) { MV_EACH a.v[i] += b.v[i]; return a; }
MV_INLINE F32 fma(const F32& a, const F32& b, F32 c) { MV_EACH c.v[i] += a.v[i] * b.v[i]; return c; }
MV_INLINE void fma_into(F32& acc, const F32& a, const F32& b) { MV_EACH acc.v[i] += a.v[i] * b.v[i]; }
MV_INLINE F32 load_bf16_panel(const void* p) {  // channels 0 16 1 17 ...
  F32 r;
  MV_EACH r.v[i] = load_scalar(p, i % 16 * 2 + i / 16, kBF16);
  return r;
}
template <int J>
MV_INLINE F32 byte_to_float(const Bytes& b) { F32 r; MV_EACH r.v[i] = float(int(b.v[4 * i + J]) - 128); return r; }
#undef MV_EACH

MV_INLINE void store_panel(void* y, int dtype, const F32& a) {
  alignas(64) float values[kPanel];
  fstore(values, a);
  for (int i = 0; i < kPanel; i++) store_scalar(y, i, dtype, values[i]);
}

}  // namespace mv::gemm
