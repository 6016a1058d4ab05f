// The process's one pool of threads. parallel_for(n, fn) calls fn(i) once for each i in [0, n) on the calling thread
// and the workers, and returns when all calls have. Which thread takes which item is decided while it runs, so items
// should be of similar cost, or the heavy ones first; results must not depend on it.
//
// A worker that sleeps through a job costs nothing: the caller waits only for items somebody took. Workers spin for a
// few dozen microseconds (by the clock) after a job, since the next one is usually close, then sleep. A call while
// another thread uses the pool, from inside an item, or in a child made by fork() (where the workers do not exist) runs
// its items on the calling thread alone.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace mv {

using ItemFn = void (*)(void* context, int64_t index);

void set_num_threads(int count);
int num_threads();
void run_parallel(int64_t count, ItemFn fn, void* context);

template <class Fn>
inline void parallel_for(int64_t count, Fn&& fn) {
  using Callable = std::remove_reference_t<Fn>;
  if (count == 1) return fn(int64_t(0));
  run_parallel(
      count, [](void* context, int64_t index) { (*static_cast<Callable*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

// Splits [0, count) into ranges of at least `grain` (a multiple of it), a few for each thread; fn(begin, end).
template <class Fn>
inline void parallel_ranges(int64_t count, int64_t grain, Fn&& fn) {
  if (count <= 0) return;
  int64_t pieces = (count + grain - 1) / grain;
  int64_t most = int64_t(num_threads()) * 4;
  if (pieces > most) {
    int64_t grains = (pieces + most - 1) / most;
    grain *= grains;
    pieces = (count + grain - 1) / grain;
  }
  parallel_for(pieces, [&](int64_t i) { fn(i * grain, (i + 1) * grain < count ? (i + 1) * grain : count); });
}

// Memory of the calling thread, 64-byte aligned, kept and grown; valid until the thread asks the same slot again.
// Slots keep kernels apart that may be active in one thread at once.
enum ScratchSlot { kScratchAttention, kScratchPlan, kScratchGemm, kScratchQuant, kScratchSampling, kScratchSlots };
void* thread_scratch(ScratchSlot slot, size_t bytes);

}  // namespace mv
