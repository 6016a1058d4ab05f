// Weights or activations with a scale for each group of k: int4, and int8 with per-group activations.
//
// Within a group products are exact integers; each group's sum is scaled and added in float32, group after group, in
// the same order for every number of rows, so a row's result does not depend on the others. Up to kDirectRows rows
// nibbles are taken apart where they are used; above, a panel is unpacked to bytes once and used by all tiles.
#include <algorithm>

#include "gemm.h"

namespace mv::gemm {
namespace {

constexpr int64_t kDirectRows = 2 * kMaxGroupRows;

struct Call {
  const Linear& linear;
  const Rows& rows;
  const QuantizedRows& x;
  const Tiling& tiling;
  int64_t header_bytes, group_bytes;  // of kInt4
};

// Where a panel's groups are. Nibbles or bytes at `weights`; scales and minimums at `header`, if it has any.
struct Panel {
  int64_t index;
  const uint8_t* weights;
  int64_t weight_stride;
  const uint8_t* header;
  int64_t header_stride;
};

// What a panel's bytes are: two weights of 4 bits, one weight of 4 bits, or one of 8.
enum Form { kPacked, kNibbles, kWhole };

// One quad of weights with R rows, whose activations are at x.
template <int R>
MV_INLINE void add_quad(I32 (&acc)[R], Halves (&sums)[R], const Bytes& bytes, const int8_t* x) {
  MV_UNROLL for (int r = 0; r < R; r++) {
    if constexpr (kNibbleSums) nibble_dot(sums[r], bytes, x + r * 4);
    else dot(acc[r], bytes, make_quad(reinterpret_cast<const Act*>(x + r * 4)));
  }
}

template <int R, Form F>
MV_INLINE void sum_nibbles(I32 (&acc)[R], const uint8_t* w, const int8_t* x, int64_t group) {
  for (int64_t k = 0; k < group; k += 32, x += 32 * R, w += F == kPacked ? 4 * kQuadBytes : 8 * kQuadBytes) {
    Halves sums[R];
    MV_UNROLL for (int r = 0; r < R; r++) sums[r] = no_nibbles();
    if constexpr (F == kPacked) {
      MV_UNROLL for (int j = 0; j < 4; j++) {
        Bytes both = load_bytes(w + j * kQuadBytes);
        fetch_ahead<kQuadBytes>(w + j * kQuadBytes);
        add_quad<R>(acc, sums, low_nibbles(both), x + j * R * 4);
        add_quad<R>(acc, sums, high_nibbles(both), x + (j + 4) * R * 4);
      }
    } else {
      MV_UNROLL for (int j = 0; j < kMostNibbleDots; j++)
        add_quad<R>(acc, sums, load_bytes(w + j * kQuadBytes), x + j * R * 4);
    }
    if constexpr (kNibbleSums) MV_UNROLL for (int r = 0; r < R; r++) add_nibbles(acc[r], sums[r]);
  }
}

template <int R>
MV_INLINE void sum_bytes(I32 (&acc)[R], const uint8_t* w, const Act* x, int64_t group) {
  for (int64_t q = 0; q < group / 4; q++, w += kQuadBytes, x += 4 * R) {
    Bytes bytes = load_bytes(w);
    MV_UNROLL for (int r = 0; r < R; r++) dot(acc[r], bytes, make_quad(x + r * 4));
  }
}

template <int R, Form F>
MV_TILE void group_tile(const Call& call, const Panel& panel, int64_t row) {
  const Linear& linear = call.linear;
  const QuantizedRows& x = call.x;
  using Value = std::conditional_t<F == kWhole, Act, int8_t>;
  auto values = static_cast<const Value*>(x.values) + row * linear.k_padded;
  const uint8_t *w = panel.weights, *header = panel.header;
  const int32_t offset = linear.asymmetric ? 0 : linear.kind == kInt4 ? -8 : -128;
  F32 total[R];
  MV_UNROLL for (int r = 0; r < R; r++) total[r] = fsplat(0.f);
  for (int64_t g = 0; g < x.groups; g++) {
    I32 acc[R];
    MV_UNROLL for (int r = 0; r < R; r++) acc[r] = isplat(offset * x.sums[(row + r) * x.groups + g]);
    if constexpr (F == kWhole) sum_bytes<R>(acc, w, values, linear.group);
    else sum_nibbles<R, F>(acc, w, values, linear.group);
    F32 scale = header == nullptr ? fsplat(1.f) : load_f16(header);
    MV_UNROLL for (int r = 0; r < R; r++) {
      // Both cases round alike for every R: only the number of rows at once differs.
      F32 factor = x.scale_groups > 1 ? fmul(scale, fsplat(x.scales[(row + r) * x.scale_groups + g])) : scale;
      total[r] = fma(to_float(acc[r]), factor, total[r]);
    }
    if (linear.asymmetric) {
      F32 minimum = load_f16(header + 64);
      MV_UNROLL for (int r = 0; r < R; r++) {
        float sum = float(x.sums[(row + r) * x.groups + g]);
        if (x.scale_groups > 1) sum *= x.scales[(row + r) * x.scale_groups + g];
        total[r] = fma(minimum, fsplat(sum), total[r]);
      }
    }
    w += panel.weight_stride, header += panel.header_stride, values += linear.group * R;
  }
  MV_UNROLL for (int r = 0; r < R; r++) {
    F32 value = total[r];
    if (x.scale_groups == 1) value = fmul(value, fsplat(x.scales[row + r]));
    if (linear.kind == kInt8) value = fmul(value, fload(linear.scales + panel.index * kPanel));
    finish_row(linear, call.rows, row + r, panel.index, value);
  }
}

void unpack_panel(const Call& call, const uint8_t* packed, uint8_t* out) {
  for (int64_t g = 0; g < call.x.groups; g++, packed += call.group_bytes) {
    const uint8_t* w = packed + call.header_bytes;
    for (int64_t k = 0; k < call.linear.group; k += 32, out += 8 * kQuadBytes)
      for (int j = 0; j < 4; j++, w += kQuadBytes) {
        Bytes both = load_bytes(w);
        store_bytes(out + j * kQuadBytes, low_nibbles(both));
        store_bytes(out + (j + 4) * kQuadBytes, high_nibbles(both));
      }
  }
}

template <Form F>
void panel_tiles(const Call& call, const Panel& panel) {
  for (int64_t t = 0; t < call.tiling.tiles; t++)
    with_height<kMaxGroupRows>(call.tiling.height(t), [&](auto height) {
      group_tile<height(), F>(call, panel, call.tiling.start(t));
    });
}

void run_panels(const Call& call, int64_t begin, int64_t end) {
  const Linear& linear = call.linear;
  bool unpack = linear.kind == kInt4 && call.rows.count > kDirectRows;
  auto bytes = unpack ? static_cast<uint8_t*>(thread_scratch(kScratchGemm, linear.k_padded * kPanel)) : nullptr;
  for (int64_t p = begin; p < end; p++) {
    const uint8_t* packed = linear.packed + p * linear.panel_bytes;
    int64_t byte_stride = linear.group * kPanel;
    if (linear.kind == kInt8) {
      panel_tiles<kWhole>(call, Panel{p, packed, byte_stride, nullptr, 0});
    } else if (unpack) {
      unpack_panel(call, packed, bytes);
      panel_tiles<kNibbles>(call, Panel{p, bytes, byte_stride, packed, call.group_bytes});
    } else {
      panel_tiles<kPacked>(call, Panel{p, packed + call.header_bytes, call.group_bytes, packed, call.group_bytes});
    }
  }
}

}  // namespace

void grouped_linear(const Linear& linear, const Rows& rows) {
  Tiling tiling(rows.count, kMaxGroupRows);
  QuantizedRows x = quantize_rows(rows, linear, tiling, linear.group);
  int64_t header = linear.asymmetric ? 128 : 64;
  Call call{linear, rows, x, tiling, header, header + linear.group * kPanel / 2};
  for_panels(linear.num_panels(), 1, linear.panel_bytes, rows.count,
             [&](int64_t begin, int64_t end) { run_panels(call, begin, end); });
}

}  // namespace mv::gemm
