// New keys and values into their slots of the cache, converted to its type; see attention.cpp for shapes.
#pragma once
#include <cmath>

#include "attention_cache.h"
#include "pool.h"

namespace mv {

template <class Q, class T>
MV_INLINE void write_row(const Q* from, int64_t size, T* to, float*) {
  for (int64_t d = 0; d < size; d += kLanes) store_some(to + d, load_some(from + d, size - d), size - d);
}

// Rounds to the nearest integers, ties to even. No multiply-add may swallow the product that led here: ties differ then.
MV_INLINE void store(i8* p, F32 x) {
#if defined(__AVX512F__)
  __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(as<__m512>(x)));
#elif defined(__AVX2__)
  I8 bytes = __builtin_convertvector(as<I32>(_mm256_cvtps_epi32(as<__m256>(x))), I8);
#else
  I8 bytes;
  for (int i = 0; i < kLanes; ++i) bytes[i] = int8_t(std::nearbyint(x[i]));
#endif
  std::memcpy(p, &bytes, sizeof bytes);
}

// value = round(x * 127 / max|x|), scale = max|x| / 127; a row that holds an infinity or NaN gets a scale of NaN.
template <class Q>
MV_INLINE void write_row(const Q* from, int64_t size, i8* to, float* scale) {
  F32 widest = {}, trouble = {};
  for (int64_t d = 0; d < size; d += kLanes) {
    F32 x = load_some(from + d, size - d);
    widest = max(max(x, -x), widest);
    trouble += x * 0.0f;
  }
  float absmax = highest(widest), inverse = absmax >= 1e-30f ? 127.0f / absmax : 0.0f;
  *scale = (absmax >= 1e-30f ? absmax / 127.0f : 0.0f) + sum(trouble);
  for (int64_t d = 0; d < size; d += kLanes) store_some(to + d, load_some(from + d, size - d) * inverse, size - d);
}

template <class Q, class T>
void write_cache(const AttentionLayer& layer, const AttentionBatch& batch, const AttentionTensors& tensors) {
  int64_t size = layer.head_size;
  auto write = [&](const void* source, int64_t stride, void* half, int64_t token) {
    int64_t slot = batch.slot_mapping[token];
    if (slot < 0) return;  // padding
    int64_t block = slot / layer.block_size, offset = slot % layer.block_size;
    for (int head = 0; head < layer.num_kv_heads; ++head) {
      Page<T> page = page_of<T>(layer, half, block, head);
      write_row(static_cast<const Q*>(source) + token * stride + head * size, size, page.rows + offset * size,
                page.scales + offset);
    }
  };
  parallel_ranges(batch.num_tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      write(tensors.key, tensors.key_stride, tensors.keys, token);
      write(tensors.value, tensors.value_stride, tensors.values, token);
    }
  });
}

}  // namespace mv
