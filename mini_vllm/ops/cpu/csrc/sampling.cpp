// One token for each draw: temperature, min-p, top-k, top-p, then the inverse of the cumulative distribution in order
// of token id, all without sorting a vocabulary. What it computes is what mini_vllm/sampling/truncation.py does.
//
// Weights are exp((logit - best) / temperature) in float32, sums of them float64. A row that top-k or min-p limits is
// narrowed to candidates by the highest of each block: k blocks have maxima at least as high as the k-th highest. A
// row that top-p alone limits (or min-p, keeping many) gets a histogram of where its weight lies, so that only the bin
// in which the nucleus ends has to be looked at one by one. The cut itself is found by a weighted quickselect.
//
// A row is worked on in slices that do not depend on the threads: many rows are shared out whole, of few rows the
// slices are. So a token depends neither on the neighbours nor on the number of threads.
#include <algorithm>
#include <cmath>
#include <functional>

#include "abi.h"
#include "pool.h"
#include "simd.h"

namespace mv {
namespace {

constexpr int64_t kBlock = 128;                // tokens that are reduced at once
constexpr int64_t kSlice = 256 * kBlock;
constexpr int64_t kBins = 2048;
constexpr float kBinsPerUnit = 32.0f;          // of scaled logits: the last bin begins at exp(-64)
constexpr double kNegligible = 1e-34;          // weights below this vanish in a sum beside the highest, which is 1
constexpr double kBelowOne = 1.0 - 0x1p-52;
constexpr float kLowest = -__builtin_inff();

struct Limits {
  float temperature;
  int64_t top_k;
  double top_p, min_p;
};

// Memory for one row. Arrays of `size` elements, the vocabulary rounded up to whole blocks.
struct Room {
  float *weights, *block_max;
  double *block_sums, *bins;
  int32_t *ids, *slice_counts;                 // candidates, in order of id within each slice's part
  float *logits, *probable, *sought, *mass;    // of candidates: logit, weight; and copies that a selection may permute

  explicit Room(int64_t size) {
    int64_t blocks = size / kBlock, slices = (size + kSlice - 1) / kSlice;
    int64_t bytes = size * 24 + blocks * 12 + slices * (kBins * 8 + 4) + 12 * 64;
    char* at = static_cast<char*>(thread_scratch(kScratchSampling, size_t(bytes)));
    auto take = [&at](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(at);
      at += (count * int64_t(sizeof *array) + 63) / 64 * 64;
    };
    take(block_sums, blocks), take(bins, slices * kBins), take(weights, size), take(block_max, blocks);
    take(ids, size), take(slice_counts, slices), take(logits, size), take(probable, size), take(sought, size);
    take(mass, size);
  }
};

// Where a row of candidates is cut: those above the threshold stay, and the first `room` of those equal to it.
struct Cut {
  float threshold;
  int64_t room;
};

// The smallest set of the highest items whose mass, with `above`, reaches the goal; all of them where it never does.
// Items are permuted. 3-way partitions, so that a million equal items take one pass.
Cut find_cut(float* logits, float* mass, int64_t count, double goal, double above) {
  for (;;) {
    float a = logits[0], b = logits[count / 2], c = logits[count - 1];
    float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    int64_t higher = 0, lower = count;
    double higher_mass = 0, equal_mass = 0;
    for (int64_t i = 0; i < lower;) {
      if (logits[i] > pivot) {
        higher_mass += mass[i];
        std::swap(logits[i], logits[higher]), std::swap(mass[i++], mass[higher++]);
      } else if (logits[i] < pivot) {
        std::swap(logits[i], logits[--lower]), std::swap(mass[i], mass[lower]);
      } else {
        equal_mass += mass[i++];
      }
    }
    int64_t equal = lower - higher;
    if (higher > 0 && above + higher_mass >= goal) {
      count = higher;
      continue;
    }
    above += higher_mass;
    if (lower == count || above + equal_mass >= goal) {
      double each = equal_mass / double(equal), wanted = std::ceil((goal - above) / each);
      return {pivot, wanted >= double(equal) || !(wanted == wanted) ? equal : std::max<int64_t>(1, int64_t(wanted))};
    }
    above += equal_mass;
    logits += lower, mass += lower, count -= lower;
  }
}

class Row {
 public:
  Row(const float* logits, int64_t vocab, float best, const Limits& limits, Room& room, bool parallel)
      : logits_(logits), vocab_(vocab), blocks_((vocab + kBlock - 1) / kBlock), best_(best), limits_(limits),
        room_(room), parallel_(parallel) {}

