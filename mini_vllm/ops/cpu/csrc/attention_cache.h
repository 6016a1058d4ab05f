// What lies in a layer's KV cache. Each half (keys, values) is [blocks][Hkv] pages; a page holds the block_size rows of
// one block and KV head, each of head_size elements. The pages of int8_per_token_head begin with a float for every row,
// its scale: an element stands for value * scale. They need head_size to be a multiple of 4, which keeps scales aligned.
#pragma once
#include <type_traits>

#include "attention.h"
#include "simd.h"

namespace mv {

struct i8 { int8_t value; };
constexpr int kInt8PerTokenHead = 16;  // a cache_dtype beside those of abi.h
typedef int8_t I8 __attribute__((vector_size(kLanes)));

template <class T>
constexpr bool kScaled = std::is_same<T, i8>::value;

template <class T>
struct Page {
  T* rows;
  float* scales;  // null unless kScaled
};

template <class T>
MV_INLINE Page<T> page_of(const AttentionLayer& layer, void* half, int64_t block, int head) {
  int64_t row_bytes = int64_t(layer.head_size) * sizeof(T) + (kScaled<T> ? sizeof(float) : 0);
  char* memory = static_cast<char*>(half) + (block * layer.num_kv_heads + head) * layer.block_size * row_bytes;
  if (!kScaled<T>) return {reinterpret_cast<T*>(memory), nullptr};
  return {reinterpret_cast<T*>(memory + layer.block_size * sizeof(float)), reinterpret_cast<float*>(memory)};
}

MV_INLINE F32 load(const i8* p) {
#if defined(__AVX512F__)
  return as<F32>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_raw<__m128i>(p))));
#elif defined(__AVX2__)
  return as<F32>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  return __builtin_convertvector(__builtin_convertvector(load_raw<I8>(p), I32), F32);
#endif
}

// --- words: as many elements as 32 bits hold -----------------------------------------------------------------

template <class T>
constexpr int kPerWord = 4 / int(sizeof(T));

// Element `part` of every word.
MV_INLINE F32 unpack(const float*, U32 words, int) { return as<F32>(words); }
MV_INLINE F32 unpack(const bf16*, U32 words, int part) { return as<F32>(part ? words & 0xffff0000u : words << 16); }
MV_INLINE F32 unpack(const f16*, U32 words, int part) {
  f16 halves[kLanes];
  U16 bits = narrow(part ? words >> 16 : words & 0xffffu);
  std::memcpy(halves, &bits, sizeof bits);
  return load(halves);
}
MV_INLINE F32 unpack(const i8*, U32 words, int part) {
  return __builtin_convertvector(as<I32>(words << (24 - 8 * part)) >> 24, F32);
}

// The first `bytes` (at most those of a vector) as words; what is behind them is 0, and its memory is not touched.
MV_INLINE F32 load_words(const void* p, int bytes) {
  if (bytes >= int(sizeof(F32))) return load(static_cast<const float*>(p));
#if defined(__AVX512BW__)
  return as<F32>(_mm512_maskz_loadu_epi8((uint64_t(1) << bytes) - 1, p));
#else
  float padded[kLanes] = {};
  std::memcpy(padded, p, size_t(bytes));
  return load(padded);
#endif
}

}  // namespace mv
