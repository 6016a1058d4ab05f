// Row-by-row kernels between the matrix products: RMS norm with the residual sum, rotary embedding, gated activations,
// argmax. Rows lie at a stride given in elements, their elements side by side; results are dense and the caller's.
// Arithmetic is float32; a number is rounded to its type when it is stored, once. Rows are independent, so the split
// over threads changes nothing; small batches stay on the calling thread.
#include <algorithm>
#include <cmath>

#include "abi.h"
#include "pool.h"
#include "simd.h"

namespace mv {
namespace {

constexpr int64_t kElementsPerItem = 16 * 1024;

inline int64_t rows_per_item(int64_t width) { return std::max<int64_t>(1, kElementsPerItem / std::max<int64_t>(width, 1)); }

template <class Fn>
int with_dtype(int dtype, const Fn& fn) {
  switch (dtype) {
    case kF32: fn(static_cast<float*>(nullptr)); return kOk;
    case kBF16: fn(static_cast<bf16*>(nullptr)); return kOk;
    case kF16: fn(static_cast<f16*>(nullptr)); return kOk;
    default: return kUnsupported;
  }
}

// sum = x + residual (rounded; x itself without a residual), then out = sum / rms(sum) * weight
template <class T, class W>
void norm_row(const T* x, const T* residual, const W* weight, float eps, int64_t width, T* sum_out, T* out) {
  F32 squares = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    F32 v = load_some(x + i, width - i);
    if (residual != nullptr) {
      v = rounded_to(x, v + load_some(residual + i, width - i));
      store_some(sum_out + i, v, width - i);
    }
    squares += v * v;
  }
  float scale = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
  const T* from = residual != nullptr ? sum_out : x;
  for (int64_t i = 0; i < width; i += kLanes)
    store_some(out + i, load_some(from + i, width - i) * scale * load_some(weight + i, width - i), width - i);
}

// The first `rotary_dim` dimensions of a head: dimension i with dimension i + half. sin's first half is negated.
template <class T>
void turn_head(const T* x, const float* cosines, const float* sines, int64_t rotary_dim, int64_t head_size, T* out) {
  int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    int64_t n = half - i;
    F32 first = load_some(x + i, n), second = load_some(x + half + i, n);
    store_some(out + i, first * load_some(cosines + i, n) + second * load_some(sines + i, n), n);
    store_some(out + half + i, second * load_some(cosines + half + i, n) + first * load_some(sines + half + i, n), n);
  }
  if (rotary_dim < head_size) std::copy(x + rotary_dim, x + head_size, out + rotary_dim);
}

MV_INLINE F32 silu(F32 x) { return x / (1.0f + exp(-x)); }
MV_INLINE F32 gelu_tanh(F32 x) {
  F32 inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + tanh(inner));
}

template <class T, class Activation>
void gate_row(const T* x, int64_t width, T* out, Activation activation) {
  for (int64_t i = 0; i < width; i += kLanes) {
    int64_t n = width - i;
    store_some(out + i, activation(load_some(x + i, n)) * load_some(x + width + i, n), n);
  }
}

// The highest of a row and where it first is. A NaN counts as higher than everything.
struct Best {
  float value;
  int64_t index;
};

Best find_best(const float* row, int64_t width) {
  F32 best = splat(-__builtin_inff());
  I32 where = {}, is_nan = {}, here = lane_numbers();
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes, here += kLanes) {
    F32 v = load(row + i);
    is_nan |= v != v;
    where = v > best ? here : where;
    best = max(v, best);
  }
  Best found{-__builtin_inff(), 0};
  bool nan = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    nan |= is_nan[lane] != 0;
    if (best[lane] > found.value || (best[lane] == found.value && where[lane] < found.index))
      found = {best[lane], where[lane]};
  }
  for (; i < width; ++i) {
    nan |= row[i] != row[i];
    if (row[i] > found.value) found = {row[i], i};
  }
  for (int64_t k = 0; nan && k < width; ++k)
    if (row[k] != row[k]) return {row[k], k};
  return found;
}

}  // namespace
}  // namespace mv

using namespace mv;

// x, residual [rows, width]; weight [width]; sum_out (with a residual only) and out dense.
MV_API int mv_rms_norm(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                       const void* weight, float eps, int64_t rows, int64_t width, void* sum_out, void* out, int dtype,
                       int weight_dtype) {
  if (weight_dtype != dtype && weight_dtype != kF32) return kUnsupported;
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_ranges(rows, rows_per_item(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        auto* from = static_cast<const T*>(x) + r * x_stride;
        auto* other = residual == nullptr ? nullptr : static_cast<const T*>(residual) + r * residual_stride;
        T *total = static_cast<T*>(sum_out) + r * width, *to = static_cast<T*>(out) + r * width;
        if (weight_dtype == dtype) norm_row(from, other, static_cast<const T*>(weight), eps, width, total, to);
        else norm_row(from, other, static_cast<const float*>(weight), eps, width, total, to);
      }
    });
  });
}

// x [tokens, heads, head_size] with strides of tokens and heads; cosines, sines [tokens, rotary_dim] float32.
MV_API int mv_rotary(const void* x, int64_t token_stride, int64_t head_stride, const float* cosines,
                     const float* sines, int64_t tokens, int64_t heads, int64_t head_size, int64_t rotary_dim,
                     void* out, int dtype) {
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_ranges(tokens, rows_per_item(heads * head_size), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t h = 0; h < heads; ++h)
          turn_head(static_cast<const T*>(x) + t * token_stride + h * head_stride, cosines + t * rotary_dim,
                    sines + t * rotary_dim, rotary_dim, head_size,
                    static_cast<T*>(out) + (t * heads + h) * head_size);
    });
  });
}

// x [rows, 2 width], gate before value; out [rows, width]. activation: 0 silu, 1 gelu by tanh.
MV_API int mv_act_and_mul(const void* x, int64_t x_stride, int64_t rows, int64_t width, void* out, int activation,
                          int dtype) {
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_ranges(rows, rows_per_item(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        auto* from = static_cast<const T*>(x) + r * x_stride;
        T* to = static_cast<T*>(out) + r * width;
        if (activation == 0) gate_row(from, width, to, silu);
        else gate_row(from, width, to, gelu_tanh);
      }
    });
  });
}

// x [rows, width] float32; the highest of each row and the first index it has.
MV_API int mv_argmax(const float* x, int64_t x_stride, int64_t rows, int64_t width, float* best, int64_t* index) {
  parallel_ranges(rows, rows_per_item(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Best found = find_best(x + r * x_stride, width);
      best[r] = found.value;
      index[r] = found.index;
    }
  });
  return kOk;
}