  int64_t draw(double uniform) {
    if (limits_.top_k < vocab_ || limits_.min_p > 0) {
      floor_ = lowest_kept(std::max(limits_.min_p, kNegligible));
      float by_top_k = find_block_max();
      if (limits_.top_k < vocab_ || few_blocks_stay()) return draw_from_candidates(by_top_k, uniform);
    }
    if (limits_.top_p < 1) return draw_from_nucleus(uniform);
    weigh_all(false);
    return invert(uniform);
  }

 private:
  template <class Fn>
  void each_slice(const Fn& fn) {  // fn(slice, first block, last block)
    int64_t step = kSlice / kBlock, slices = (blocks_ + step - 1) / step;
    auto one = [&](int64_t s) { fn(s, s * step, std::min(blocks_, (s + 1) * step)); };
    if (parallel_) return parallel_for(slices, one);
    for (int64_t s = 0; s < slices; ++s) one(s);
  }

  // The logits of a block; of a short one a copy that is filled up with what never stays.
  const float* block(int64_t b, float (&padded)[kBlock]) const {
    int64_t left = vocab_ - b * kBlock;
    if (left >= kBlock) return logits_ + b * kBlock;
    std::copy(logits_ + b * kBlock, logits_ + vocab_, padded);
    std::fill(padded + left, padded + kBlock, kLowest);
    return padded;
  }

  F32 scaled(F32 logits) const { return (logits - best_) / limits_.temperature; }
  float scaled(float logit) const { return (logit - best_) / limits_.temperature; }

  static F32 bin_of(F32 scaled) { return min(scaled * -kBinsPerUnit, splat(float(kBins - 1))); }

  // Weights, their sums by block, and if asked for by bin, a histogram for each slice.
  void weigh_all(bool with_bins) {
    each_slice([&](int64_t slice, int64_t first, int64_t last) {
      double* bins = room_.bins + slice * kBins;
      if (with_bins) std::fill(bins, bins + kBins, 0.0);
      for (int64_t b = first; b < last; ++b) weigh_block(b, with_bins ? bins : nullptr);
    });
  }

  void weigh_block(int64_t b, double* bins) {
    float padded[kBlock];
    int32_t at[kBlock];
    const float* from = block(b, padded);
    float* weights = room_.weights + b * kBlock;
    F32 total = {};
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      F32 x = scaled(load(from + i)), w = select(x >= floor_, exp(x), F32{});
      store(weights + i, w);
      total += w;
      I32 bin = __builtin_convertvector(bin_of(x), I32);
      std::memcpy(at + i, &bin, sizeof bin);
    }
    room_.block_sums[b] = sum(total);
    for (int64_t i = 0; bins != nullptr && i < kBlock; ++i) bins[at[i]] += weights[i];
  }

  // --- rows that keep many tokens -----------------------------------------------------------------------------

  int64_t draw_from_nucleus(double uniform) {
    weigh_all(true);
    double total = 0;
    for (int64_t b = 0; b < blocks_; ++b) total += room_.block_sums[b];
    double goal = limits_.top_p * total, above = 0;
    int64_t bin = 0;
    for (;; ++bin) {
      double here = 0;
      for (int64_t s = 0; s * kSlice < vocab_; ++s) here += room_.bins[s * kBins + bin];
      if (above + here >= goal || bin == kBins - 1) break;
      above += here;
    }
    float floor = std::max(floor_, lowest_kept(kNegligible));
    float low = float(bin), high = float(bin + 1);
    auto is_in_bin = [=](F32, F32 x) { return (bin_of(x) >= low) & (bin_of(x) < high) & (x >= floor); };
    int64_t count = collect(is_in_bin, nullptr);
    if (count == 0) return invert(uniform);  // rounding: the bins before held all there is
    Cut cut = find_cut(copy_logits(count), copy_weights(count), count, goal, above);
    keep(cut, last_kept_tie(cut));
    return invert(uniform);
  }

  // The id of the last of the equal ones that stays. Ties go to the lowest ids.
  int64_t last_kept_tie(const Cut& cut) const {
    int64_t room = cut.room;
    for (int64_t i = 0; i < vocab_; ++i)
      if (logits_[i] == cut.threshold && --room == 0) return i;
    return vocab_;
  }

