// How a call of attention is cut into work items; see attention.cpp for what an item is.
#pragma once
#include <algorithm>
#include <vector>

#include "attention.h"
#include "pool.h"

namespace mv {

constexpr int kSplit = 256;    // keys
constexpr int kMaxRows = 64;   // of an item
constexpr int64_t kItemsPerThread = 4;

struct Item {
  int32_t request, kv_head, first_row, num_rows;
  int32_t split;     // all of them if negative
  int64_t partial;   // where one split's result goes, in floats
};

// The items of a call, and of those that share their rows with others where a new set of rows begins.
struct Plan {
  std::vector<Item> items;
  std::vector<int64_t> shared;  // first item of each set of rows that was split, then one past the last
  int64_t work = 0, partial_floats = 0;

  // floats_per_row: of the result of a split.
  void make(const AttentionLayer& layer, const AttentionBatch& batch, int64_t floats_per_row) {
    items.clear();
    shared.clear();
    partial_floats = 0;
    work = 0;
    for (int request = 0; request < batch.num_reqs; ++request) work += Request(layer, batch, request).cost();
    int64_t mean = batch.num_reqs > 0 ? work / batch.num_reqs : 0;
    // Items wait for each other at the end of the call, so those of long requests come first, and one that would be a
    // large part of a thread's share is cut.
    int64_t most = num_threads() > 1 ? work * layer.num_kv_heads / (num_threads() * kItemsPerThread) : work;
    for (bool heavy : {true, false})
      for (int request = 0; request < batch.num_reqs; ++request) {
        Request shape(layer, batch, request);
        if (shape.rows > 0 && (shape.cost() > mean) == heavy) add(layer, request, shape, most, floats_per_row);
      }
    if (!shared.empty()) shared.push_back(int64_t(items.size()));
  }

 private:
  struct Request {
    int rows, length, low;
    Request(const AttentionLayer& layer, const AttentionBatch& batch, int request) {
      int tokens = batch.query_start_loc[request + 1] - batch.query_start_loc[request];
      rows = tokens * (layer.num_heads / layer.num_kv_heads);
      length = batch.seq_lens[request];
      low = layer.window > 0 ? std::max(0, length - tokens + 1 - layer.window) : 0;
    }
    int64_t cost() const { return int64_t(rows) * std::max(length - low, 0); }  // of one KV head
    int num_splits() const { return length > low ? (length - 1) / kSplit - low / kSplit + 1 : 0; }
  };

  void add(const AttentionLayer& layer, int request, const Request& shape, int64_t most, int64_t floats_per_row) {
    int splits = shape.num_splits();
    bool split = shape.cost() > most && shape.rows <= kMaxRows && splits > 1;
    for (int head = 0; head < layer.num_kv_heads; ++head)
      if (split) add_splits(request, head, shape.rows, shape.low / kSplit, splits, floats_per_row);
      else add_tiles(request, head, shape.rows);
  }

  void add_tiles(int request, int head, int rows) {  // the last, which sees most keys, first
    for (int tile = (rows - 1) / kMaxRows; tile >= 0; --tile)
      items.push_back({request, head, tile * kMaxRows, std::min(kMaxRows, rows - tile * kMaxRows), -1, 0});
  }

  void add_splits(int request, int head, int rows, int first, int splits, int64_t floats_per_row) {
    shared.push_back(int64_t(items.size()));
    for (int s = 0; s < splits; ++s) {
      items.push_back({request, head, 0, rows, first + s, partial_floats});
      partial_floats += rows * floats_per_row;
    }
  }
};

}  // namespace mv
