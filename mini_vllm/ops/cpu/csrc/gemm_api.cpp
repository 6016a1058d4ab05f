// The exported functions of linear layers: packing weights once, and y = x W^T + bias. See gemm.h for layouts.
//
// mv_linear asks for x and y with a stride of 1 within a row and writes rows x n elements of y, nothing beside them.
#include "gemm.h"

namespace mv::gemm {
namespace {

bool known_dtype(int dtype) { return dtype == kF32 || dtype == kBF16 || dtype == kF16; }

}  // namespace
}  // namespace mv::gemm

MV_API int mv_linear(const mv::gemm::Linear* linear, const void* x, int64_t ldx, int x_dtype, void* y, int64_t ldy,
                     int y_dtype, int64_t count) {
  using namespace mv;
  using namespace mv::gemm;
  if (count == 0) return kOk;
  if (!known_dtype(x_dtype) || !known_dtype(y_dtype) || count < 0) return kUnsupported;
  Rows rows{x, ldx, y, ldy, count, x_dtype, y_dtype};
  if (linear->kind == kFloat) return float_linear(*linear, rows);
  if (linear->kind == kBF16Packed) return bf16_linear(*linear, rows);
  if (linear->kind == kInt8 && linear->activation == kAsIs) return weight_only_linear(*linear, rows);
  if (linear->kind == kInt8 && linear->activation == kPerToken) return int8_linear(*linear, rows), kOk;
  if (linear->activation == kAsIs) return kUnsupported;
  return grouped_linear(*linear, rows), kOk;
}

