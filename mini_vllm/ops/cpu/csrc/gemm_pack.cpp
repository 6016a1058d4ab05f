// Weights [n][k] of any element type to packed panels (see gemm.h for the layouts), a panel at a time on all threads.
//
// int8: scale = absmax / 127 of a channel, value = round to even(w * (127 / absmax)).
// int4: a float16 scale for each group of a channel. Symmetric values are -7 .. 7, asymmetric ones 0 .. 15 above a
// float16 minimum. Rounding the largest weight exactly is not worth the most: of a few narrower ranges the one with the
// least squared error is taken.
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <algorithm>
#include <vector>

#include "gemm.h"

namespace mv::gemm {
namespace {

struct Weights {
  const void* data;
  int64_t n, k, stride;
  int dtype;
  // Row `channel` as float32, zeros up to k_padded; all zeros beyond the last channel.
  void load(int64_t channel, int64_t k_padded, float* out) const {
    int64_t real = channel < n ? k : 0;
    const char* row = static_cast<const char*>(data) + channel * stride * element_size(dtype);
    for (int64_t i = 0; i < real; i++) out[i] = load_scalar(row, i, dtype);
    std::fill(out + real, out + k_padded, 0.f);
  }
};

float absmax(const float* w, int64_t count) {
  float most = 0.f;
  for (int64_t i = 0; i < count; i++) most = std::max(most, std::fabs(w[i]));
  return most;
}

void pack_int8_panel(const Weights& weights, int64_t panel, int64_t k_padded, uint8_t* out, float* scales, float* row) {
  for (int n = 0; n < kPanel; n++) {
    weights.load(panel * kPanel + n, k_padded, row);
    float most = absmax(row, k_padded);
    bool usable = most >= 1e-30f;
    scales[n] = usable ? most / 127.f : 1.f;
    float inverse = usable ? 127.f / most : 0.f;
    for (int64_t i = 0; i < k_padded; i++) {
      int q = int(std::min(std::max(std::nearbyint(row[i] * inverse), -127.f), 127.f));
      out[i / 4 * kQuadBytes + n * 4 + i % 4] = uint8_t(q + 128);
    }
  }
}

struct GroupGrid {
  uint16_t scale, minimum;
};

constexpr float kShrink[] = {1.f, 0.96f, 0.92f, 0.88f, 0.84f, 0.8f};

struct Grid {
  float scale, minimum, low, high;
  float quantize(float w) const {
    return std::min(std::max(std::nearbyint((w - minimum) / scale), low), high);
  }
  float error(const float* w, int64_t count) const {
    float sum = 0.f;
    for (int64_t i = 0; i < count; i++) {
      float off = quantize(w[i]) * scale + minimum - w[i];
      sum += off * off;
    }
    return sum;
  }
};

Grid rounded(float scale, float minimum, bool asymmetric) {
  float s = f16_to_f32(f32_to_f16(scale)), m = f16_to_f32(f32_to_f16(minimum));
  return {s > 0.f ? s : 1.f, m, asymmetric ? 0.f : -7.f, asymmetric ? 15.f : 7.f};
}

Grid choose_grid(const float* w, int64_t count, bool asymmetric) {
  float low = *std::min_element(w, w + count), high = *std::max_element(w, w + count);
  float most = std::max(std::fabs(low), std::fabs(high)), middle = (low + high) / 2;
  Grid best{};
  float least = INFINITY;
  for (float shrink : kShrink) {
    float span = (high - low) * shrink;
    Grid grid = asymmetric ? rounded(span / 15.f, middle - span / 2, true) : rounded(most * shrink / 7.f, 0.f, false);
    float error = grid.error(w, count);
    if (error < least) least = error, best = grid;
  }
  return best;
}

void pack_int4_panel(const Weights& weights, int64_t panel, int64_t k_padded, int64_t group, bool asymmetric,
                     uint8_t* out, float* row) {
  int64_t header = asymmetric ? 128 : 64, group_bytes = header + group * kPanel / 2;
  for (int n = 0; n < kPanel; n++) {
    weights.load(panel * kPanel + n, k_padded, row);
    for (int64_t g = 0; g * group < k_padded; g++) {
      const float* w = row + g * group;
      uint8_t* block = out + g * group_bytes;
      // Padding at the end of k is no weight: it must not widen a range.
      Grid grid = choose_grid(w, std::max<int64_t>(1, std::min(group, weights.k - g * group)), asymmetric);
      uint16_t halves[2] = {f32_to_f16(grid.scale), f32_to_f16(grid.minimum)};
      std::memcpy(block + n * 2, &halves[0], 2);
      if (asymmetric) std::memcpy(block + 64 + n * 2, &halves[1], 2);
      for (int64_t i = 0; i < group; i++) {
        auto nibble = uint8_t(int(grid.quantize(w[i])) + (asymmetric ? 0 : 8));
        int64_t quad = i % 32 / 4;
        uint8_t& byte = block[header + i / 32 * 4 * kQuadBytes + quad % 4 * kQuadBytes + n * 4 + i % 4];
        byte = quad < 4 ? nibble : uint8_t(byte | nibble << 4);
      }
    }
  }
}

// Where channel c of a panel lies: bfloat16 ones are in pairs c, c + 16.
inline int position(int c, int dtype) { return dtype == kBF16 ? c % 16 * 2 + c / 16 : c; }

// [k][2][32] of 64 channels, zeros beyond the last. A square of the matrix at a time, which the first cache holds.
template <class T>
void pack_float_wide(const Weights& weights, int64_t first, T* out) {
  constexpr int64_t kSquare = 64;
  for (int64_t k = 0; k < weights.k; k += kSquare)
    for (int64_t c = 0; c < 64; c++) {
      const T* row = static_cast<const T*>(weights.data) + (first + c) * weights.stride;
      T* to = out + c / kPanel * kPanel + position(int(c % kPanel), weights.dtype);
      bool real = first + c < weights.n;
      for (int64_t i = k; i < std::min(weights.k, k + kSquare); i++) to[i * 64] = real ? row[i] : T(0);
    }
}

template <class Fn>
void each_panel(const Weights& weights, int64_t k_padded, Fn&& fn) {
  parallel_for((weights.n + kPanel - 1) / kPanel, [&](int64_t panel) {
    fn(panel, static_cast<float*>(thread_scratch(kScratchGemm, size_t(k_padded) * 4)));
  });
}

}  // namespace
}  // namespace mv::gemm

