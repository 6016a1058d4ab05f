// Attention over a paged KV cache, read in place through the block table: decode and chunked prefill alike.
//
// Shapes, all owned by the caller: query [N, Hq, D] and key, value [N, Hkv, D], heads dense, tokens at a stride;
// output [N, Hq, D] dense; the cache as in attention_cache.h. Request r has tokens query_start_loc[r] ..
// query_start_loc[r + 1], the last of its seq_lens[r]; position p lies in block block_table[r][p / block_size]. New keys
// and values are written first (not those whose slot is negative), then every query attends. A request of length 0 has
// no keys, so its tokens, if there are any, get zeros.
//
// A work item is a tile of rows (queries: tokens x the query heads that share a KV head) and walks the keys in tiles
// of kTile with an online softmax in float32. Tiles lie at multiples of kTile and every kSplit keys the running result
// is set aside and merged in order; so a row's sum is built the same way whether its splits are done by one item or, in
// a decode with few heads and long contexts, by several threads (Flash-Decoding). No key outside the request's own
// positions low .. limit is ever read.
#include "attention.h"

#include "attention_plan.h"
#include "attention_softmax.h"
#include "attention_write.h"

namespace mv {
namespace {

constexpr int64_t kInlineWork = 64 * 1024;  // multiply-adds that take less time than waking a thread
constexpr int kDirectRows = 2 * kRowBlock;  // that values are widened for as often as they are used
static_assert(kSplit % kTile == 0, "a tile belongs to one split");

struct Call {
  const AttentionLayer& layer;
  const AttentionBatch& batch;
  const AttentionTensors& tensors;
  int group, dim;  // query heads to a KV head; head_size padded to whole vectors
};

// Runs fn with a null pointer of the element type that `code` names.
template <class Fn>
MV_INLINE void with_type(int code, const Fn& fn) {
  if (code == kF32) fn(static_cast<float*>(nullptr));
  else if (code == kBF16) fn(static_cast<bf16*>(nullptr));
  else fn(static_cast<f16*>(nullptr));
}

// What one thread works in.
struct Workspace {
  float *queries, *transposed, *values;
  Running part, whole;
  alignas(64) float weights[std::max(kRowBlock, kFewRows) * kTile];
  int32_t low[kMaxRows], limit[kMaxRows];  // positions that a row sees

