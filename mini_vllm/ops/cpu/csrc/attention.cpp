// Attention over a paged KV cache, read in place through the block table: decode and chunked prefill alike.
//
// Shapes, all owned by the caller: query [N, Hq, D] and key, value [N, Hkv, D], heads dense, tokens at a stride;
// output [N, Hq, D] dense; one layer's cache [2 (keys, values), blocks, Hkv, block_size, D]. Request r has tokens
// query_start_loc[r] .. query_start_loc[r + 1], the last of its seq_lens[r]; position p lies in block
// block_table[r][p / block_size]. New keys and values are written first, then every query attends.
//
// A work item is a tile of rows (queries: tokens x the query heads that share a KV head) and walks the keys in tiles
// of kTile with an online softmax (Milakov and Gimelshein 2018) in float32. Tiles lie at multiples of kTile and every
// kSplit keys the running result is set aside and merged in order; so a row's sum is built the same way whether its
// splits are done by one item or, in a decode with few heads and long contexts, by several threads (Flash-Decoding).
// No key outside the request's own positions low .. limit is ever read.
#include <algorithm>
#include <vector>

#include "abi.h"
#include "attention.h"
#include "attention_tile.h"
#include "pool.h"

namespace mv {

struct AttentionTensors {
  const void *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;  // from token to token
  void *keys, *values;                             // the halves of the cache
  void* output;
};

namespace {

constexpr int kSplit = 256;
constexpr int kMaxRows = 64;
constexpr float kFloor = -1e30f;               // below every score, yet subtracting it from -inf gives -inf
constexpr int64_t kInlineWork = 64 * 1024;     // multiply-adds that take less time than waking a thread
constexpr int64_t kItemsPerThread = 4;
static_assert(kSplit % kTile == 0, "a tile belongs to one split");

struct Item {
  int32_t request, kv_head, first_row, num_rows;
  int32_t split;     // all of them if negative
  int64_t partial;   // where one split's result goes, in floats
};

struct Call {
  const AttentionLayer& layer;
  const AttentionBatch& batch;
  const AttentionTensors& tensors;
  int group, dim;  // query heads to a KV head; head_size padded to whole vectors
};

// Online softmax of up to kMaxRows rows: highest score, sum of weights, weighted sum of values.
struct Running {
  float *highest, *total, *output;
  void clear(int rows, int dim) const {
    std::fill_n(highest, rows, kFloor);
    std::fill_n(total, rows, 0.0f);
    std::fill_n(output, size_t(rows) * dim, 0.0f);
  }
  static size_t floats(int rows, int dim) { return size_t(rows) * (dim + 2); }
  static Running at(float* memory, int rows, int dim) {
    return {memory + size_t(rows) * dim, memory + size_t(rows) * (dim + 1), memory};
  }
};

// What one thread works in.
struct Workspace {
  float *queries, *transposed, *values;
  Running part, whole;
  alignas(64) float weights[kRowBlock * kTile];
  int32_t low[kMaxRows], limit[kMaxRows];  // positions that a row sees

