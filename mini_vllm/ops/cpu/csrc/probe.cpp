// Two ceilings of this machine for programs of this library: multiply-adds from registers, and reading memory.
#include "abi.h"
#include "pool.h"
#include "simd.h"

// Each thread of the pool does `rounds` rounds of 24 independent multiply-adds of a vector of floats, none of which
// touches memory. Returns how many floating-point operations that was (two for a multiply-add).
MV_API int64_t mv_multiply_add_probe(int64_t rounds, float* result) {
  using namespace mv;
  constexpr int kChains = kLanes == 16 ? 24 : 12;  // more than latency x units, and they fit the registers
  parallel_for(num_threads(), [&](int64_t thread) {
    F32 acc[kChains], factor = splat(0.999f), addend = splat(1e-3f);
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = splat(float(i));
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 24
      for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * factor + addend;
    F32 total = {};
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) total += acc[i];
    if (thread == 0) *result = sum(total);
  });
  return 2 * rounds * kChains * kLanes * num_threads();
}

// Reads [floats] (a multiple of 256) by all threads, in pieces that the pool shares out.
MV_API void mv_read_probe(const float* memory, int64_t floats, float* result) {
  using namespace mv;
  constexpr int64_t kPiece = 64 * 1024;
  float* sums = static_cast<float*>(thread_scratch(kScratchPlan, size_t(floats / kPiece + 1) * sizeof(float)));
  parallel_for((floats + kPiece - 1) / kPiece, [&](int64_t piece) {
    int64_t end = (piece + 1) * kPiece < floats ? (piece + 1) * kPiece : floats;
    F32 acc[4] = {};
    for (int64_t i = piece * kPiece; i < end; i += 4 * kLanes)
      for (int c = 0; c < 4; ++c) acc[c] += load(memory + i + c * kLanes);
    sums[piece] = sum(acc[0] + acc[1] + acc[2] + acc[3]);
  });
  *result = sums[0];
}
