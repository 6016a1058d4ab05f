// Register-blocked inner loops of attention over one tile of kTile keys, all in float32.
//
// Rows are queries: of one KV head, every query head of every query token in the row tile. Buffers are dense, with
// head dimensions padded to a multiple of kLanes by zeros:
//   queries [rows][dim]   keys transposed [head_size][kTile]   scores and weights [rows][kTile]   output [rows][dim]
// A row's arithmetic is the same sequence of operations however many rows are worked on together, so a request's
// result does not depend on its neighbours or on how its prompt was cut.
#pragma once
#include <algorithm>

#include "attention_cache.h"

namespace mv {

constexpr int kTile = 64;
constexpr int kRowBlock = 6;
constexpr int kFewRows = kLanes == 16 ? 8 : kRowBlock;  // as many are worked on together if there are no more

// Vectors beside R rows that fit the registers.
template <int R>
constexpr int kColumnBlock = kLanes < 16 ? 2 : R > kRowBlock ? 2 : 4;

template <class T>
MV_INLINE void prefetch_row(const T* row, int head_size) {
  const char* bytes = reinterpret_cast<const char*>(row);
  __builtin_prefetch(bytes, 0, 2);
  for (int at = 64; at < head_size * int(sizeof(T)); at += 64) __builtin_prefetch(bytes + at, 0, 2);
}

// --- scores ----------------------------------------------------------------------------------------------------

template <int R, int C>
MV_INLINE void score_block(const float* queries, int dim, const float* keys, int head_size, float* scores) {
  F32 acc[R][C] = {};
  for (int d = 0; d < head_size; ++d) {
    F32 k[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) k[c] = load(keys + d * kTile + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      F32 q = splat(queries[r * dim + d]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] += q * k[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(scores + r * kTile + c * kLanes, acc[r][c]);
}

// Of the first num_vectors vectors of keys.
template <int R>
void score_rows(const float* queries, int dim, const float* keys, int head_size, float* scores, int num_vectors) {
  int v = 0;
  for (; v + kColumnBlock<R> <= num_vectors; v += kColumnBlock<R>)
    score_block<R, kColumnBlock<R>>(queries, dim, keys + v * kLanes, head_size, scores + v * kLanes);
  keys += v * kLanes, scores += v * kLanes;
  switch (num_vectors - v) {
    case 1: return score_block<R, 1>(queries, dim, keys, head_size, scores);
    case 2: return score_block<R, std::min(2, kColumnBlock<R>)>(queries, dim, keys, head_size, scores);
    case 3: return score_block<R, std::min(3, kColumnBlock<R>)>(queries, dim, keys, head_size, scores);
  }
}

// --- sums of values --------------------------------------------------------------------------------------------

// Where the values of a tile's keys are: anywhere, or one behind the other.
template <class T>
struct ScatteredRows {
  const T* const* rows;
  MV_INLINE const T* operator[](int key) const { return rows[key]; }
};
struct DenseRows {
  const float* rows;
  int64_t dim;
  MV_INLINE const float* operator[](int key) const { return rows + key * dim; }
};

// output[r][:] = output[r][:] * decay[r] + sum over keys of weights[r][key] * values[key][:]
template <int R, int C, class Rows>
MV_INLINE void weigh_block(const float* weights, Rows values, int first, int last, int column, int dim,
                           const float* decay, float* output) {
  F32 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = load(output + r * dim + column + c * kLanes) * decay[r];
  for (int k = first; k < last; ++k) {
    auto value = values[k] + column;
    F32 v[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) v[c] = load(value + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      F32 w = splat(weights[r * kTile + k]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] += w * v[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(output + r * dim + column + c * kLanes, acc[r][c]);
}

template <int R, class Rows>
void weigh_rows(const float* weights, Rows values, int first, int last, int dim, const float* decay, float* output) {
  for (int column = 0; column < dim;) {
    int left = (dim - column) / kLanes;
    int count = left == kColumnBlock<R> + 1 ? (left + 1) / 2 : std::min(left, kColumnBlock<R>);  // 5 = 3 + 2
    switch (count) {
      case 1: weigh_block<R, 1>(weights, values, first, last, column, dim, decay, output); break;
      case 2: weigh_block<R, 2>(weights, values, first, last, column, dim, decay, output); break;
      case 3: weigh_block<R, std::min(3, kColumnBlock<R>)>(weights, values, first, last, column, dim, decay, output); break;
      default: weigh_block<R, kColumnBlock<R>>(weights, values, first, last, column, dim, decay, output);
    }
    column += count * kLanes;
  }
}

// --- keys ------------------------------------------------------------------------------------------------------

template <class T>
MV_INLINE void store_unpacked(const F32 (&words)[kLanes], int count, float* transposed) {
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i)
    for (int part = 0; part < kPerWord<T>; ++part)
      store(transposed + (i * kPerWord<T> + part) * kTile, unpack(static_cast<const T*>(nullptr), as<U32>(words[i]), part));
}

// Keys first..last of a tile, each at keys[i], into [head_size][kTile]; lanes of other keys become 0. Squares of words
// are turned, not of floats: a word holds up to four elements. `transposed` has room for kLanes words more than a row.
// Meanwhile memory fetches the rows of `soon` and `later` that have the same numbers.
template <class T>
void transpose_keys(const T* const* keys, int first, int last, int head_size, float* transposed, const T* const* soon,
                    const T* const* later) {
  constexpr int kStep = kLanes * kPerWord<T>;
  for (int k = first / kLanes * kLanes; k < last; k += kLanes) {
    int from = std::max(first - k, 0), to = std::min(last - k, kLanes);
    for (int d = 0; d < head_size; d += kStep) {
      int bytes = std::min(head_size - d, kStep) * int(sizeof(T));
      F32 square[kLanes];
      if (from == 0 && to == kLanes && bytes == int(sizeof(F32))) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(reinterpret_cast<const float*>(keys[k + i] + d));
        transpose(square);
        store_unpacked<T>(square, kLanes, transposed + d * kTile + k);
      } else {
        for (int i = 0; i < kLanes; ++i) square[i] = i >= from && i < to ? load_words(keys[k + i] + d, bytes) : F32{};
        transpose(square);
        store_unpacked<T>(square, (bytes + 3) / 4, transposed + d * kTile + k);
      }
    }
    if (soon)
      for (int i = from; i < to; ++i) prefetch_row(soon[k + i], head_size);
    if (later)
      for (int i = from; i < to; ++i) prefetch_row(later[k + i], head_size);
  }
}

}  // namespace mv
