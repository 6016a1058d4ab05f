// int8 weights (a scale for each channel) times int8 activations (a scale for each token), any number of rows.
//
// Sums are exact integers, so tile shapes and K blocks do not show in the result. Up to kManyRows rows: tiles of one
// panel (32 channels) x kMaxRows rows over all of k, fetching the next panel meanwhile. Above: tiles of two panels x 6
// rows over blocks of k, so that activations and weights stay in the second-level cache; partial sums wait in memory.
// Weights are stored as s + 128; an accumulator starts at -128 * (sum of its row) to undo that.
#include <algorithm>

#include "gemm.h"

namespace mv::gemm {
namespace {

constexpr int64_t kManyRows = 96;
constexpr int64_t kRowBlock = 480;
constexpr int64_t kBlockQuads = 128;  // 512 of k
constexpr int kPairRows = 6;

struct Call {
  const Linear& linear;
  const Rows& rows;
  const QuantizedRows& x;
  const Tiling& tiling;
  int64_t quads;
};

template <int R>
MV_INLINE void finish_tile(const Call& call, const I32 (&acc)[R], int64_t row, int64_t panel) {
  F32 weight_scale = fload(call.linear.scales + panel * kPanel);
  MV_UNROLL for (int r = 0; r < R; r++) {
    F32 scale = fmul(weight_scale, fsplat(call.x.scales[row + r]));
    finish_row(call.linear, call.rows, row + r, panel, fmul(to_float(acc[r]), scale));
  }
}

// Four k-quads go to four sets of accumulators where rows are few: VNNI's dot product takes longer than its turn.
template <int R>
MV_TILE void panel_tile(const Call& call, int64_t row, int64_t panel, const uint8_t* next) {
  const uint8_t* w = call.linear.packed + panel * call.linear.panel_bytes;
  const Act* x = static_cast<const Act*>(call.x.values) + row * call.linear.k_padded;
  I32 acc[R];
  MV_UNROLL for (int r = 0; r < R; r++) acc[r] = isplat(-128 * call.x.sums[row + r]);
  int64_t q = 0;
  if constexpr (R <= 3 && !kHalves && kMaxRows > 4) {
    I32 more[3][R];
    MV_UNROLL for (int s = 0; s < 3; s++) MV_UNROLL for (int r = 0; r < R; r++) more[s][r] = isplat(0);
    for (; q + 4 <= call.quads; q += 4, w += 4 * kQuadBytes, x += 16 * R) {
      MV_UNROLL for (int s = 0; s < 4; s++) {
        Bytes bytes = load_bytes(w + s * kQuadBytes);
        MV_UNROLL for (int r = 0; r < R; r++) dot(s == 0 ? acc[r] : more[s == 0 ? 0 : s - 1][r], bytes, make_quad(x + (s * R + r) * 4));
      }
    }
    MV_UNROLL for (int r = 0; r < R; r++) acc[r] = iadd(iadd(acc[r], more[0][r]), iadd(more[1][r], more[2][r]));
  }
  if (next != nullptr) {
    for (; q < call.quads; q++, w += kQuadBytes, x += 4 * R, next += 64) {
      Bytes bytes = load_bytes(w);
      prefetch_l2(next);
      MV_UNROLL for (int r = 0; r < R; r++) dot(acc[r], bytes, make_quad(x + r * 4));
    }
  }
  for (; q < call.quads; q++, w += kQuadBytes, x += 4 * R) {
    Bytes bytes = load_bytes(w);
    fetch_ahead<kQuadBytes>(w);
    MV_UNROLL for (int r = 0; r < R; r++) dot(acc[r], bytes, make_quad(x + r * 4));
  }
  finish_tile<R>(call, acc, row, panel);
}

void panel_tiles(const Call& call, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; p++) {
    for (int64_t t = 0; t < call.tiling.tiles; t++) {
      // The first two tiles fetch half of the next panel each.
      const uint8_t* next = nullptr;
      if (call.tiling.tiles > 1 && t < 2 && p + 1 < end)
        next = call.linear.packed + (p + 1) * call.linear.panel_bytes + t * call.quads * 64;
      with_height<kMaxRows>(call.tiling.height(t), [&](auto height) {
        panel_tile<height()>(call, call.tiling.start(t), p, next);
      });
    }
  }
}

#if defined(MV_GEMM_AVX512)

// A stretch of k of two panels. sums: [row][64] where they wait between blocks.
struct Block {
  int64_t panel, first_quad, quads;
  bool first, last;
  int32_t* sums;
  const uint8_t* next;  // to fetch meanwhile, `lines` cache lines of each panel
  int64_t lines;
};

// Adds the products of one k-quad of 64 channels, the panels' bytes at w and v, with R rows.
template <int R>
MV_INLINE void pair_dot(I32 (&a)[R], I32 (&b)[R], const uint8_t* w, const uint8_t* v, const Act* x) {
  Bytes bw = load_bytes(w), bv = load_bytes(v);
#if defined(MV_GEMM_VNNI)
  auto dot_register = [](__m512i& acc, __m512i weights, __m512i value) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(value));
  };
  MV_UNROLL for (int r = 0; r < R; r++) {
    __m512i xr = splat_dword(x + r * 4);
    dot_register(a[r].v[0], bw.v[0], xr);
    dot_register(a[r].v[1], bw.v[1], xr);
    dot_register(b[r].v[0], bv.v[0], xr);
    dot_register(b[r].v[1], bv.v[1], xr);
  }
