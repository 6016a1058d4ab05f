// int8 weights with bfloat16 activations where processors multiply pairs of these: a panel's weights become bfloat16
// (which holds these integers exactly), a stretch of k at a time, and all rows use them before the next stretch. Sums
// run over k in one fixed order whatever the number of rows; a channel's scale is applied once at the end. Everywhere
// else float_linear computes the same in float32.
#include "gemm.h"

namespace mv::gemm {

#if defined(MV_GEMM_VNNI)
namespace {

constexpr int64_t kStretch = 128;  // of k; 8 KiB of bfloat16

// sums: [row][32], between stretches.
struct Call {
  const Linear& linear;
  const Rows& rows;
  const char* x;
  int64_t row_bytes;
};

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

void run_stretch(const Call& call, int64_t panel, int64_t k, uint8_t* expanded, float* sums) {
  const uint8_t* w = call.linear.packed + panel * call.linear.panel_bytes + k / 4 * kQuadBytes;
  int64_t size = std::min(kStretch, call.linear.k - k);
  expand_bf16(w, (size + 3) / 4, expanded);
  Tiling tiling(call.rows.count, kMaxRows);
  for (int64_t t = 0; t < tiling.tiles; t++)
    with_height<kMaxRows>(tiling.height(t), [&](auto height) {
      int64_t row = tiling.start(t);
      const char* x = call.x + row * call.row_bytes + k * 2;
      tile_bf16<height()>(expanded, x, call.row_bytes, size, sums + row * kPanel);
    });
}

void run_panels(const Call& call, int64_t begin, int64_t end) {
  size_t expanded_bytes = kStretch * kPanel * 2, sum_bytes = size_t(call.rows.count) * kPanel * 4;
  auto expanded = static_cast<uint8_t*>(thread_scratch(kScratchGemm, expanded_bytes + sum_bytes));
  auto sums = reinterpret_cast<float*>(expanded + expanded_bytes);
  for (int64_t p = begin; p < end; p++) {
    std::memset(sums, 0, sum_bytes);
    for (int64_t k = 0; k < call.linear.k; k += kStretch) run_stretch(call, p, k, expanded, sums);
    F32 scale = fload(call.linear.scales + p * kPanel);
    for (int64_t r = 0; r < call.rows.count; r++)
      finish_row(call.linear, call.rows, r, p, fmul(fload(sums + r * kPanel), scale));
  }
}

}  // namespace

int weight_only_linear(const Linear& linear, const Rows& rows) {
  if (rows.x_dtype != kBF16 || linear.k % 2 != 0) return float_linear(linear, rows);
  Call call{linear, rows, static_cast<const char*>(rows.x), rows.ldx * 2};
  for_panels(linear.num_panels(), 1, linear.panel_bytes, rows.count,
             [&](int64_t begin, int64_t end) { run_panels(call, begin, end); });
  return kOk;
}

#else

int weight_only_linear(const Linear& linear, const Rows& rows) { return float_linear(linear, rows); }

#endif

}  // namespace mv::gemm
