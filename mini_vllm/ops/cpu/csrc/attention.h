// What a call of paged attention is told; see attention.cpp.
#pragma once
#include <cstdint>

#include "abi.h"

namespace mv {

struct AttentionLayer {
  int32_t num_heads, num_kv_heads, head_size, block_size;
  int32_t dtype, cache_dtype;
  int32_t window;  // a query sees itself and the window - 1 tokens before it; 0: everything
  float scale, softcap;  // softcap 0: none
};

struct AttentionBatch {
  int64_t num_tokens, num_reqs;
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t block_table_stride;
  const int64_t* slot_mapping;
  int32_t causal;
};

struct AttentionTensors {
  const void *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;  // from token to token
  void *keys, *values;                             // the halves of the cache
  void* output;
};

}  // namespace mv

MV_API int mv_paged_attention(const mv::AttentionLayer* layer, const mv::AttentionBatch* batch, const void* query,
                              int64_t query_stride, const void* key, int64_t key_stride, const void* value,
                              int64_t value_stride, void* keys, void* values, void* output);