  explicit Workspace(int dim) {
    size_t rows = size_t(kMaxRows) * dim, tile = size_t(kTile) * dim, running = Running::floats(kMaxRows, dim);
    auto* memory = static_cast<float*>(
        thread_scratch(kScratchAttention, (rows + 2 * tile + 2 * running) * sizeof(float)));
    queries = memory;
    transposed = queries + rows;
    values = transposed + tile;
    part = Running::at(values + tile, kMaxRows, dim);
    whole = Running::at(values + tile + running, kMaxRows, dim);
  }
};

inline float exp1(float x) { return exp(splat(x))[0]; }

// whole = whole + part for each row; a part without a key leaves it as it is.
void merge(const Running& whole, const Running& part, int rows, int dim) {
  for (int r = 0; r < rows; ++r) {
    if (part.total[r] == 0) continue;
    float top = std::max(whole.highest[r], part.highest[r]);
    float keep = exp1(whole.highest[r] - top), take = exp1(part.highest[r] - top);
    if (whole.total[r] == 0) keep = 0;
    whole.highest[r] = top;
    whole.total[r] = whole.total[r] * keep + part.total[r] * take;
    for (int d = 0; d < dim; d += kLanes) {
      float* to = whole.output + size_t(r) * dim + d;
      store(to, load(to) * keep + load(part.output + size_t(r) * dim + d) * take);
    }
  }
}

template <class Q>
void load_queries(const Call& call, const Item& item, float* queries) {
  const auto& [layer, batch, tensors, group, dim] = call;
  int64_t start = batch.query_start_loc[item.request];
  for (int r = 0; r < item.num_rows; ++r) {
    int row = item.first_row + r, head = item.kv_head * group + row % group;
    const Q* from = static_cast<const Q*>(tensors.query) + (start + row / group) * tensors.query_stride +
                    int64_t(head) * layer.head_size;
    for (int d = 0; d < dim; d += kLanes)
      store(queries + size_t(r) * dim + d, load_some(from + d, layer.head_size - d) * layer.scale);
  }
}

template <class Q>
void store_outputs(const Call& call, const Item& item, const Running& done) {
  const auto& [layer, batch, tensors, group, dim] = call;
  int64_t start = batch.query_start_loc[item.request];
  for (int r = 0; r < item.num_rows; ++r) {
    int row = item.first_row + r, head = item.kv_head * group + row % group;
    Q* to = static_cast<Q*>(tensors.output) + ((start + row / group) * layer.num_heads + head) * layer.head_size;
    float inverse = 1.0f / done.total[r];
    for (int d = 0; d < dim; d += kLanes)
      store_some(to + d, load(done.output + size_t(r) * dim + d) * inverse, layer.head_size - d);
  }
}

void find_limits(const Call& call, const Item& item, Workspace& work) {
  const auto& batch = call.batch;
  int length = batch.seq_lens[item.request];
  int context = length - (batch.query_start_loc[item.request + 1] - batch.query_start_loc[item.request]);
  for (int r = 0; r < item.num_rows; ++r) {
    int position = context + (item.first_row + r) / call.group;
    work.limit[r] = batch.causal ? position + 1 : length;
    work.low[r] = call.layer.window > 0 ? std::max(0, position + 1 - call.layer.window) : 0;
  }
}

// Scores of one row in [0, kTile), for keys from position `start`, become weights; returns what older sums shrink by.
inline float soften(float* row, int num_vectors, int start, int low, int limit, float softcap, float& top,
                    float& total) {
  const I32 lanes = lane_numbers();
  F32 best = splat(kFloor);
  for (int v = 0; v < num_vectors; ++v) {
    F32 score = load(row + v * kLanes);
    if (softcap > 0) score = softcap * tanh(score * (1.0f / softcap));
    I32 position = lanes + (start + v * kLanes);
    score = (position >= low) & (position < limit) ? score : splat(-__builtin_inff());
    store(row + v * kLanes, score);
    best = max(score, best);
  }
  float now = std::max(top, highest(best)), decay = exp1(top - now);
  F32 weights = {};
  for (int v = 0; v < num_vectors; ++v) {
    F32 weight = exp(load(row + v * kLanes) - now);
    store(row + v * kLanes, weight);
    weights += weight;
  }
  top = now;
  total = total * decay + sum(weights);
  return decay;
}

template <int R, class V>
void attend_block(const Call& call, Workspace& work, int row, int start, int first, int last, const V* const* values) {
  int dim = call.dim;
  score_rows<R>(work.queries + size_t(row) * dim, work.transposed, dim, work.weights, last);
  float decay[R];
  for (int r = 0; r < R; ++r)
    decay[r] = soften(work.weights + r * kTile, (last + kLanes - 1) / kLanes, start, work.low[row + r],
                      work.limit[row + r], call.layer.softcap, work.part.highest[row + r], work.part.total[row + r]);
  weigh_rows<R>(work.weights, values, first, last, dim, decay, work.part.output + size_t(row) * dim);
}

// Keys start + first .. start + last for all rows that see some of them.
template <class V>
void attend_rows(const Call& call, const Item& item, Workspace& work, int start, int first, int last,
                 const V* const* values) {
  for (int row = 0; row < item.num_rows; row += kRowBlock) {
    int rows = std::min(kRowBlock, item.num_rows - row);
    if (work.limit[row + rows - 1] <= start + first || work.low[row] >= start + last) continue;
    switch (rows) {
      case 4: attend_block<4>(call, work, row, start, first, last, values); break;
      case 3: attend_block<3>(call, work, row, start, first, last, values); break;
      case 2: attend_block<2>(call, work, row, start, first, last, values); break;
      default: attend_block<1>(call, work, row, start, first, last, values);
    }
  }
}

template <class T>
void attend_tile(const Call& call, const Item& item, Workspace& work, int start, int first, int last) {
  const auto& [layer, batch, tensors, group, dim] = call;
  const int32_t* table = batch.block_table + item.request * batch.block_table_stride;
  const T *keys[kTile], *values[kTile];
  int block = (start + first) / layer.block_size, offset = (start + first) % layer.block_size;
  for (int k = first; k < last; ++block, offset = 0) {
    int64_t row = (int64_t(table[block]) * layer.num_kv_heads + item.kv_head) * layer.block_size;
    for (; k < last && offset < layer.block_size; ++k, ++offset) {
      keys[k] = static_cast<const T*>(tensors.keys) + (row + offset) * layer.head_size;
      values[k] = static_cast<const T*>(tensors.values) + (row + offset) * layer.head_size;
    }
  }
  transpose_keys(keys, first, last, layer.head_size, work.transposed);
  if (item.num_rows <= 2 * kRowBlock && layer.head_size == dim)
    return attend_rows(call, item, work, start, first, last, values);
  const float* widened[kTile];
  for (int k = first; k < last; ++k) {
    float* to = work.values + size_t(k) * dim;
    for (int d = 0; d < dim; d += kLanes) store(to + d, load_some(values[k] + d, layer.head_size - d));
    widened[k] = to;
  }
  attend_rows(call, item, work, start, first, last, widened);
}

// Everything that rows see of keys begin .. end, which are of one split, into work.part.
template <class T>
void attend_split(const Call& call, const Item& item, Workspace& work, int begin, int end) {
  work.part.clear(item.num_rows, call.dim);
  for (int start = begin / kTile * kTile; start < end; start += kTile)
    attend_tile<T>(call, item, work, start, std::max(begin - start, 0), std::min(end - start, kTile));
}

template <class Q, class T>
void run_item(const Call& call, const Item& item, float* partials) {
  Workspace work(call.dim);
  load_queries<Q>(call, item, work.queries);
  find_limits(call, item, work);
  int low = work.low[0], limit = work.limit[item.num_rows - 1];
  if (item.split >= 0) {
    work.part = Running::at(partials + item.partial, item.num_rows, call.dim);
    int begin = std::max(low, item.split * kSplit), end = std::min(limit, (item.split + 1) * kSplit);
    return attend_split<T>(call, item, work, begin, end);
  }
  work.whole.clear(item.num_rows, call.dim);
  for (int begin = low; begin < limit; begin = (begin / kSplit + 1) * kSplit) {
    attend_split<T>(call, item, work, begin, std::min(limit, (begin / kSplit + 1) * kSplit));
    merge(work.whole, work.part, item.num_rows, call.dim);
  }
  store_outputs<Q>(call, item, work.whole);
}

// The items of a call, and of those that share their rows with others where a new set of rows begins.
struct Plan {
  std::vector<Item> items;
  std::vector<int64_t> shared;  // first item of each set of rows that was split, then the end
  int64_t work = 0, partial_floats = 0;

