// int8 weights with activations as they are: a panel's weights become floats, a stretch of k at a time, and all rows
// use them before the next stretch. With AVX-512 and bfloat16 activations the floats are bfloat16 (which holds these
// integers exactly) for its dot product of pairs; otherwise everything is float32. Sums run over k in one fixed order
// whatever the number of rows; a channel's scale is applied once at the end.
#include <algorithm>

#include "gemm.h"

namespace mv::gemm {
namespace {

constexpr int64_t kStretch = 128;  // of k; 16 KiB of float32 or 8 KiB of bfloat16
constexpr int kRowsF32 = kMaxRows;

// x: row-major, float32 or bfloat16. sums: [row][32], between stretches. k: an even number for bfloat16.
struct Call {
  const Linear& linear;
  const Rows& rows;
  const char* x;
  int64_t row_bytes, k;
};

MV_TILE void expand_f32(const uint8_t* w, int64_t quads, float* out) {
  for (int64_t q = 0; q < quads; q++, w += kQuadBytes, out += 4 * kPanel)
    for (int j = 0; j < 4; j++)
      for (int n = 0; n < kPanel; n++) out[j * kPanel + n] = float(int(w[n * 4 + j]) - 128);
}

template <int R>
MV_TILE void tile_f32(const float* w, const char* x, int64_t row_bytes, int64_t size, float* sums) {
  F32 acc[R];
  MV_UNROLL for (int r = 0; r < R; r++) acc[r] = fload(sums + r * kPanel);
  for (int64_t k = 0; k < size; k++, w += kPanel) {
    F32 weights = fload(w);
    MV_UNROLL for (int r = 0; r < R; r++) {
      float value;
      std::memcpy(&value, x + r * row_bytes + k * 4, 4);
      acc[r] = fma(weights, fsplat(value), acc[r]);
    }
  }
  MV_UNROLL for (int r = 0; r < R; r++) fstore(sums + r * kPanel, acc[r]);
}

#if defined(MV_GEMM_AVX512)

// [k/2][32 channels][2]: bfloat16 is the upper half of a float32, and these integers leave the lower half empty.
MV_TILE void expand_bf16(const uint8_t* w, int64_t quads, uint8_t* out) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  for (int64_t q = 0; q < quads; q++, w += kQuadBytes, out += 256)
    for (int v = 0; v < 2; v++) {
      __m512i s = _mm512_xor_si512(_mm512_loadu_si512(w + v * 64), _mm512_set1_epi8(char(0x80)));
      __m512i k0 = _mm512_srai_epi32(_mm512_slli_epi32(s, 24), 24), k1 = _mm512_srai_epi32(_mm512_slli_epi32(s, 16), 24);
      __m512i k2 = _mm512_srai_epi32(_mm512_slli_epi32(s, 8), 24), k3 = _mm512_srai_epi32(s, 24);
      auto bits = [](__m512i i) { return _mm512_castps_si512(_mm512_cvtepi32_ps(i)); };
      auto pair = [&](__m512i even, __m512i odd) {
        return _mm512_or_si512(_mm512_srli_epi32(bits(even), 16), _mm512_and_si512(bits(odd), high));
      };
      _mm512_storeu_si512(out + v * 64, pair(k0, k1));
      _mm512_storeu_si512(out + 128 + v * 64, pair(k2, k3));
    }
}

template <int R>
MV_TILE void tile_bf16(const uint8_t* w, const char* x, int64_t row_bytes, int64_t size, float* sums) {
  F32 acc[R];
  MV_UNROLL for (int r = 0; r < R; r++) acc[r] = fload(sums + r * kPanel);
  for (int64_t k = 0; k < size; k += 2, w += kQuadBytes) {
    Bytes pairs = load_bytes(w);
    MV_UNROLL for (int r = 0; r < R; r++)
      MV_UNROLL for (int v = 0; v < 2; v++)
        asm("vdpbf16ps %2%{1to16%}, %1, %0"
            : "+v"(acc[r].v[v])
            : "v"(pairs.v[v]), "m"(*reinterpret_cast<const int32_t*>(x + r * row_bytes + k * 2)));
  }
  MV_UNROLL for (int r = 0; r < R; r++) fstore(sums + r * kPanel, acc[r]);
}

#endif

// One stretch for all rows. `size` is cut at the real k, since x ends there; the last pair of an odd k is not read here.
template <bool Bf16>
void run_stretch(const Call& call, int64_t panel, int64_t k, char* expanded, float* sums) {
  const uint8_t* w = call.linear.packed + panel * call.linear.panel_bytes + k / 4 * kQuadBytes;
  int64_t size = std::min(kStretch, call.k - k), quads = (size + 3) / 4;
#if defined(MV_GEMM_AVX512)
  if constexpr (Bf16) expand_bf16(w, quads, reinterpret_cast<uint8_t*>(expanded));
#endif
  if constexpr (!Bf16) expand_f32(w, quads, reinterpret_cast<float*>(expanded));
  Tiling tiling(call.rows.count, kRowsF32);
  for (int64_t t = 0; t < tiling.tiles; t++)
    with_height<kRowsF32>(tiling.height(t), [&](auto height) {
      int64_t row = tiling.start(t);
      const char* x = call.x + row * call.row_bytes + k * (Bf16 ? 2 : 4);
#if defined(MV_GEMM_AVX512)
      if constexpr (Bf16)
        tile_bf16<height()>(reinterpret_cast<const uint8_t*>(expanded), x, call.row_bytes, size, sums + row * kPanel);
#endif
      if constexpr (!Bf16)
        tile_f32<height()>(reinterpret_cast<const float*>(expanded), x, call.row_bytes, size, sums + row * kPanel);
    });
}

template <bool Bf16>
void run_panels(const Call& call, int64_t begin, int64_t end) {
  size_t expanded_bytes = kStretch * kPanel * 4, sum_bytes = size_t(call.rows.count) * kPanel * 4;
  auto expanded = static_cast<char*>(thread_scratch(kScratchGemm, expanded_bytes + sum_bytes));
  auto sums = reinterpret_cast<float*>(expanded + expanded_bytes);
  for (int64_t p = begin; p < end; p++) {
    std::memset(sums, 0, sum_bytes);
    for (int64_t k = 0; k < call.k; k += kStretch) run_stretch<Bf16>(call, p, k, expanded, sums);
    F32 scale = fload(call.linear.scales + p * kPanel);
    for (int64_t r = 0; r < call.rows.count; r++)
      finish_row(call.linear, call.rows, r, p, fmul(fload(sums + r * kPanel), scale));
  }
}

// x as float32, rows of k side by side.
const float* as_f32(const Rows& rows, int64_t k) {
  auto out = static_cast<float*>(thread_scratch(kScratchQuant, size_t(rows.count * k) * 4));
  for (int64_t r = 0; r < rows.count; r++) {
    const char* row = static_cast<const char*>(rows.x) + r * rows.ldx * element_size(rows.x_dtype);
    for (int64_t i = 0; i < k; i++) out[r * k + i] = load_scalar(row, i, rows.x_dtype);
  }
  return out;
}

}  // namespace

void weight_only_linear(const Linear& linear, const Rows& rows) {
  Call call{linear, rows, static_cast<const char*>(rows.x), rows.ldx * element_size(rows.x_dtype), linear.k};
#if defined(MV_GEMM_AVX512)
  if (rows.x_dtype == kBF16 && linear.k % 2 == 0) {
    for_panels(linear.num_panels(), 1, [&](int64_t begin, int64_t end) { run_panels<true>(call, begin, end); });
    return;
  }
#endif
  if (rows.x_dtype != kF32) {
    call.x = reinterpret_cast<const char*>(as_f32(rows, linear.k));
    call.row_bytes = linear.k * 4;
  }
  for_panels(linear.num_panels(), 1, [&](int64_t begin, int64_t end) { run_panels<false>(call, begin, end); });
}

}  // namespace mv::gemm
