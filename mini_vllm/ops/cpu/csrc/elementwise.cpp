// Row-by-row kernels between the matrix products: norms with the residual sum, rotary embedding, activations, argmax.
// Rows lie at a stride given in elements, their elements side by side; results are dense and the caller's.
// Arithmetic is float32; a number is rounded to its type when it is stored, once. Rows are independent, so the split
// over threads changes nothing; small batches stay on the calling thread.
#include <algorithm>
#include <cmath>

#include "abi.h"
#include "rows.h"

namespace mv {
namespace {

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

// sum = x + residual (rounded), then out = (sum - mean) / deviation * weight + bias, in two passes over the row
template <class T>
void layer_norm_row(const T* x, const T* residual, const T* weight, const T* bias, float eps, int64_t width, T* sum_out,
                    T* out) {
  F32 total = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    F32 v = load_some(x + i, width - i);
    if (residual != nullptr) {
      v = rounded_to(x, v + load_some(residual + i, width - i));
      store_some(sum_out + i, v, width - i);
    }
    total += v;
  }
  const T* from = residual != nullptr ? sum_out : x;
  F32 mean = splat(sum(total) / float(width)), squares = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    F32 off = load_some(from + i, width - i) - mean;
    if (width - i < kLanes) off = lane_numbers() < int32_t(width - i) ? off : F32{};
    squares += off * off;
  }
  F32 scale = splat(1.0f / std::sqrt(sum(squares) / float(width) + eps));
  for (int64_t i = 0; i < width; i += kLanes) {
    int64_t n = width - i;
    F32 v = (load_some(from + i, n) - mean) * scale * load_some(weight + i, n);
    store_some(out + i, bias == nullptr ? v : v + load_some(bias + i, n), n);
  }
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

MV_INLINE F32 relu(F32 x) { return x < 0.0f ? F32{} : x; }  // a NaN stays one
// x * Phi(x), with the error function after Abramowitz and Stegun 7.1.26 (within 1.5e-7)
MV_INLINE F32 gelu(F32 x) {
  F32 z = max(x, -x) * 0.70710678118654752f, t = 1.0f / (1.0f + 0.3275911f * z);
  F32 tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  F32 erf = 1.0f - tail * exp(-z * z);
  return 0.5f * x * (1.0f + select(x < 0.0f, -erf, erf));
}

enum Activation { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

// Calls fn with the activation as a function of vectors.
template <class Fn>
bool with_activation(int activation, const Fn& fn) {
  switch (activation) {
    case kSilu: fn([](F32 x) { return silu(x); }); return true;
    case kGeluTanh: fn([](F32 x) { return gelu_tanh(x); }); return true;
    case kGelu: fn([](F32 x) { return gelu(x); }); return true;
    case kRelu: fn([](F32 x) { return relu(x); }); return true;
    default: return false;
  }
}

template <class T, class Activation>
void gate_row(const T* x, int64_t width, T* out, Activation activation) {
  for (int64_t i = 0; i < width; i += kLanes) {
    int64_t n = width - i;
    store_some(out + i, activation(load_some(x + i, n)) * load_some(x + width + i, n), n);
  }
}

template <class T, class Activation>
void activate_row(const T* x, int64_t width, T* out, Activation activation) {
  for (int64_t i = 0; i < width; i += kLanes) store_some(out + i, activation(load_some(x + i, width - i)), width - i);
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
struct RMSNormArgs {
  const void *x, *residual, *weight;
  void *sum_out, *out;
  int64_t x_stride, residual_stride, width, dtype, weight_dtype;
  double eps;
};

MV_API int mv_rms_norm(const RMSNormArgs* a, int64_t rows) {
  if (a->weight_dtype != a->dtype && a->weight_dtype != kF32) return kUnsupported;
  return with_dtype(a->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, a->width, [&](int64_t r) {
      auto* from = static_cast<const T*>(a->x) + r * a->x_stride;
      auto* other = a->residual == nullptr ? nullptr : static_cast<const T*>(a->residual) + r * a->residual_stride;
      T *total = static_cast<T*>(a->sum_out) + r * a->width, *to = static_cast<T*>(a->out) + r * a->width;
      float eps = float(a->eps);
      if (a->weight_dtype == a->dtype) norm_row(from, other, static_cast<const T*>(a->weight), eps, a->width, total, to);
      else norm_row(from, other, static_cast<const float*>(a->weight), eps, a->width, total, to);
    });
  });
}

// x [tokens, heads, width] with strides of tokens and heads, out dense. The first `first_heads` heads have one weight,
// the others another.
struct HeadNormArgs {
  const void *x, *first_weight, *other_weight;
  void* out;
  int64_t token_stride, head_stride, heads, first_heads, width, dtype, weight_dtype;
  double eps;
};

MV_API int mv_rms_norm_heads(const HeadNormArgs* a, int64_t tokens) {
  if (a->weight_dtype != a->dtype && a->weight_dtype != kF32) return kUnsupported;
  return with_dtype(a->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(tokens, a->heads * a->width, [&](int64_t t) {
      for (int64_t h = 0; h < a->heads; ++h) {
        auto* from = static_cast<const T*>(a->x) + t * a->token_stride + h * a->head_stride;
        T* to = static_cast<T*>(a->out) + (t * a->heads + h) * a->width;
        const void* weight = h < a->first_heads ? a->first_weight : a->other_weight;
        const T* none = nullptr;
        if (a->weight_dtype == a->dtype)
          norm_row(from, none, static_cast<const T*>(weight), float(a->eps), a->width, to, to);
        else norm_row(from, none, static_cast<const float*>(weight), float(a->eps), a->width, to, to);
      }
    });
  });
}