  void make(const Call& call) {
    items.clear();
    shared.clear();
    work = partial_floats = 0;
    const auto& batch = call.batch;
    bool few = batch.num_reqs * call.layer.num_kv_heads < kItemsPerThread * num_threads() && num_threads() > 1;
    for (int request = 0; request < batch.num_reqs; ++request) {
      int tokens = batch.query_start_loc[request + 1] - batch.query_start_loc[request];
      int rows = tokens * call.group, length = batch.seq_lens[request];
      int context = length - tokens;
      int low = call.layer.window > 0 ? std::max(0, context + 1 - call.layer.window) : 0;
      work += int64_t(rows) * (length - low) * call.dim * call.layer.num_kv_heads;
      int splits = length > low ? (length - 1) / kSplit - low / kSplit + 1 : 0;
      bool split = few && rows <= kMaxRows && splits > 1;
      for (int head = 0; head < call.layer.num_kv_heads; ++head)
        if (split) add_splits(request, head, rows, low / kSplit, splits, call.dim);
        else add_tiles(request, head, rows);
    }
    if (!shared.empty()) shared.push_back(int64_t(items.size()));
  }

  void add_tiles(int request, int head, int rows) {  // the last, which sees most keys, first
    for (int tile = (rows - 1) / kMaxRows; rows > 0 && tile >= 0; --tile)
      items.push_back({request, head, tile * kMaxRows, std::min(kMaxRows, rows - tile * kMaxRows), -1, 0});
  }

