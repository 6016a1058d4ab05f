// Weights in a floating-point type, and int8 ones with activations as they are, multiplied in float32.
//
// Activations are widened once, into [stretch of k][row][kStretch]. A thread works on 64 channels at a time (32 where
// registers are fewer). Few rows: weights are widened in registers on their way from memory. Many rows: a stretch of k
// is widened into a buffer of the first-level cache and used by all row tiles, while these fetch the next stretch.
// A channel's sum runs over k in one order with one accumulator, whichever way: partial sums that wait in memory
// between stretches are the same numbers. Weights of int8 are scaled once at the end.
#include "gemm.h"

namespace mv::gemm {
namespace {

constexpr int64_t kStretch = 96;     // of k
constexpr int64_t kRowBlock = 512;   // rows whose partial sums are kept
#if defined(MV_GEMM_AVX512)
constexpr int kWords = 2, kTileRows = 6;
#elif defined(MV_GEMM_AVX2)
constexpr int kWords = 1, kTileRows = 2;
#else
constexpr int kWords = 1, kTileRows = 4;
#endif
constexpr int kUnit = kWords * kPanel;  // channels at a time
constexpr int64_t kUnitsPerWide = 64 / kUnit;

// --- where weights come from: kStep of k at a time, a word being 32 channels ---------------------------------------

template <int DType>
struct FloatWeights {
  static constexpr int kStep = 1, kMostRows = kTileRows;
  static constexpr int64_t kWordBytes = kPanel * (DType == kF32 ? 4 : 2), kStepBytes = 2 * kWordBytes;
  static constexpr int kBytesAtOnce = kWordBytes;
  struct Raw { const uint8_t* p; };
  const uint8_t* base;
  FloatWeights(const Linear& linear, int64_t unit)
      : base(linear.packed + unit / kUnitsPerWide * linear.panel_bytes + unit % kUnitsPerWide * kWordBytes) {}
  MV_INLINE const uint8_t* at(int64_t k, int word) const { return base + k * kStepBytes + word * kWordBytes; }
  MV_INLINE Raw load(int64_t k, int word) const { return {at(k, word)}; }
  // What tile t fetches of the stretch at k: a line for each k, until all are.
  const uint8_t* lines(int64_t k, int64_t t) const {
    return t < kStepBytes / 64 ? at(k, 0) + t * kStretch * 64 : nullptr;
  }
  template <int J>
  static MV_INLINE F32 widen(const Raw& raw) {
    if constexpr (DType == kF32) return fload(reinterpret_cast<const float*>(raw.p));
    else if constexpr (DType == kBF16) return load_bf16_panel(raw.p);
    else return load_f16(raw.p);
  }
};

struct ByteWeights {
  static constexpr int kStep = 4, kMostRows = kTileRows < 6 ? kTileRows : 5;  // registers that hold bytes count as well
  static constexpr int kBytesAtOnce = kQuadBytes;
  using Raw = Bytes;
  const uint8_t* base;
  int64_t panel_bytes;
  ByteWeights(const Linear& linear, int64_t unit)
      : base(linear.packed + unit * kWords * linear.panel_bytes), panel_bytes(linear.panel_bytes) {
    // A last panel without a neighbour stands in for it.
    if (unit * kWords + kWords > linear.num_panels()) panel_bytes = 0;
  }
  MV_INLINE const uint8_t* at(int64_t k, int word) const { return base + word * panel_bytes + k / 4 * kQuadBytes; }
  MV_INLINE Raw load(int64_t k, int word) const { return load_bytes(at(k, word)); }
  const uint8_t* lines(int64_t k, int64_t t) const { return t < kWords ? at(k, int(t)) : nullptr; }
  template <int J>
  static MV_INLINE F32 widen(const Raw& raw) { return byte_to_float<J>(raw); }
};

// --- tiles ---------------------------------------------------------------------------------------------------------

struct Sums {
  float* memory;  // [row][kUnit]
  bool fresh;     // nothing there yet: zeros
};

template <int R>
MV_INLINE void load_sums(F32 (&acc)[R][kWords], const Sums& sums) {
  MV_UNROLL for (int r = 0; r < R; r++)
    MV_UNROLL for (int v = 0; v < kWords; v++)
      acc[r][v] = sums.fresh ? fsplat(0.f) : fload(sums.memory + r * kUnit + v * kPanel);
}
template <int R>
MV_INLINE void store_sums(const F32 (&acc)[R][kWords], const Sums& sums) {
  MV_UNROLL for (int r = 0; r < R; r++)
    MV_UNROLL for (int v = 0; v < kWords; v++) fstore(sums.memory + r * kUnit + v * kPanel, acc[r][v]);
}
template <int R>
MV_INLINE void step(F32 (&acc)[R][kWords], const F32 (&w)[kWords], const float* x) {
  MV_UNROLL for (int r = 0; r < R; r++) {
    F32 value = fsplat(x[r * kStretch]);
    MV_UNROLL for (int v = 0; v < kWords; v++) fma_into(acc[r][v], w[v], value);
  }
}

// All of k at once, in whole steps. x: stretches `stride` elements apart, rows kStretch apart in each.
template <int R, class Weights>
MV_TILE void direct_tile(const Weights& weights, const float* x, int64_t stride, int64_t total, float* sums) {
  F32 acc[R][kWords];
  load_sums<R>(acc, Sums{sums, true});
  for (int64_t first = 0; first < total; first += kStretch, x += stride) {
    int64_t size = std::min(kStretch, total - first);
    for (int64_t k = 0; k < size; k += Weights::kStep) {
      typename Weights::Raw raw[kWords];
      MV_UNROLL for (int v = 0; v < kWords; v++) raw[v] = weights.load(first + k, v);
      MV_UNROLL for (int v = 0; v < kWords; v++) fetch_ahead<Weights::kBytesAtOnce>(weights.at(first + k, v));
      F32 w[kWords];
      MV_UNROLL for (int v = 0; v < kWords; v++) w[v] = Weights::template widen<0>(raw[v]);
      step<R>(acc, w, x + k);
      if constexpr (Weights::kStep == 4) {
        MV_UNROLL for (int v = 0; v < kWords; v++) w[v] = Weights::template widen<1>(raw[v]);
        step<R>(acc, w, x + k + 1);
        MV_UNROLL for (int v = 0; v < kWords; v++) w[v] = Weights::template widen<2>(raw[v]);
        step<R>(acc, w, x + k + 2);
        MV_UNROLL for (int v = 0; v < kWords; v++) w[v] = Weights::template widen<3>(raw[v]);
        step<R>(acc, w, x + k + 3);
      }
    }
  }
  store_sums<R>(acc, Sums{sums, false});
}

template <class Weights>
MV_TILE void widen_stretch(const Weights& weights, int64_t first, int64_t size, float* out) {
  for (int64_t k = 0; k < size; k += Weights::kStep)
    MV_UNROLL for (int v = 0; v < kWords; v++) {
      typename Weights::Raw raw = weights.load(first + k, v);
      float* to = out + k * kUnit + v * kPanel;
      fstore(to, Weights::template widen<0>(raw));
      if constexpr (Weights::kStep == 4) {
        fstore(to + kUnit, Weights::template widen<1>(raw));
        fstore(to + 2 * kUnit, Weights::template widen<2>(raw));
        fstore(to + 3 * kUnit, Weights::template widen<3>(raw));
      }
    }
}

// next: what to fetch into the second-level cache meanwhile, a line for each k.
template <int R, bool Fetch>
MV_TILE void widened_tile(const float* w, const float* x, int64_t size, Sums sums, const uint8_t* next) {
  F32 acc[R][kWords];
  load_sums<R>(acc, sums);
  for (int64_t k = 0; k < size; k++, w += kUnit) {
    if (Fetch) prefetch_l2(next + k * 64);
    F32 words[kWords];
    MV_UNROLL for (int v = 0; v < kWords; v++) words[v] = fload(w + v * kPanel);
    step<R>(acc, words, x + k);
  }
  store_sums<R>(acc, sums);
}

// --- a call ----------------------------------------------------------------------------------------------------------

struct Call {
  const Linear& linear;
  const Rows& rows;
  const float* x;
  int64_t k;  // rounded up to whole steps
  int64_t units;
  const float* stretch(int64_t first) const { return x + first * rows.count; }
};

void finish_unit(const Call& call, int64_t unit, int64_t first_row, int64_t count, const float* sums) {
  for (int v = 0; v < kWords; v++) {
    int64_t panel = unit * kWords + v;
    if (panel * kPanel >= call.linear.n) return;
    for (int64_t r = 0; r < count; r++) {
      F32 value = fload(sums + r * kUnit + v * kPanel);
      if (call.linear.kind == kInt8) value = fmul(value, fload(call.linear.scales + panel * kPanel));
      finish_row(call.linear, call.rows, first_row + r, panel, value);
    }
  }
}

template <class Weights>
void few_rows(const Call& call, int64_t begin, int64_t end) {
  alignas(64) float sums[kTileRows * kUnit];
  for (int64_t unit = begin; unit < end; unit++) {
    Weights weights(call.linear, unit);
    with_height<kTileRows>(int(call.rows.count), [&](auto height) {
      direct_tile<height()>(weights, call.x, call.rows.count * kStretch, call.k, sums);
    });
    finish_unit(call, unit, 0, call.rows.count, sums);
  }
}

struct Block {
  int64_t first_row, rows, first_unit, end_unit;
  float* widened;
  float* sums;
};

template <class Weights>
void many_rows_stretch(const Call& call, const Block& block, int64_t unit, int64_t k) {
  Weights weights(call.linear, unit);
  int64_t size = std::min(kStretch, call.k - k);
  widen_stretch(weights, k, size, block.widened);
  // The stretch after this one, of the next unit: the units of a block take turns.
  bool wraps = unit + 1 == block.end_unit;
  Weights after(call.linear, wraps ? block.first_unit : unit + 1);
  int64_t next_k = wraps ? k + kStretch : k;
  bool fetch = next_k + kStretch <= call.k;
  Tiling tiling(block.rows, kTileRows);
  float* sums = block.sums + (unit - block.first_unit) * block.rows * kUnit;
  for (int64_t t = 0; t < tiling.tiles; t++)
    with_height<kTileRows>(tiling.height(t), [&](auto height) {
      int64_t row = tiling.start(t);
      const float* x = call.stretch(k) + (block.first_row + row) * kStretch;
      const uint8_t* next = fetch ? after.lines(next_k, t) : nullptr;
      Sums waiting{sums + row * kUnit, k == 0};
      if (next != nullptr) widened_tile<height(), true>(block.widened, x, size, waiting, next);
      else widened_tile<height(), false>(block.widened, x, size, waiting, nullptr);
    });
}

constexpr int64_t kUnitsAtOnce = 4;  // whose partial sums are kept while a stretch of x is in the cache

template <class Weights>
void many_rows(const Call& call, int64_t begin, int64_t end) {
  size_t widened = kStretch * kUnit, sums = size_t(std::min(call.rows.count, kRowBlock)) * kUnit * kUnitsAtOnce;
  auto memory = static_cast<float*>(thread_scratch(kScratchGemm, (widened + sums) * 4));
  for (int64_t row = 0; row < call.rows.count; row += kRowBlock)
    for (int64_t unit = begin; unit < end; unit += kUnitsAtOnce) {
      Block block{row, std::min(kRowBlock, call.rows.count - row), unit, std::min(end, unit + kUnitsAtOnce), memory,
                  memory + widened};
      for (int64_t k = 0; k < call.k; k += kStretch)
        for (int64_t u = unit; u < block.end_unit; u++) many_rows_stretch<Weights>(call, block, u, k);
      for (int64_t u = unit; u < block.end_unit; u++)
        finish_unit(call, u, row, block.rows, block.sums + (u - unit) * block.rows * kUnit);
    }
}

template <class Weights>
void run(const Call& call) {
  bool few = call.rows.count <= Weights::kMostRows;
  int64_t bytes = call.linear.panel_bytes;
  int64_t unit_bytes = call.linear.kind == kInt8 ? bytes * kWords : bytes / kUnitsPerWide;
  for_panels(call.units, 1, unit_bytes, call.rows.count, [&](int64_t begin, int64_t end) {
    if (few) few_rows<Weights>(call, begin, end);
    else many_rows<Weights>(call, begin, end);
  });
}

// --- activations -----------------------------------------------------------------------------------------------------

void widen_row(const Rows& rows, int64_t row, int64_t first, int64_t size, float* out) {
  const char* x = static_cast<const char*>(rows.x) + (row * rows.ldx + first) * element_size(rows.x_dtype);
  if (rows.x_dtype == kF32) {
    std::memcpy(out, x, size_t(size) * 4);
  } else if (rows.x_dtype == kBF16) {
    auto h = reinterpret_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < size; i++) out[i] = bf16_to_f32(h[i]);
  } else {
    for (int64_t i = 0; i < size; i++) out[i] = load_scalar(x, i, kF16);
  }
  std::fill(out + size, out + kStretch, 0.f);
}

// [stretch][row][kStretch]; the last stretch ends in zeros.
const float* widen_activations(const Rows& rows, int64_t k) {
  int64_t stretches = (k + kStretch - 1) / kStretch;
  auto out = static_cast<float*>(thread_scratch(kScratchQuant, size_t(rows.count * stretches * kStretch) * 4));
  auto some_rows = [&](int64_t begin, int64_t end) {
    for (int64_t s = 0; s < stretches; s++)
      for (int64_t r = begin; r < end; r++)
        widen_row(rows, r, s * kStretch, std::min(kStretch, k - s * kStretch), out + (s * rows.count + r) * kStretch);
  };
  if (rows.count * k < 32768) some_rows(0, rows.count);  // less work than waking somebody
  else parallel_ranges(rows.count, 1, some_rows);
  return out;
}

}  // namespace

int float_linear(const Linear& linear, const Rows& rows) {
  Call call{linear, rows, widen_activations(rows, linear.k), linear.k, (linear.n + kUnit - 1) / kUnit};
  if (linear.kind == kInt8) {
    call.k = (linear.k + 3) / 4 * 4;
    run<ByteWeights>(call);
  } else if (linear.weight_dtype == kF32) {
    run<FloatWeights<kF32>>(call);
  } else if (linear.weight_dtype == kBF16) {
    run<FloatWeights<kBF16>>(call);
  } else {
    run<FloatWeights<kF16>>(call);
  }
  return kOk;
}

}  // namespace mv::gemm
