// One linear layer, y = x W^T + bias, as its weights lie in memory, and what every kernel for it is handed.
//
// The caller owns all memory; `packed` never changes after packing. Channels are padded to panels of 32 (kFloat: 64), k
// to `k_padded` (the padding's weights multiply activations of 0). Layouts:
//   kInt8   [panel][k/4][32 channels][4 k] bytes s + 128, then float scales[panels * 32] at `scales`.
//   kInt4   [panel][group]{ f16 scales[32], f16 minimums[32] if asymmetric,
//           [k/32][4][32 channels][4 k]: k-quad j of a stretch of 32 in the low nibbles, quad j + 4 in the high ones }
//           symmetric: w = scale * (q - 8), asymmetric: w = scale * q + minimum.
//   kFloat  [n/64][k][2][32 channels] of `weight_dtype`; bfloat16 panels have their channels in the order 0 16 1 17 ...
//   kBF16   oneDNN's own packing, [64 channels][k/2][64][2], read where it is (see gemm_bf16.cpp).
// Every row of y depends on its own row of x alone, bit for bit, however many rows there are: a sum over k runs in one
// order whatever the tile.
#pragma once
#include <algorithm>

#include "gemm_simd.h"
#include "pool.h"

namespace mv::gemm {

enum WeightKind { kInt8 = 1, kInt4 = 2, kBF16Packed = 3, kFloat = 4 };
// What activations become: what they are (weight only), int8 with a scale for each row, or for each `group` of a row.
enum Activation { kAsIs = 0, kPerToken = 1, kPerGroup = 2 };

struct Linear {
  const uint8_t* packed;
  const float* scales;  // kInt8
  const void* bias;     // or null
  int64_t n, k, k_padded;
  int64_t panel_bytes;
  int32_t kind, group, asymmetric, activation, bias_dtype, weight_dtype;
  int64_t num_panels() const { return (n + kPanel - 1) / kPanel; }
};

// Rows in and out of one call.
struct Rows {
  const void* x;
  int64_t ldx;
  void* y;
  int64_t ldy;
  int64_t count;
  int32_t x_dtype, y_dtype;
};

// Rows cut into tiles of nearly equal height, the higher ones first.
struct Tiling {
  int64_t rows, tiles;
  Tiling(int64_t rows_, int64_t most) : rows(rows_), tiles((rows_ + most - 1) / most) {}
  int64_t start(int64_t t) const { return t * (rows / tiles) + (t < rows % tiles ? t : rows % tiles); }
  int height(int64_t t) const { return int(rows / tiles + (t < rows % tiles)); }
};

// Activations as int8 numbers: tile after tile, each [k/4][rows of the tile][4]; so tile t begins at element start(t) *
// k_padded. Elements are bytes beside int4 weights and `Act` beside int8 ones.
struct QuantizedRows {
  void* values;
  float* scales;   // [row][groups or 1]
  int32_t* sums;   // [row][groups]: sum of the values, which corrects for weights being stored unsigned
  int64_t groups, scale_groups;
};

// In the calling thread's scratch, which stays valid until its next call. group: k_padded for one group a row.
QuantizedRows quantize_rows(const Rows& rows, const Linear& linear, const Tiling& tiling, int64_t group);

// Adds the bias and stores 32 channels of a row, fewer in the last panel.
MV_INLINE void finish_row(const Linear& linear, const Rows& rows, int64_t row, int64_t panel, F32 value) {
  int64_t column = panel * kPanel, columns = linear.n - column;
  char* y = static_cast<char*>(rows.y) + (row * rows.ldy + column) * element_size(rows.y_dtype);
  if (__builtin_expect(linear.bias == nullptr && columns >= kPanel, 1)) return store_panel(y, rows.y_dtype, value);
  alignas(64) float values[kPanel];
  fstore(values, value);
  columns = columns < kPanel ? columns : kPanel;
  for (int64_t i = 0; i < columns; i++) {
    float bias = linear.bias == nullptr ? 0.f : load_scalar(linear.bias, column + i, linear.bias_dtype);
    store_scalar(y, i, rows.y_dtype, values[i] + bias);
  }
}

void int8_linear(const Linear& linear, const Rows& rows);       // kInt8, kPerToken
void grouped_linear(const Linear& linear, const Rows& rows);    // kInt4, and kInt8 with kPerGroup
int float_linear(const Linear& linear, const Rows& rows);        // kFloat, and kInt8 with kAsIs
int weight_only_linear(const Linear& linear, const Rows& rows);  // kInt8, kAsIs
int bf16_linear(const Linear& linear, const Rows& rows);        // kBF16Packed

// Panels are dealt out in ranges of a multiple of `grain`, so that weights are read as streams; body(first, end). Few
// rows wait for memory, which a thread alone does not use up: short ranges, so that all end together, though none so
// short that taking it costs as much as the work. With many rows longer ones keep what they share in the cache.
constexpr int64_t kFewRows = 32, kShortestRead = 32 * 1024;
template <class Body>
inline void for_panels(int64_t panels, int64_t grain, int64_t panel_bytes, int64_t rows, Body&& body) {
  int64_t threads = num_threads(), size = panels / (threads * 4);
  if (rows <= kFewRows) {
    int64_t worth = panels * panel_bytes * rows / (kShortestRead * threads);
    int64_t ranges = threads * std::min<int64_t>(16, std::max<int64_t>(1, worth));
    size = (panels + ranges - 1) / ranges;
  }
  size = std::max(grain, size / grain * grain);
  parallel_for((panels + size - 1) / size, [&](int64_t i) { body(i * size, std::min(panels, (i + 1) * size)); });
}

// Fetches what a stream of weights reaches kAhead bytes on, while `Bytes` of it are used. Hardware does too little by
// itself there: two threads of a Skylake server read 16.7 GB/s with this and 12.3 without (20 are to be had).
// Processors with VNNI and BF16 did as well without.
constexpr int64_t kAhead = 2048;
template <int Bytes>
MV_INLINE void fetch_ahead(const uint8_t* weights) {
#if !defined(MV_GEMM_VNNI)
  MV_UNROLL for (int line = 0; line < Bytes; line += 64) prefetch_l1(weights + kAhead + line);
#endif
}

// Calls fn with the tile height as a compile-time constant.
template <int Most, class Fn>
MV_INLINE void with_height(int height, Fn&& fn) {
  if constexpr (Most == 1) {
    fn(std::integral_constant<int, 1>{});
  } else {
    if (height == Most) fn(std::integral_constant<int, Most>{});
    else with_height<Most - 1>(height, fn);
  }
}

}  // namespace mv::gemm

MV_API int mv_linear(const mv::gemm::Linear* linear, const void* x, int64_t ldx, int x_dtype, void* y, int64_t ldy,
                     int y_dtype, int64_t count);
