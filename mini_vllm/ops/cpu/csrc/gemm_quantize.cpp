// Activations to int8, a scale for each row or for each group of a row, straight into the tiles kernels read.
//
// scale = absmax / 127, value = round to even(x * (127 / absmax)). A row knows nothing of its neighbours. Four rows of
// a tile are done at once: with AVX-512 a 4 x 4 transpose of dwords turns them into 16-byte stores. A NaN anywhere in
// a group makes its scale NaN, so that it reaches the outputs and is noticed there. An element T is a byte, or 16 bits
// in the order that gemm_simd.h gives them.
#include <algorithm>

#include "gemm.h"

namespace mv::gemm {
namespace {

constexpr int kTogether = 4;

struct Job {
  const void* rows[kTogether];
  int count;
  int64_t k, k_padded, group;
  void* out;       // of the first row, elements of T
  int64_t stride;  // elements from one k-quad to the next
  float* scales[kTogether];
  int32_t* sums[kTogether];
  bool per_group;
};

struct Scale {
  float scale, inverse;
};

inline Scale scale_for(float absmax, bool has_nan) {
  if (has_nan) return {NAN, 0.f};
  if (absmax < 1e-30f) return {0.f, 0.f};  // its inverse would overflow
  return {absmax / 127.f, 127.f / absmax};
}

#if defined(MV_GEMM_AVX512)

template <int DType>
MV_INLINE __m512 load16(const void* row, int64_t k, int64_t size) {
  int64_t left = size - k;
  __mmask16 mask = left >= 16 ? __mmask16(0xffff) : left <= 0 ? __mmask16(0) : __mmask16((1u << left) - 1);
  if constexpr (DType == kF32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(row) + k);
  __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + k);
  if constexpr (DType == kF16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <int DType>
MV_INLINE Scale scale_of(const void* row, int64_t begin, int64_t end, int64_t size) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t k = begin; k < end; k += 16) {
    __m512 v = load16<DType>(row, k, size);
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  }
  return scale_for(_mm512_reduce_max_ps(most), nan != 0);
}

// A NaN becomes 0, or it would run over in the sums; its row's scale tells.
MV_INLINE __m512i nearest_ints(__m512 v) { return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v); }

// Quads of bytes as quads of 16 bits, k0 k2 k1 k3.
MV_INLINE __m256i widened(__m128i bytes) {
  __m256i halves = _mm256_cvtepi8_epi16(bytes);
  return _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(halves, _MM_SHUFFLE(3, 1, 2, 0)), _MM_SHUFFLE(3, 1, 2, 0));
}

template <class T>
MV_INLINE void store_transposed(const Job& job, int64_t k, const __m128i (&q)[kTogether]) {
  __m128i a = _mm_unpacklo_epi32(q[0], q[1]), b = _mm_unpackhi_epi32(q[0], q[1]);
  __m128i c = _mm_unpacklo_epi32(q[2], q[3]), d = _mm_unpackhi_epi32(q[2], q[3]);
  __m128i quads[4] = {_mm_unpacklo_epi64(a, c), _mm_unpackhi_epi64(a, c), _mm_unpacklo_epi64(b, d),
                      _mm_unpackhi_epi64(b, d)};
  __mmask8 mask = __mmask8((1 << job.count) - 1);
  T* out = static_cast<T*>(job.out) + k / 4 * job.stride;
  MV_UNROLL for (int j = 0; j < 4; j++) {
    if constexpr (sizeof(T) == 1) _mm_mask_storeu_epi32(out + j * job.stride, mask, quads[j]);
    else _mm256_mask_storeu_epi64(out + j * job.stride, mask, widened(quads[j]));
  }
}

template <int DType, class T>
void quantize(const Job& job) {
  Scale scale[kTogether] = {};
  for (int64_t begin = 0, g = 0; begin < job.k_padded; begin += job.group, g++) {
    int64_t end = begin + job.group;
    __m512i sums[kTogether];
    for (int i = 0; i < kTogether; i++) {
      sums[i] = _mm512_setzero_si512();
      if (i < job.count && (job.per_group || g == 0)) {
        scale[i] = scale_of<DType>(job.rows[i], begin, job.per_group ? end : job.k_padded, job.k);
        job.scales[i][g] = scale[i].scale;
      }
    }
    for (int64_t k = begin; k < end; k += 16) {
      __m128i q[kTogether];
      MV_UNROLL for (int i = 0; i < kTogether; i++) {
        __m512 v = _mm512_mul_ps(load16<DType>(job.rows[i], k, job.k), _mm512_set1_ps(scale[i].inverse));
        __m512i whole = nearest_ints(v);
        sums[i] = _mm512_add_epi32(sums[i], whole);
        q[i] = _mm512_cvtsepi32_epi8(whole);
      }
      store_transposed<T>(job, k, q);
    }
    for (int i = 0; i < job.count; i++) job.sums[i][g] = _mm512_reduce_add_epi32(sums[i]);
  }
}

