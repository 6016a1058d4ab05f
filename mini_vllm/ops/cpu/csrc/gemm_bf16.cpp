// bfloat16 products of few rows, reading the weights where oneDNN has packed them for its own products of many rows.
//
// Its layout is [n/64][k/2][64 channels][2 k], k padded; Python makes sure of that with a probe before it hands such
// memory over. A tile is 64 channels x up to kTileRows rows; sums run over k in one order for every number of rows.
#include "gemm.h"

namespace mv::gemm {

#if defined(MV_GEMM_VNNI)
namespace {

constexpr int kTileRows = 4;
constexpr int64_t kWide = 64, kPairBytes = kWide * 4;

template <int R>
MV_TILE void wide_tile(const Linear& linear, const Rows& rows, int64_t row, int64_t wide) {
  const uint8_t* w = linear.packed + wide * linear.panel_bytes;
  const char* x = static_cast<const char*>(rows.x) + row * rows.ldx * 2;
  int64_t row_bytes = rows.ldx * 2;
  __m512 acc[R][4];
  MV_UNROLL for (int r = 0; r < R; r++) MV_UNROLL for (int v = 0; v < 4; v++) acc[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < linear.k; k += 2, w += kPairBytes) {
    __m512i pairs[4];
    MV_UNROLL for (int v = 0; v < 4; v++) pairs[v] = _mm512_loadu_si512(w + v * 64);
    MV_UNROLL for (int r = 0; r < R; r++)
      MV_UNROLL for (int v = 0; v < 4; v++)
        asm("vdpbf16ps %2%{1to16%}, %1, %0"
            : "+v"(acc[r][v])
            : "v"(pairs[v]), "m"(*reinterpret_cast<const int32_t*>(x + r * row_bytes + k * 2)));
  }
  MV_UNROLL for (int r = 0; r < R; r++) {
    finish_row(linear, rows, row + r, wide * 2, F32{{acc[r][0], acc[r][1]}});
    if (wide * kWide + kPanel < linear.n) finish_row(linear, rows, row + r, wide * 2 + 1, F32{{acc[r][2], acc[r][3]}});
  }
}

}  // namespace

int bf16_linear(const Linear& linear, const Rows& rows) {
  if (rows.x_dtype != kBF16 || linear.k % 2 != 0) return kUnsupported;
  Tiling tiling(rows.count, kTileRows);
  for_panels((linear.n + kWide - 1) / kWide, 1, linear.panel_bytes, rows.count, [&](int64_t begin, int64_t end) {
    for (int64_t wide = begin; wide < end; wide++)
      for (int64_t t = 0; t < tiling.tiles; t++)
        with_height<kTileRows>(tiling.height(t), [&](auto height) {
          wide_tile<height()>(linear, rows, tiling.start(t), wide);
        });
  });
  return kOk;
}

#else

int bf16_linear(const Linear&, const Rows&) { return kUnsupported; }

#endif

}  // namespace mv::gemm
