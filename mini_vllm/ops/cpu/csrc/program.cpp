// A step recorded once and replayed in one call: kernels with their arguments, in order.
//
// Every kernel of a recording has the same shape, int kernel(const Args*, int64_t rows), and finds its rows at fixed
// addresses; only how many there are changes from step to step. `rows_per_token` of a call says how many rows one token
// (or one row of logits) is to it. Kernels whose own entry has another shape get one here.
#include "abi.h"
#include "attention.h"
#include "gemm.h"

using namespace mv;

struct LinearArgs {
  const gemm::Linear* linear;
  const void* x;
  void* y;
  int64_t x_stride, y_stride, x_dtype, y_dtype;
};

MV_API int mv_linear_rows(const LinearArgs* a, int64_t rows) {
  return mv_linear(a->linear, a->x, a->x_stride, int(a->x_dtype), a->y, a->y_stride, int(a->y_dtype), rows);
}

struct AttentionArgs {
  const AttentionLayer* layer;
  const AttentionBatch* batch;
  const void *query, *key, *value;
  void *keys, *values, *output;
  int64_t query_stride, key_stride, value_stride;
};

// The batch itself says how many tokens there are.
MV_API int mv_attention_rows(const AttentionArgs* a, int64_t) {
  return mv_paged_attention(a->layer, a->batch, a->query, a->query_stride, a->key, a->key_stride, a->value,
                            a->value_stride, a->keys, a->values, a->output);
}

struct ProgramCall {
  int (*kernel)(const void* args, int64_t rows);
  const void* args;
  int64_t rows_per_token;
};

// 0, or 1 + the number of the call that failed: those after it have not run.
MV_API int64_t mv_run_program(const ProgramCall* calls, int64_t count, int64_t tokens) {
  for (int64_t i = 0; i < count; ++i)
    if (calls[i].kernel(calls[i].args, tokens * calls[i].rows_per_token) != kOk) return i + 1;
  return 0;
}