// As RMSNormArgs; weight, and bias unless it is null, of x's type.
struct LayerNormArgs {
  const void *x, *residual, *weight, *bias;
  void *sum_out, *out;
  int64_t x_stride, residual_stride, width, dtype;
  double eps;
};

MV_API int mv_layer_norm(const LayerNormArgs* a, int64_t rows) {
  return with_dtype(a->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, a->width, [&](int64_t r) {
      auto* from = static_cast<const T*>(a->x) + r * a->x_stride;
      auto* other = a->residual == nullptr ? nullptr : static_cast<const T*>(a->residual) + r * a->residual_stride;
      layer_norm_row(from, other, static_cast<const T*>(a->weight), static_cast<const T*>(a->bias), float(a->eps),
                     a->width, static_cast<T*>(a->sum_out) + r * a->width, static_cast<T*>(a->out) + r * a->width);
    });
  });
}

// x [tokens, heads, head_size] with strides of tokens and heads; cosines, sines [tokens, rotary_dim] float32.
struct RotaryArgs {
  const void* x;
  const float *cosines, *sines;
  void* out;
  int64_t token_stride, head_stride, heads, head_size, rotary_dim, dtype;
};

MV_API int mv_rotary(const RotaryArgs* a, int64_t tokens) {
  return with_dtype(a->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(tokens, a->heads * a->head_size, [&](int64_t t) {
      for (int64_t h = 0; h < a->heads; ++h)
        turn_head(static_cast<const T*>(a->x) + t * a->token_stride + h * a->head_stride, a->cosines + t * a->rotary_dim,
                  a->sines + t * a->rotary_dim, a->rotary_dim, a->head_size,
                  static_cast<T*>(a->out) + (t * a->heads + h) * a->head_size);
    });
  });
}

// out [rows, width] dense; x [rows, width], or [rows, 2 width] with the gate before the value.
struct ActivationArgs {
  const void* x;
  void* out;
  int64_t x_stride, width, activation, dtype;
};

// row(from, to, activation) for every row.
template <class Row>
static int for_activated_rows(const ActivationArgs* a, int64_t rows, const Row& row) {
  bool known = false;
  int status = with_dtype(a->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    known = with_activation(int(a->activation), [&](auto activation) {
      for_rows(rows, a->width, [&](int64_t r) {
        row(static_cast<const T*>(a->x) + r * a->x_stride, static_cast<T*>(a->out) + r * a->width, activation);
      });
    });
  });
  return known ? status : kUnsupported;
}

MV_API int mv_act_and_mul(const ActivationArgs* a, int64_t rows) {
  return for_activated_rows(a, rows, [a](auto* from, auto* to, auto act) { gate_row(from, a->width, to, act); });
}

MV_API int mv_activation(const ActivationArgs* a, int64_t rows) {
  return for_activated_rows(a, rows, [a](auto* from, auto* to, auto act) { activate_row(from, a->width, to, act); });
}

// x [rows, width] float32; the highest of each row and the first index it has. Without `best` the index is -1 where the
// highest is no finite number.
struct ArgmaxArgs {
  const float* x;
  float* best;
  int64_t* index;
  int64_t x_stride, width;
};

MV_API int mv_argmax(const ArgmaxArgs* a, int64_t rows) {
  for_rows(rows, a->width, [&](int64_t r) {
    Best found = find_best(a->x + r * a->x_stride, a->width);
    a->index[r] = a->best != nullptr || std::isfinite(found.value) ? found.index : -1;
    if (a->best != nullptr) a->best[r] = found.value;
  });
  return kOk;
}
