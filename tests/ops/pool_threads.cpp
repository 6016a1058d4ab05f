// The thread pool on its own, to be compiled with -fsanitize=thread: callers in several threads, plain writes that only
// the pool's promises keep apart, pauses long enough for workers to fall asleep, and changes of the number of threads.
#include "pool.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

void fill_and_sum(int64_t count) {
  std::vector<int64_t> items(count, 0);
  mv::parallel_for(count, [&](int64_t i) { items[i] += i; });  // not atomic: one thread an item, once
  int64_t sum = 0;
  for (int64_t item : items) sum += item;                      // not atomic: after the last item
  require(sum == count * (count - 1) / 2, "every item runs once, before the call returns");
}

void call_many(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    fill_and_sum(1 + round % 40);
    if (round % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
  }
}

}  // namespace

int main() {
  for (int threads : {1, 2, 4, 3}) {
    mv::set_num_threads(threads);
    require(mv::num_threads() == threads, "the number of threads");
    call_many(500);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) callers.emplace_back([] { call_many(200); });
    for (auto& caller : callers) caller.join();
  }
  mv::set_num_threads(1);
  std::puts("the pool: no race found");
}