// out: panels * k_padded * 32 bytes, scales: panels * 32.
MV_API int mv_pack_int8(const void* weights, int dtype, int64_t n, int64_t k, int64_t stride, int64_t k_padded,
                        void* out, float* scales) {
  using namespace mv;
  using namespace mv::gemm;
  if (k_padded % 32 != 0 || k_padded < k) return kUnsupported;
  Weights source{weights, n, k, stride, dtype};
  each_panel(source, k_padded, [&](int64_t panel, float* row) {
    auto to = static_cast<uint8_t*>(out) + panel * k_padded * kPanel;
    pack_int8_panel(source, panel, k_padded, to, scales + panel * kPanel, row);
  });
  return kOk;
}

// out: n rounded up to 64, times k, elements of the weights' own type.
MV_API int mv_pack_float(const void* weights, int dtype, int64_t n, int64_t k, int64_t stride, void* out) {
  using namespace mv;
  using namespace mv::gemm;
  Weights source{weights, n, k, stride, dtype};
  parallel_for((n + 63) / 64, [&](int64_t wide) {
    if (dtype == kF32) pack_float_wide(source, wide * 64, static_cast<float*>(out) + wide * 64 * k);
    else pack_float_wide(source, wide * 64, static_cast<uint16_t*>(out) + wide * 64 * k);
  });
  return kOk;
}

MV_API int mv_pack_int4(const void* weights, int dtype, int64_t n, int64_t k, int64_t stride, int64_t k_padded,
                        int64_t group, int asymmetric, void* out) {
  using namespace mv;
  using namespace mv::gemm;
  if (group % 32 != 0 || k_padded % group != 0 || k_padded < k) return kUnsupported;
  Weights source{weights, n, k, stride, dtype};
  int64_t panel_bytes = k_padded / group * ((asymmetric ? 128 : 64) + group * kPanel / 2);
  each_panel(source, k_padded, [&](int64_t panel, float* row) {
    auto to = static_cast<uint8_t*>(out) + panel * panel_bytes;
    pack_int4_panel(source, panel, k_padded, group, asymmetric != 0, to, row);
  });
  return kOk;
}

// Asks for huge pages behind memory that was just allocated and not yet written: about a tenth faster to read.
MV_API void mv_advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) / kHuge * kHuge;
  uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}
