// What this machine can do at most, for benchmarks to state results against: multiply-adds out of registers, and
// reading memory, both on all threads of the pool.
#include <atomic>

#include "gemm.h"

namespace mv::gemm {
namespace {

#if defined(MV_GEMM_AVX512)
constexpr int kAccumulators = 6;  // words; twelve chains hide the latency of one
#else
constexpr int kAccumulators = 2;
#endif

MV_TILE float multiply(int64_t rounds) {
  F32 acc[kAccumulators], factor = fsplat(1.f), term = fsplat(1e-9f);
  MV_UNROLL for (int i = 0; i < kAccumulators; i++) acc[i] = fsplat(float(i));
  for (int64_t round = 0; round < rounds; round++)
    MV_UNROLL for (int again = 0; again < 4; again++)
      MV_UNROLL for (int i = 0; i < kAccumulators; i++) fma_into(acc[i], factor, term);
  alignas(64) float lanes[kPanel];
  MV_UNROLL for (int i = 1; i < kAccumulators; i++) acc[0] = fadd(acc[0], acc[i]);
  fstore(lanes, acc[0]);
  return lanes[0];
}

MV_TILE float read(const float* p, int64_t count) {
  F32 a = fsplat(0.f), b = a;
  for (int64_t i = 0; i + 2 * kPanel <= count; i += 2 * kPanel) a = fadd(a, fload(p + i)), b = fadd(b, fload(p + i + kPanel));
  alignas(64) float lanes[kPanel];
  fstore(lanes, fadd(a, b));
  return lanes[0];
}

std::atomic<float> sink{0.f};

}  // namespace
}  // namespace mv::gemm

// Returns how many multiply-adds of float32 were done.
MV_API int64_t mv_probe_fma(int64_t rounds) {
  using namespace mv::gemm;
  int64_t threads = mv::num_threads();
  mv::parallel_for(threads, [&](int64_t) { sink = multiply(rounds); });
  return threads * rounds * 4 * kAccumulators * kPanel;
}

MV_API void mv_probe_read(const void* memory, int64_t bytes) {
  using namespace mv::gemm;
  auto p = static_cast<const float*>(memory);
  mv::parallel_ranges(bytes / 4, 1 << 16, [&](int64_t begin, int64_t end) { sink = read(p + begin, end - begin); });
}