// One row alone: no transpose, the tile is the row.
template <int DType, class T>
void quantize_single(const Job& job) {
  Scale scale = {};
  for (int64_t begin = 0, g = 0; begin < job.k_padded; begin += job.group, g++) {
    int64_t end = begin + job.group;
    if (job.per_group || g == 0) {
      scale = scale_of<DType>(job.rows[0], begin, job.per_group ? end : job.k_padded, job.k);
      job.scales[0][g] = scale.scale;
    }
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = begin; k < end; k += 16) {
      __m512 v = _mm512_mul_ps(load16<DType>(job.rows[0], k, job.k), _mm512_set1_ps(scale.inverse));
      __m512i whole = nearest_ints(v);
      sum = _mm512_add_epi32(sum, whole);
      __m128i bytes = _mm512_cvtsepi32_epi8(whole);
      T* out = static_cast<T*>(job.out) + k;
      if constexpr (sizeof(T) == 1) _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
      else _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), widened(bytes));
    }
    job.sums[0][g] = _mm512_reduce_add_epi32(sum);
  }
}

#else

template <int DType>
Scale scale_of(const void* row, int64_t begin, int64_t end) {
  float most = 0.f;
  bool nan = false;
  for (int64_t k = begin; k < end; k++) {
    float v = load_scalar(row, k, DType);
    most = std::max(most, std::fabs(v));
    nan |= v != v;
  }
  return scale_for(most, nan);
}

template <int DType, class T>
void quantize_row(const Job& job, int i) {
  Scale scale = {};
  for (int64_t begin = 0, g = 0; begin < job.k_padded; begin += job.group, g++) {
    int64_t end = begin + job.group, real = std::min(end, job.k);
    if (job.per_group || g == 0) {
      scale = scale_of<DType>(job.rows[i], begin, job.per_group ? real : job.k);
      job.scales[i][g] = scale.scale;
    }
    int32_t sum = 0;
    for (int64_t k = begin; k < end; k++) {
      float v = k < real ? load_scalar(job.rows[i], k, DType) * scale.inverse : 0.f;
      float whole = std::min(std::max(std::nearbyint(v), -127.f), 127.f);  // a NaN becomes 127, its scale tells
      int8_t q = int8_t(whole == whole ? whole : 0.f);
      sum += q;
      int64_t place = sizeof(T) == 1 ? k % 4 : "\0\2\1\3"[k % 4];
      static_cast<T*>(job.out)[k / 4 * job.stride + i * 4 + place] = q;
    }
    job.sums[i][g] = sum;
  }
}

template <int DType, class T>
void quantize(const Job& job) {
  for (int i = 0; i < job.count; i++) quantize_row<DType, T>(job, i);
}

template <int DType, class T>
void quantize_single(const Job& job) {
  quantize_row<DType, T>(job, 0);
}

#endif

template <int DType, class T>
void run(const Job& job) {
  if (job.stride == 4) quantize_single<DType, T>(job);
  else quantize<DType, T>(job);
}

template <class T>
void quantize_stretch(const Rows& rows, const Linear& linear, const Tiling& tiling, int64_t group, QuantizedRows out,
                      int64_t tile, int64_t first) {
  Job job{};
  int64_t row = tiling.start(tile) + first;
  job.count = int(std::min<int64_t>(kTogether, tiling.height(tile) - first));
  job.k = linear.k, job.k_padded = linear.k_padded, job.group = group;
  job.stride = tiling.height(tile) * 4;
  job.out = static_cast<T*>(out.values) + tiling.start(tile) * linear.k_padded + first * 4;
  job.per_group = out.scale_groups > 1;
  for (int i = 0; i < kTogether; i++) {
    int64_t r = row + std::min(i, job.count - 1);
    job.rows[i] = static_cast<const char*>(rows.x) + r * rows.ldx * element_size(rows.x_dtype);
    job.scales[i] = out.scales + r * out.scale_groups;
    job.sums[i] = out.sums + r * out.groups;
  }
  if (rows.x_dtype == kF32) run<kF32, T>(job);
  else if (rows.x_dtype == kBF16) run<kBF16, T>(job);
  else run<kF16, T>(job);
}

}  // namespace

QuantizedRows quantize_rows(const Rows& rows, const Linear& linear, const Tiling& tiling, int64_t group) {
  QuantizedRows out{};
  out.groups = linear.k_padded / group;
  out.scale_groups = linear.activation == kPerGroup ? out.groups : 1;
  bool bytes = linear.kind == kInt4;
  size_t value_bytes = size_t(rows.count * linear.k_padded) * (bytes ? 1 : sizeof(Act));
  size_t sum_bytes = size_t(rows.count * out.groups) * 4;
  size_t scale_bytes = size_t(rows.count * out.scale_groups) * 4;
  auto memory = static_cast<int8_t*>(thread_scratch(kScratchQuant, value_bytes + sum_bytes + scale_bytes + 256));
  out.values = memory;  // k_padded is a multiple of 32, so what follows is aligned
  out.sums = reinterpret_cast<int32_t*>(memory + value_bytes);
  out.scales = reinterpret_cast<float*>(memory + value_bytes + sum_bytes);
  int64_t per_tile = (tiling.height(0) + kTogether - 1) / kTogether;
  auto stretch = [&](int64_t i) {
    int64_t tile = i / per_tile, first = i % per_tile * kTogether;
    if (first >= tiling.height(tile)) return;
    if (bytes) quantize_stretch<int8_t>(rows, linear, tiling, group, out, tile, first);
    else quantize_stretch<Act>(rows, linear, tiling, group, out, tile, first);
  };
  int64_t stretches = tiling.tiles * per_tile;
  if (rows.count * linear.k < 16384) {  // less work than waking somebody
    for (int64_t i = 0; i < stretches; i++) stretch(i);
  } else {
    parallel_ranges(stretches, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) stretch(i);
    });
  }
  return out;
}

}  // namespace mv::gemm