#else
  // Even bytes for all rows, then odd ones: only four registers hold weights.
  MV_UNROLL for (int odd = 0; odd < 2; odd++) {
    auto half = [&](__m512i bytes) {
      return odd ? _mm512_srli_epi16(bytes, 8) : _mm512_and_si512(bytes, _mm512_set1_epi16(255));
    };
    __m512i w0 = half(bw.v[0]), w1 = half(bw.v[1]), v0 = half(bv.v[0]), v1 = half(bv.v[1]);
    MV_UNROLL for (int r = 0; r < R; r++) {
      __m512i xr = splat_dword(x + r * 4 + odd * 2);
      add_lanes(a[r].v[0], _mm512_madd_epi16(w0, xr));
      add_lanes(a[r].v[1], _mm512_madd_epi16(w1, xr));
      add_lanes(b[r].v[0], _mm512_madd_epi16(v0, xr));
      add_lanes(b[r].v[1], _mm512_madd_epi16(v1, xr));
    }
  }
#endif
}

template <int R>
MV_TILE void pair_tile(const Call& call, const Block& block, int64_t row) {
  const Linear& linear = call.linear;
  const uint8_t* w = linear.packed + block.panel * linear.panel_bytes + block.first_quad * kQuadBytes;
  const uint8_t* v = w + linear.panel_bytes;
  const Act* x = static_cast<const Act*>(call.x.values) + row * linear.k_padded + block.first_quad * 4 * R;
  I32 a[R], b[R];
  int32_t* sums = block.sums;
  MV_UNROLL for (int r = 0; r < R; r++) {
    if (block.first) {
      a[r] = b[r] = isplat(-128 * call.x.sums[row + r]);
    } else {
      Bytes waiting = load_bytes(sums + r * 64), other = load_bytes(sums + r * 64 + 32);
      a[r] = {{waiting.v[0], waiting.v[1]}}, b[r] = {{other.v[0], other.v[1]}};
    }
  }
  for (int64_t i = 0; i < block.lines; i++) {
    prefetch_l2(block.next + i * 64);
    prefetch_l2(block.next + linear.panel_bytes + i * 64);
  }
  for (int64_t q = 0; q < block.quads; q++, w += kQuadBytes, v += kQuadBytes, x += 4 * R) pair_dot<R>(a, b, w, v, x);
  if (block.last) {
    finish_tile<R>(call, a, row, block.panel);
    finish_tile<R>(call, b, row, block.panel + 1);
    return;
  }
  MV_UNROLL for (int r = 0; r < R; r++) {
    store_bytes(sums + r * 64, Bytes{{a[r].v[0], a[r].v[1]}});
    store_bytes(sums + r * 64 + 32, Bytes{{b[r].v[0], b[r].v[1]}});
  }
}

void pair_block(const Call& call, Block block, int64_t tile_begin, int64_t tile_end, bool fetch) {
  int64_t tiles = tile_end - tile_begin;
  const uint8_t* next = block.last
                            ? call.linear.packed + (block.panel + 2) * call.linear.panel_bytes
                            : call.linear.packed + block.panel * call.linear.panel_bytes +
                                  (block.first_quad + block.quads) * kQuadBytes;
  int64_t lines = block.quads * 2, share = (lines + tiles - 1) / tiles;
  int32_t* sums = block.sums;
  int64_t base = call.tiling.start(tile_begin);
  for (int64_t t = tile_begin; t < tile_end; t++) {
    int64_t done = (t - tile_begin) * share;
    block.next = next + done * 64;
    block.lines = fetch ? std::max<int64_t>(0, std::min(share, lines - done)) : 0;
    block.sums = sums + (call.tiling.start(t) - base) * 64;
    with_height<kPairRows>(call.tiling.height(t), [&](auto height) {
      pair_tile<height()>(call, block, call.tiling.start(t));
    });
  }
}

void pair_tiles(const Call& call, int64_t begin, int64_t end) {
  int64_t blocks = (call.quads + kBlockQuads - 1) / kBlockQuads;
  int64_t per_block = (call.quads + blocks - 1) / blocks, tiles_at_once = kRowBlock / kPairRows;
  auto sums = static_cast<int32_t*>(thread_scratch(kScratchGemm, kRowBlock * 64 * 4));
  for (int64_t first = 0; first < call.tiling.tiles; first += tiles_at_once) {
    int64_t last = std::min(call.tiling.tiles, first + tiles_at_once);
    int64_t p = begin;
    for (; p + 1 < end; p += 2) {
      for (int64_t q = 0; q < call.quads; q += per_block) {
        int64_t count = std::min(per_block, call.quads - q);
        bool is_last = q + count == call.quads;
        Block block{p, q, count, q == 0, is_last, sums, nullptr, 0};
        pair_block(call, block, first, last, !is_last || p + 3 < end);
      }
    }
    for (; p < end; p++)
      for (int64_t t = first; t < last; t++)
        with_height<kPairRows>(call.tiling.height(t), [&](auto height) {
          panel_tile<height()>(call, call.tiling.start(t), p, nullptr);
        });
  }
}

#endif

}  // namespace

void int8_linear(const Linear& linear, const Rows& rows) {
  bool many = rows.count >= kManyRows && kMaxRows > kPairRows;
  Tiling tiling(rows.count, many ? kPairRows : kMaxRows);
  QuantizedRows x = quantize_rows(rows, linear, tiling, linear.k_padded);
  Call call{linear, rows, x, tiling, linear.k_padded / 4};
  for_panels(linear.num_panels(), many ? 2 : 1, linear.panel_bytes, rows.count, [&](int64_t begin, int64_t end) {
#if defined(MV_GEMM_AVX512)
    if (many) return pair_tiles(call, begin, end);
#endif
    panel_tiles(call, begin, end);
  });
}

}  // namespace mv::gemm
