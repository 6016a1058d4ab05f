// The online softmax of attention (Milakov and Gimelshein 2018) in powers of two: queries are scaled by log2(e).
//
// A row's sum of weights is kept in kLanes parts, one for the keys of each lane, until the row is done.
#pragma once
#include "attention_tile.h"

namespace mv {

constexpr float kFloor = -1e30f;  // below every score, yet subtracting it from -inf gives -inf
constexpr float kLog2e = 1.44269504088896341f;

// 2^x for x <= 0, to about 1.5 units in the last place; exactly 1 at 0, 0 below -126; NaN stays NaN.
MV_INLINE F32 exp2_of_negative(F32 x) {
  F32 shifted = x + 12582912.0f;  // rounds to the nearest integer, which is then in the lower bits
  F32 f = x - (shifted - 12582912.0f);
  F32 p = splat(0.001326472731307149f);
  p = p * f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  U32 power = (as<U32>(shifted) << 23) + 0x3f800000u;  // unsigned: where x is below -126 it runs over, and is not used
  F32 result = p * as<F32>(power);
  return x < -126.0f ? F32{} : result;
}
inline float exp2_of_negative(float x) { return exp2_of_negative(splat(x))[0]; }

// State of the rows of an item: highest score, sum of weights, weighted sum of values.
struct Running {
  float *highest, *total, *output;
  void clear(int rows, int dim) const {
    std::fill_n(highest, rows, kFloor);
    std::fill_n(total, rows * kLanes, 0.0f);
    std::fill_n(output, size_t(rows) * dim, 0.0f);
  }
  static constexpr int64_t floats_per_row(int dim) { return dim + kLanes + 1; }
  static Running at(float* memory, int rows, int dim) {
    float* total = memory + size_t(rows) * dim;
    return {total + size_t(rows) * kLanes, total, memory};
  }
};

// whole = whole + part for each row; a part without a key leaves it as it is.
inline void merge(const Running& whole, const Running& part, int rows, int dim) {
  for (int r = 0; r < rows; ++r) {
    F32 added = load(part.total + r * kLanes);
    if (sum(added) == 0) continue;
    float top = std::max(whole.highest[r], part.highest[r]);
    float keep = exp2_of_negative(whole.highest[r] - top), take = exp2_of_negative(part.highest[r] - top);
    whole.highest[r] = top;
    float* total = whole.total + r * kLanes;
    store(total, load(total) * keep + added * take);
    for (int d = 0; d < dim; d += kLanes) {
      float* to = whole.output + size_t(r) * dim + d;
      store(to, load(to) * keep + load(part.output + size_t(r) * dim + d) * take);
    }
  }
}

// What becomes of the scores of one tile.
struct Softening {
  int start, num_vectors;           // position of key 0; vectors of keys that count
  bool masked;                      // some row does not see some key
  const int32_t *low, *limit;       // positions that a row sees
  float cap;                        // softcap * log2(e), of queries scaled by 1 / softcap; 0: none
  const float *key_scales, *value_scales;  // [kTile], or null
};

MV_INLINE float cap_and_mask(const Softening& how, float* row, int low, int limit) {
  const I32 lanes = lane_numbers();
  F32 best = splat(kFloor);
  for (int v = 0; v < how.num_vectors; ++v) {
    F32 score = load(row + v * kLanes);
    if (how.key_scales) score *= load(how.key_scales + v * kLanes);
    if (how.cap > 0) score = how.cap * tanh(score);
    if (how.masked) {
      I32 position = lanes + (how.start + v * kLanes);
      score = (position >= low) & (position < limit) ? score : splat(-__builtin_inff());
    }
    store(row + v * kLanes, score);
    best = max(score, best);
  }
  return highest(best);
}

// Scores of R rows, [R][kTile], become weights; decay: what older sums shrink by.
template <int R>
MV_INLINE void soften_rows(const Softening& how, float* scores, float* highest, float* total, float* decay) {
  constexpr int kPadded = (R + kLanes - 1) / kLanes * kLanes;
  float now[R], drop[kPadded] = {};
  for (int r = 0; r < R; ++r) {
    now[r] = std::max(highest[r], cap_and_mask(how, scores + r * kTile, how.low[r], how.limit[r]));
    drop[r] = highest[r] - now[r];
    highest[r] = now[r];
  }
  for (int r = 0; r < kPadded; r += kLanes) store(drop + r, exp2_of_negative(load(drop + r)));
  for (int r = 0; r < R; ++r) {
    float* row = scores + r * kTile;
    F32 weights = load(total + r * kLanes) * drop[r];
    for (int v = 0; v < how.num_vectors; ++v) {
      F32 weight = exp2_of_negative(load(row + v * kLanes) - now[r]);
      weights += weight;
      if (how.value_scales) weight *= load(how.value_scales + v * kLanes);
      store(row + v * kLanes, weight);
    }
    store(total + r * kLanes, weights);
    decay[r] = drop[r];
  }
}

}  // namespace mv