  void add_splits(int request, int head, int rows, int first, int splits, int dim) {
    shared.push_back(int64_t(items.size()));
    for (int s = 0; s < splits; ++s) {
      items.push_back({request, head, 0, rows, first + s, partial_floats});
      partial_floats += Running::floats(rows, dim);
    }
  }
};

template <class Fn>
void for_each(int64_t count, bool in_parallel, const Fn& fn) {
  if (in_parallel) return parallel_for(count, fn);
  for (int64_t i = 0; i < count; ++i) fn(i);
}

template <class Q, class T>
void attend(const Call& call) {
  static thread_local Plan plan_of_thread;
  Plan& plan = plan_of_thread;
  plan.make(call);
  bool wide = plan.work > kInlineWork;
  auto* partials = static_cast<float*>(thread_scratch(kScratchPlan, plan.partial_floats * sizeof(float) + 64));
  for_each(int64_t(plan.items.size()), wide, [&](int64_t i) { run_item<Q, T>(call, plan.items[i], partials); });
  if (plan.shared.empty()) return;
  for (size_t set = 0; set + 1 < plan.shared.size(); ++set) {
    const Item& first = plan.items[plan.shared[set]];
    Workspace work(call.dim);
    work.whole.clear(first.num_rows, call.dim);
    for (int64_t i = plan.shared[set]; i < plan.shared[set + 1]; ++i) {
      if (plan.items[i].split < 0 || plan.items[i].request != first.request) break;
      merge(work.whole, Running::at(partials + plan.items[i].partial, first.num_rows, call.dim), first.num_rows,
            call.dim);
    }
    store_outputs<Q>(call, first, work.whole);
  }
}

// --- new keys and values ------------------------------------------------------------------------------------

template <class Q, class T>
void write_cache(const Call& call) {
  const auto& [layer, batch, tensors, group, dim] = call;
  int64_t size = layer.head_size;
  auto write = [&](const void* source, int64_t stride, void* half, int64_t token) {
    int64_t slot = batch.slot_mapping[token];
    if (slot < 0) return;  // padding
    int64_t row = slot / layer.block_size * layer.num_kv_heads * layer.block_size + slot % layer.block_size;
    for (int head = 0; head < layer.num_kv_heads; ++head) {
      const Q* from = static_cast<const Q*>(source) + token * stride + head * size;
      T* to = static_cast<T*>(half) + (row + int64_t(head) * layer.block_size) * size;
      for (int64_t d = 0; d < size; d += kLanes) store_some(to + d, load_some(from + d, size - d), size - d);
    }
  };
  parallel_ranges(batch.num_tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      write(tensors.key, tensors.key_stride, tensors.keys, token);
      write(tensors.value, tensors.value_stride, tensors.values, token);
    }
  });
}

template <class Q, class T>
int run(const Call& call) {
  write_cache<Q, T>(call);
  attend<Q, T>(call);
  return kOk;
}

template <class Q>
int run_with_cache(const Call& call) {
  switch (call.layer.cache_dtype) {
    case kF32: return run<Q, float>(call);
    case kBF16: return run<Q, bf16>(call);
    case kF16: return run<Q, f16>(call);
    default: return kUnsupported;
  }
}

}  // namespace
}  // namespace mv

MV_API int mv_paged_attention(const mv::AttentionLayer* layer, const mv::AttentionBatch* batch, const void* query,
                              int64_t query_stride, const void* key, int64_t key_stride, const void* value,
                              int64_t value_stride, void* keys, void* values, void* output) {
  using namespace mv;
  if (layer->num_kv_heads < 1 || layer->num_heads % layer->num_kv_heads) return kUnsupported;
  AttentionTensors tensors{query, key, value, query_stride, key_stride, value_stride, keys, values, output};
  int dim = (layer->head_size + kLanes - 1) / kLanes * kLanes;
  Call call{*layer, *batch, tensors, layer->num_heads / layer->num_kv_heads, dim};
  switch (layer->dtype) {
    case kF32: return run_with_cache<float>(call);
    case kBF16: return run_with_cache<bf16>(call);
    case kF16: return run_with_cache<f16>(call);
    default: return kUnsupported;
  }
}
