// Words that kernels over rows are written in: an element type chosen at run time, rows dealt out to threads.
#pragma once
#include <algorithm>
#include <type_traits>

#include "abi.h"
#include "pool.h"
#include "simd.h"

namespace mv {

constexpr int64_t kElementsPerItem = 16 * 1024;

// Calls fn with a null pointer of the element type.
template <class Fn>
int with_dtype(int64_t dtype, const Fn& fn) {
  switch (dtype) {
    case kF32: fn(static_cast<float*>(nullptr)); return kOk;
    case kBF16: fn(static_cast<bf16*>(nullptr)); return kOk;
    case kF16: fn(static_cast<f16*>(nullptr)); return kOk;
    default: return kUnsupported;
  }
}

// fn(row) for every row of `width` elements; a few short rows stay on the calling thread.
template <class Fn>
void for_rows(int64_t rows, int64_t width, const Fn& fn) {
  int64_t grain = std::max<int64_t>(1, kElementsPerItem / std::max<int64_t>(width, 1));
  parallel_ranges(rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) fn(r);
  });
}

}  // namespace mv
