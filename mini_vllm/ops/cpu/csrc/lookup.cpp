// What a forward begins and ends with: rows looked up by number, the angles of positions, logits as float32.
#include <cmath>

#include "rows.h"

using namespace mv;

// out [rows, width] = table[ids[row] + offset] * scale, rounded once; scale 1 copies. ids int32 or int64.
struct LookupArgs {
  const void *ids, *table;
  void* out;
  int64_t ids_are_wide, offset, num_rows, width, dtype;
  double scale;
};

namespace {

int64_t row_number(const LookupArgs& a, int64_t i) {
  int64_t id = a.ids_are_wide ? static_cast<const int64_t*>(a.ids)[i] : static_cast<const int32_t*>(a.ids)[i];
  return id + a.offset;
}

template <class T>
void look_up(const T* from, float scale, int64_t width, T* to) {
  if (scale == 1.0f) return void(std::copy(from, from + width, to));
  for (int64_t i = 0; i < width; i += kLanes) store_some(to + i, load_some(from + i, width - i) * scale, width - i);
}

}  // namespace

// A number outside the table is refused before anything is written.
MV_API int mv_lookup(const LookupArgs* a, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    if (uint64_t(row_number(*a, r)) >= uint64_t(a->num_rows)) return kOutOfRange;
  return with_dtype(a->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, a->width, [&](int64_t r) {
      look_up(static_cast<const T*>(a->table) + row_number(*a, r) * a->width, float(a->scale), a->width,
              static_cast<T*>(a->out) + r * a->width);
    });
  });
}

// cosines, sines [rows, 2 half] float32 of position * frequency, times factor; each half is the same, but that the
// first half of the sines is negated, as mv_rotary wants them.
struct AnglesArgs {
  const int64_t* positions;
  const float* frequencies;
  float *cosines, *sines;
  int64_t half;
  double factor;
};

MV_API int mv_angles(const AnglesArgs* a, int64_t rows) {
  float factor = float(a->factor);
  for_rows(rows, a->half * 64, [&](int64_t r) {  // a cosine takes as long as many elements of a copy
    float *cosines = a->cosines + r * 2 * a->half, *sines = a->sines + r * 2 * a->half;
    for (int64_t i = 0; i < a->half; ++i) {
      float angle = float(a->positions[r]) * a->frequencies[i];
      float cosine = std::cos(angle) * factor, sine = std::sin(angle) * factor;
      cosines[i] = cosines[a->half + i] = cosine;
      sines[i] = -sine, sines[a->half + i] = sine;
    }
  });
  return kOk;
}

// out [rows, width] float32 = cap * tanh(x / cap), or x itself where cap is 0.
struct LogitsArgs {
  const void* x;
  float* out;
  int64_t x_stride, width, dtype;
  double cap;
};

MV_API int mv_logits(const LogitsArgs* a, int64_t rows) {
  float cap = float(a->cap), inverse = cap > 0 ? 1.0f / cap : 0.0f;
  return with_dtype(a->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(rows, a->width, [&](int64_t r) {
      const T* from = static_cast<const T*>(a->x) + r * a->x_stride;
      float* to = a->out + r * a->width;
      for (int64_t i = 0; i < a->width; i += kLanes) {
        F32 v = load_some(from + i, a->width - i);
        store_some(to + i, cap > 0 ? tanh(v * inverse) * cap : v, a->width - i);
      }
    });
  });
}