  // Zero weight for all that do not stay.
  void keep(const Cut& cut, int64_t last_tie) {
    each_slice([&](int64_t, int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        float padded[kBlock], *weights = room_.weights + b * kBlock;
        const float* from = block(b, padded);
        F32 total = {};
        for (int64_t i = 0; i < kBlock; i += kLanes) {
          I32 ids = lane_numbers() + int32_t(b * kBlock + i);
          F32 l = load(from + i);
          I32 stays = (l > cut.threshold) | ((l == cut.threshold) & (ids <= int32_t(last_tie)));
          F32 w = select(stays, load(weights + i), F32{});
          store(weights + i, w);
          total += w;
        }
        room_.block_sums[b] = sum(total);
      }
    });
  }

  // The first token whose cumulative weight exceeds the uniform share of the total, never one of weight 0.
  int64_t invert(double uniform) const {
    double total = 0, before = 0;
    for (int64_t b = 0; b < blocks_; ++b) total += room_.block_sums[b];
    double target = std::min(uniform * total, total * kBelowOne);
    int64_t b = 0;
    while (b < blocks_ - 1 && before + room_.block_sums[b] <= target) before += room_.block_sums[b++];
    while (b > 0 && room_.block_sums[b] == 0) before -= room_.block_sums[--b];  // rounding put the target at the end
    return b * kBlock + first_above(room_.weights + b * kBlock, kBlock, target - before);
  }

  static int64_t first_above(const float* weights, int64_t count, double target) {
    double total = 0, reached = 0;
    for (int64_t i = 0; i < count; ++i) total += weights[i];
    target = std::min(target, total * kBelowOne);
    for (int64_t i = 0; i < count; ++i)
      if ((reached += weights[i]) > target) return i;
    return 0;
  }

  // --- rows that keep few tokens ------------------------------------------------------------------------------

  // Whether looking at candidates one by one takes less than working on all tokens.
  bool few_blocks_stay() const {
    int64_t count = 0;
    for (int64_t b = 0; b < blocks_; ++b) count += scaled(room_.block_max[b]) >= floor_;
    return count * 4 <= blocks_;
  }

  int64_t draw_from_candidates(float by_top_k, double uniform) {
    auto may_stay = [=, floor = floor_](F32 logits, F32 x) { return (logits >= by_top_k) & (x >= floor); };
    int64_t count = collect(may_stay, room_.block_max);
    if (limits_.top_k < count) {
      std::fill(room_.mass, room_.mass + count, 1.0f);
      count = filter(find_cut(copy_logits(count), room_.mass, count, double(limits_.top_k), 0), count);
    }
    if (limits_.top_p < 1) {
      double total = 0;
      for (int64_t i = 0; i < count; ++i) total += room_.probable[i];
      count = filter(find_cut(copy_logits(count), copy_weights(count), count, limits_.top_p * total, 0), count);
    }
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += room_.probable[i];
    return room_.ids[first_above(room_.probable, count, uniform * total)];
  }

  // The lowest scaled logit whose weight is at least this, which is at most 1.
  static float lowest_kept(double weight) {
    uint32_t low = 0, high = 0x7f800000;  // magnitudes, by their bits: exp(-low) >= weight > exp(-high)
    while (high - low > 1) {
      uint32_t middle = low + (high - low) / 2;
      (std::exp(-double(as<float>(middle))) >= weight ? low : high) = middle;
    }
    return -as<float>(low);
  }

