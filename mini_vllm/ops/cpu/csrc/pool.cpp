// See pool.h. A job is published by one 64-bit store: its epoch in the upper half, the next free item in the lower.
// A thread takes an item by a compare-and-swap on that word. The swap can only succeed while the job of that epoch has
// an untaken item, and the caller replaces a job's fields only after every item was taken and finished; so whoever
// succeeds has read the fields of the right job.
#include "pool.h"

#include "abi.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mv {
namespace {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// By time, not by count: one pause takes 10 to 140 cycles, depending on the processor.
using Clock = std::chrono::steady_clock;
constexpr auto kSpinTime = std::chrono::microseconds(60);
constexpr auto kCallerSpinTime = std::chrono::microseconds(15);  // then it lends its core: a worker may have lost its own
constexpr int kPausesPerLook = 16;                               // at the clock

// Waits until `done()`, at most for `limit`; returns whether it is.
template <class Done>
inline bool spin_until(const Done& done, Clock::duration limit) {
  if (done()) return true;
  for (auto end = Clock::now() + limit; Clock::now() < end;)
    for (int i = 0; i < kPausesPerLook; ++i) {
      relax();
      if (done()) return true;
    }
  return false;
}

class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: workers may outlive static destructors
    return *pool;
  }

  void resize(int count) {
    std::lock_guard<std::mutex> exclusive(busy_);
    if (count < 1) count = 1;
    if (count == threads_.load()) return;
    stop_workers();
    threads_ = count;
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { work(); });
  }

  int threads() const { return forked_ ? 1 : threads_.load(std::memory_order_relaxed); }

  void run(int64_t count, ItemFn fn, void* context) {
    if (count <= 0) return;
    if (forked_ || inside_ || workers_.empty() || count > kMaxItems || !busy_.try_lock()) {
      for (int64_t i = 0; i < count; ++i) fn(context, i);
      return;
    }
    inside_ = true;
    fn_.store(fn, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    count_.store(uint32_t(count), std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    uint32_t epoch = uint32_t(ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(uint64_t(epoch) << 32);  // sequentially consistent, as is the sleepers' check below
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    take_items();
    auto is_done = [&] { return done_.load(std::memory_order_acquire) == uint32_t(count); };
    if (!spin_until(is_done, kCallerSpinTime))
      while (!is_done()) std::this_thread::yield();
    inside_ = false;
    busy_.unlock();
  }

 private:
  static constexpr int64_t kMaxItems = int64_t(1) << 31;

  Pool() {
    pthread_atfork(nullptr, nullptr, [] { instance().forked_ = true; });
  }

  // What a thread has done it says once, when nothing is left: until then the job cannot be replaced.
  void take_items() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (uint32_t done = 0;;) {
      ItemFn fn = fn_.load(std::memory_order_relaxed);
      void* context = context_.load(std::memory_order_relaxed);
      uint32_t count = count_.load(std::memory_order_relaxed), index = uint32_t(ticket);
      if (index >= count) {
        if (done > 0) done_.fetch_add(done, std::memory_order_release);
        return;
      }
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      fn(context, index);
      ++done;
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void work() {
    inside_ = true;
    uint32_t seen = 0;
    while (!stopping_.load(std::memory_order_acquire)) {
      auto is_new = [&] { return uint32_t(ticket_.load(std::memory_order_acquire) >> 32) != seen; };
      if (!spin_until(is_new, kSpinTime)) sleep_until_after(seen);
      seen = uint32_t(ticket_.load(std::memory_order_acquire) >> 32);
      take_items();
    }
  }

  void sleep_until_after(uint32_t seen) {
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return uint32_t(ticket_.load() >> 32) != seen || stopping_.load(); });
    sleepers_.fetch_sub(1);
  }

  void stop_workers() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stopping_ = false;
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};
  std::atomic<ItemFn> fn_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<uint32_t> count_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<int> threads_{1};
  std::atomic<bool> stopping_{false};
  bool forked_ = false;
  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  static thread_local bool inside_;
};

thread_local bool Pool::inside_ = false;

struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

void set_num_threads(int count) { Pool::instance().resize(count); }
int num_threads() { return Pool::instance().threads(); }
void run_parallel(int64_t count, ItemFn fn, void* context) { Pool::instance().run(count, fn, context); }

void* thread_scratch(ScratchSlot slot, size_t bytes) {
  static thread_local Scratch slots[kScratchSlots];
  Scratch& scratch = slots[slot];
  if (scratch.bytes < bytes) {
    std::free(scratch.memory);
    scratch.bytes = (bytes + bytes / 2 + 4095) / 4096 * 4096;
    scratch.memory = std::aligned_alloc(4096, scratch.bytes);
    if (scratch.memory == nullptr) std::abort();  // a few megabytes at most: nothing could go on without them
  }
  return scratch.memory;
}

}  // namespace mv

MV_API int mv_abi_version() { return 1; }
MV_API void mv_set_num_threads(int count) { mv::set_num_threads(count); }
MV_API int mv_num_threads() { return mv::num_threads(); }

// Sum of 0 .. count - 1, each added by an item of its own: shows that the pool runs every item once.
MV_API int64_t mv_pool_probe(int64_t count) {
  std::atomic<int64_t> sum{0};
  mv::parallel_for(count, [&](int64_t i) { sum += i; });
  return sum;
}
