// Register-blocked inner loops of attention over one tile of kTile keys, all in float32.
//
// Rows are queries: of one KV head, every query head of every query token in the row tile. Buffers are dense, with
// head dimensions padded to a multiple of kLanes by zeros:
//   queries [rows][dim]   keys transposed [dim][kTile]   scores and weights [rows][kTile]   output [rows][dim]
// A row's arithmetic is the same sequence of operations however many rows are worked on together, so a request's
// result does not depend on its neighbours or on how its prompt was cut.
#pragma once
#include "simd.h"

namespace mv {

constexpr int kTile = 64;
constexpr int kRowBlock = 4;
constexpr int kColumnBlock = kLanes == 16 ? 4 : 2;  // vectors beside kRowBlock rows that fit the registers

template <int R, int C>
MV_INLINE void score_block(const float* queries, const float* keys, int dim, float* scores) {
  F32 acc[R][C] = {};
  for (int d = 0; d < dim; ++d) {
    F32 k[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) k[c] = load(keys + d * kTile + c * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      F32 q = splat(queries[r * dim + d]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] += q * k[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(scores + r * kTile + c * kLanes, acc[r][c]);
}

template <int R>
MV_INLINE void score_rows(const float* queries, const float* keys, int dim, float* scores, int num_keys) {
  for (int k = 0; k < num_keys; k += kColumnBlock * kLanes)
    score_block<R, kColumnBlock>(queries, keys + k, dim, scores + k);
}

// output[r][:] = output[r][:] * decay[r] + sum over keys of weights[r][key] * values[key][:]
template <int R, int C, class T>
MV_INLINE void weigh_block(const float* weights, const T* const* values, int first, int last, int column, int dim,
                           const float* decay, float* output) {
  F32 acc[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = load(output + r * dim + column + c * kLanes) * decay[r];
  for (int k = first; k < last; ++k) {
    const T* value = values[k] + column;
    F32 v[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) v[c] = load(value + c * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      F32 w = splat(weights[r * kTile + k]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] += w * v[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(output + r * dim + column + c * kLanes, acc[r][c]);
}

template <int R, class T>
MV_INLINE void weigh_rows(const float* weights, const T* const* values, int first, int last, int dim,
                          const float* decay, float* output) {
  int column = 0;
  for (; column + kColumnBlock * kLanes <= dim; column += kColumnBlock * kLanes)
    weigh_block<R, kColumnBlock>(weights, values, first, last, column, dim, decay, output);
  for (; column < dim; column += kLanes)
    weigh_block<R, 1>(weights, values, first, last, column, dim, decay, output);
}

// Keys first..last of a tile, each at keys[i], into [dim][kTile]; lanes of other keys become 0.
template <class T>
MV_INLINE void transpose_keys(const T* const* keys, int first, int last, int head_size, float* transposed) {
  for (int k = first / kLanes * kLanes; k < last; k += kLanes)
    for (int d = 0; d < head_size; d += kLanes) {
      F32 square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = k + i >= first && k + i < last ? load_some(keys[k + i] + d, head_size - d) : F32{};
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(transposed + (d + i) * kTile + k, square[i]);
    }
}

}  // namespace mv