  // The highest of each block; returns what top-k keeps nothing below of.
  float find_block_max() {
    each_slice([&](int64_t, int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        float padded[kBlock];
        const float* from = block(b, padded);
        F32 highest_here = load(from);
        for (int64_t i = kLanes; i < kBlock; i += kLanes) highest_here = max(highest_here, load(from + i));
        room_.block_max[b] = highest(highest_here);
      }
    });
    if (limits_.top_k > blocks_) return kLowest;
    std::copy(room_.block_max, room_.block_max + blocks_, room_.sought);
    std::nth_element(room_.sought, room_.sought + limits_.top_k - 1, room_.sought + blocks_, std::greater<float>());
    return room_.sought[limits_.top_k - 1];
  }

  // Candidates in order of id with their weights: tokens for which `stays(logits, scaled)`. highest: of each block,
  // where it is known; a block whose highest does not stay is passed over.
  template <class Stays>
  int64_t collect(const Stays& stays, const float* highest) {
    each_slice([&](int64_t slice, int64_t first, int64_t last) {
      int64_t at = first * kBlock, begin = at;
      for (int64_t b = first; b < last; ++b) {
        F32 top = splat(highest == nullptr ? 0.0f : highest[b]);
        if (highest == nullptr || stays(top, scaled(top))[0] != 0) at = collect_block(b, stays, at);
      }
      room_.slice_counts[slice] = int32_t(at - begin);
      for (int64_t i = begin; i < at; i += kLanes)
        store_some(room_.probable + i, exp(scaled(load_some(room_.logits + i, at - i))), at - i);
    });
    return close_ranks();
  }

  template <class Stays>
  int64_t collect_block(int64_t b, const Stays& stays, int64_t at) {
    float padded[kBlock];
    const float* from = block(b, padded);
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      F32 l = load(from + i);
      I32 mask = stays(l, scaled(l));
      if (!any(mask)) continue;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (mask[lane] == 0) continue;
        room_.ids[at] = int32_t(b * kBlock + i + lane);
        room_.logits[at++] = from[i + lane];
      }
    }
    return at;
  }

  static bool any(I32 mask) {
    uint64_t words[kLanes / 2], all = 0;
    std::memcpy(words, &mask, sizeof mask);
    for (uint64_t word : words) all |= word;
    return all != 0;
  }

  // From one part for each slice to one list.
  int64_t close_ranks() {
    int64_t count = room_.slice_counts[0];
    for (int64_t s = 1; s * kSlice < vocab_; ++s) {
      int64_t from = s * kSlice, here = room_.slice_counts[s];
      std::copy(room_.ids + from, room_.ids + from + here, room_.ids + count);
      std::copy(room_.logits + from, room_.logits + from + here, room_.logits + count);
      std::copy(room_.probable + from, room_.probable + from + here, room_.probable + count);
      count += here;
    }
    return count;
  }

  float* copy_logits(int64_t count) { return std::copy(room_.logits, room_.logits + count, room_.sought), room_.sought; }
  float* copy_weights(int64_t count) { return std::copy(room_.probable, room_.probable + count, room_.mass), room_.mass; }

  int64_t filter(Cut cut, int64_t count) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (room_.logits[i] < cut.threshold || (room_.logits[i] == cut.threshold && cut.room-- <= 0)) continue;
      room_.ids[kept] = room_.ids[i], room_.logits[kept] = room_.logits[i], room_.probable[kept++] = room_.probable[i];
    }
    return kept;
  }

  const float* logits_;
  int64_t vocab_, blocks_;
  float best_;
  float floor_ = kLowest;  // scaled logits below this do not stay, by min-p
  Limits limits_;
  Room& room_;
  bool parallel_;
};

}  // namespace
}  // namespace mv

using namespace mv;

// logits [rows, vocab] float32 at a stride; best [draws] the highest of each draw's row. rows_of [draws]: which row.
// tokens [draws]: -1 where the highest is not finite. top_k: 1 to vocab, which is off.
struct DrawArgs {
  const float* logits;
  const int64_t* rows_of;
  const float *best, *temperature;
  const int64_t* top_k;
  const double *top_p, *min_p, *uniforms;
  int64_t* tokens;
  int64_t stride, vocab;
};

MV_API int mv_draw_tokens(const DrawArgs* a, int64_t draws) {
  if (a->vocab < 1 || a->vocab > (int64_t(1) << 30)) return kUnsupported;
  bool few = draws < num_threads();
  auto one = [&](int64_t d) {
    a->tokens[d] = -1;
    if (!std::isfinite(a->best[d])) return;
    Room room((a->vocab + kBlock - 1) / kBlock * kBlock);
    Limits limits{a->temperature[d], a->top_k[d], a->top_p[d], a->min_p[d]};
    Row row(a->logits + a->rows_of[d] * a->stride, a->vocab, a->best[d], limits, room, few);
    a->tokens[d] = row.draw(a->uniforms[d]);
  };
  if (!few) parallel_for(draws, one);
  else for (int64_t d = 0; d < draws; ++d) one(d);
  return kOk;
}