  explicit Workspace(int dim) {
    size_t rows = size_t(kMaxRows) * dim, tile = size_t(kTile) * dim, keys = size_t(kTile) * (dim + 4 * kLanes);
    size_t running = size_t(kMaxRows * Running::floats_per_row(dim) + 15) / 16 * 16;
    auto* memory = static_cast<float*>(
        thread_scratch(kScratchAttention, (rows + keys + tile + 2 * running) * sizeof(float)));
    queries = memory;
    transposed = queries + rows;
    values = transposed + keys;
    part = Running::at(values + tile, kMaxRows, dim);
    whole = Running::at(values + tile + running, kMaxRows, dim);
  }
};

void load_queries(const Call& call, const Item& item, float* queries) {
  const auto& [layer, batch, tensors, group, dim] = call;
  int64_t start = batch.query_start_loc[item.request], size = layer.head_size;
  float factor = layer.softcap > 0 ? layer.scale / layer.softcap : layer.scale * kLog2e;
  with_type(layer.dtype, [&, &tensors = tensors, &group = group, &dim = dim](auto* type) {
    auto* all = static_cast<const std::remove_pointer_t<decltype(type)>*>(tensors.query);
    for (int r = 0; r < item.num_rows; ++r) {
      int row = item.first_row + r, head = item.kv_head * group + row % group;
      auto* from = all + (start + row / group) * tensors.query_stride + head * size;
      for (int d = 0; d < dim; d += kLanes) store(queries + r * dim + d, load_some(from + d, size - d) * factor);
    }
  });
}

void store_outputs(const Call& call, const Item& item, const Running& done) {
  const auto& [layer, batch, tensors, group, dim] = call;
  int64_t start = batch.query_start_loc[item.request], size = layer.head_size;
  with_type(layer.dtype, [&, &layer = layer, &tensors = tensors, &group = group, &dim = dim](auto* type) {
    auto* all = static_cast<decltype(type)>(tensors.output);
    for (int r = 0; r < item.num_rows; ++r) {
      int row = item.first_row + r, head = item.kv_head * group + row % group;
      auto* to = all + ((start + row / group) * layer.num_heads + head) * size;
      float inverse = 1.0f / sum(load(done.total + r * kLanes));
      for (int d = 0; d < dim; d += kLanes) store_some(to + d, load(done.output + r * dim + d) * inverse, size - d);
    }
  });
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

// Where keys start + first .. start + last of a request are.
template <class T>
struct Tile {
  const T *keys[kTile], *values[kTile];
  alignas(64) float key_scales[kTile], value_scales[kTile];  // only if kScaled<T>
  int start, first, last;

  void find(const Call& call, const Item& item, int begin, int end) {
    const auto& [layer, batch, tensors, group, dim] = call;
    const int32_t* table = batch.block_table + item.request * batch.block_table_stride;
    start = begin / kTile * kTile, first = begin - start, last = std::min(end - start, kTile);
    int block = begin / layer.block_size, offset = begin % layer.block_size;
    for (int k = first; k < last; ++block, offset = 0) {
      auto key_page = page_of<T>(layer, tensors.keys, table[block], item.kv_head);
      auto value_page = page_of<T>(layer, tensors.values, table[block], item.kv_head);
      for (; k < last && offset < layer.block_size; ++k, ++offset) {
        keys[k] = key_page.rows + offset * int64_t(layer.head_size);
        values[k] = value_page.rows + offset * int64_t(layer.head_size);
        if (!kScaled<T>) continue;
        key_scales[k] = key_page.scales[offset];
        value_scales[k] = value_page.scales[offset];
      }
    }
  }
};

template <int R, class Rows>
void attend_block(const Call& call, Workspace& work, int row, Softening how, int first, int last, Rows values) {
  int dim = call.dim;
  float decay[R];
  score_rows<R>(work.queries + size_t(row) * dim, dim, work.transposed, call.layer.head_size, work.weights,
                how.num_vectors);
  how.low += row, how.limit += row;
  soften_rows<R>(how, work.weights, work.part.highest + row, work.part.total + row * kLanes, decay);
  weigh_rows<R>(work.weights, values, first, last, dim, decay, work.part.output + size_t(row) * dim);
}

// Keys start + first .. start + last for all rows that see some of them, in blocks of about as many rows.
template <class Rows>
void attend_rows(const Call& call, const Item& item, Workspace& work, Softening how, int first, int last, Rows values) {
  int blocks = item.num_rows <= kFewRows ? 1 : (item.num_rows + kRowBlock - 1) / kRowBlock;
  for (int row = 0, rows; row < item.num_rows; row += rows, --blocks) {
    rows = (item.num_rows - row + blocks - 1) / blocks;
    int low = work.low[row], limit = work.limit[row + rows - 1], to = std::min(last, limit - how.start);
    if (to <= first || low >= how.start + last) continue;
    how.num_vectors = (to + kLanes - 1) / kLanes;
    how.masked = first > 0 || to % kLanes != 0 || work.low[row + rows - 1] > how.start || work.limit[row] - how.start < to;
    switch (rows) {
      case 8: attend_block<kFewRows>(call, work, row, how, first, to, values); break;
      case 7: attend_block<std::min(7, kFewRows)>(call, work, row, how, first, to, values); break;
      case 6: attend_block<6>(call, work, row, how, first, to, values); break;
      case 5: attend_block<5>(call, work, row, how, first, to, values); break;
      case 4: attend_block<4>(call, work, row, how, first, to, values); break;
      case 3: attend_block<3>(call, work, row, how, first, to, values); break;
      case 2: attend_block<2>(call, work, row, how, first, to, values); break;
      default: attend_block<1>(call, work, row, how, first, to, values);
    }
  }
}

template <class T>
void attend_tile(const Call& call, const Item& item, Workspace& work, const Tile<T>& tile, const Tile<T>* next) {
  int dim = call.dim, size = call.layer.head_size;
  bool few = item.num_rows <= kDirectRows;
  transpose_keys(tile.keys, tile.first, tile.last, size, work.transposed, few ? tile.values : nullptr,
                 few && next && next->first == 0 && next->last >= tile.last ? next->keys : nullptr);
  float cap = call.layer.softcap * kLog2e;
  Softening how{tile.start, 0, true, work.low, work.limit, cap, nullptr, nullptr};
  if (kScaled<T>) how.key_scales = tile.key_scales, how.value_scales = tile.value_scales;
  if (few && size == dim)
    return attend_rows(call, item, work, how, tile.first, tile.last, ScatteredRows<T>{tile.values});
  for (int k = tile.first; k < tile.last; ++k)
    for (int d = 0; d < dim; d += kLanes)
      store(work.values + size_t(k) * dim + d, load_some(tile.values[k] + d, size - d));
  attend_rows(call, item, work, how, tile.first, tile.last, DenseRows{work.values, dim});
}

// Everything that rows see of keys begin .. end: what is of one split into work.part, and then into work.whole.
template <class T>
void walk(const Call& call, const Item& item, Workspace& work, int begin, int end) {
  Tile<T> tiles[2];
  int number = 0;
  if (begin < end) tiles[0].find(call, item, begin, end);
  work.part.clear(item.num_rows, call.dim);
  for (int start = begin / kTile * kTile; start < end; start += kTile, number ^= 1) {
    bool more = start + kTile < end;
    if (more) tiles[number ^ 1].find(call, item, start + kTile, end);
    attend_tile(call, item, work, tiles[number], more ? &tiles[number ^ 1] : nullptr);
    if (item.split >= 0 || (more && (start + kTile) % kSplit)) continue;
    merge(work.whole, work.part, item.num_rows, call.dim);
    work.part.clear(item.num_rows, call.dim);
  }
}

template <class T>
void run_item(const Call& call, const Item& item, float* partials) {
  Workspace work(call.dim);
  load_queries(call, item, work.queries);
  find_limits(call, item, work);
  int low = work.low[0], limit = work.limit[item.num_rows - 1];
  if (item.split >= 0) {
    work.part = Running::at(partials + item.partial, item.num_rows, call.dim);
    int begin = std::max(low, item.split * kSplit), end = std::min(limit, (item.split + 1) * kSplit);
    return walk<T>(call, item, work, begin, end);
  }
  work.whole.clear(item.num_rows, call.dim);
  if (call.batch.seq_lens[item.request] > 0) walk<T>(call, item, work, low, limit);
  else std::fill_n(work.whole.total, item.num_rows * kLanes, 1.0f);
  store_outputs(call, item, work.whole);
}

// The results of splits, in order.
void merge_splits(const Call& call, const Plan& plan, float* partials) {
  for (size_t set = 0; set + 1 < plan.shared.size(); ++set) {
    const Item& first = plan.items[plan.shared[set]];
    Workspace work(call.dim);
    work.whole.clear(first.num_rows, call.dim);
    for (int64_t i = plan.shared[set]; i < plan.shared[set + 1] && plan.items[i].split >= 0; ++i)
      merge(work.whole, Running::at(partials + plan.items[i].partial, first.num_rows, call.dim), first.num_rows,
            call.dim);
    store_outputs(call, first, work.whole);
  }
}

template <class T>
void attend(const Call& call) {
  static thread_local Plan plan_of_thread;
  Plan& plan = plan_of_thread;
  plan.make(call.layer, call.batch, Running::floats_per_row(call.dim));
  auto* partials = static_cast<float*>(thread_scratch(kScratchPlan, plan.partial_floats * sizeof(float) + 64));
  auto run = [&](int64_t i) { run_item<T>(call, plan.items[i], partials); };
  int64_t count = int64_t(plan.items.size());
  if (plan.work * call.layer.num_kv_heads * call.dim > kInlineWork) parallel_for(count, run);
  else for (int64_t i = 0; i < count; ++i) run(i);
  merge_splits(call, plan, partials);
}

template <class T>
int run(const Call& call) {
  with_type(call.layer.dtype, [&](auto* type) {
    write_cache<std::remove_pointer_t<decltype(type)>, T>(call.layer, call.batch, call.tensors);
  });
  attend<T>(call);
  return kOk;
}

}  // namespace
}  // namespace mv

MV_API int mv_paged_attention(const mv::AttentionLayer* layer, const mv::AttentionBatch* batch, const void* query,
                              int64_t query_stride, const void* key, int64_t key_stride, const void* value,
                              int64_t value_stride, void* keys, void* values, void* output) {
  using namespace mv;
  if (layer->num_kv_heads < 1 || layer->num_heads % layer->num_kv_heads) return kUnsupported;
  if (layer->dtype < kF32 || layer->dtype > kF16) return kUnsupported;
  AttentionTensors tensors{query, key, value, query_stride, key_stride, value_stride, keys, values, output};
  int dim = (layer->head_size + kLanes - 1) / kLanes * kLanes;
  Call call{*layer, *batch, tensors, layer->num_heads / layer->num_kv_heads, dim};
  switch (layer->cache_dtype) {
    case kF32: return run<float>(call);
    case kBF16: return run<bf16>(call);
    case kF16: return run<f16>(call);
    case kInt8PerTokenHead: return layer->head_size % 4 ? int(kUnsupported) : run<i8>(call);
    default: return kUnsupported;
  }
}
