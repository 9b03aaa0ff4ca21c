// Loops over units of work on torch's threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "../tensors.h"

namespace qrm_fast {

// A thread takes at least `grain` of the units at a time.
template <typename F>
void parallel(int64_t count, int64_t grain, F f) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}
template <typename F>
void parallel(int64_t count, F f) {
  parallel(count, 1, f);
}

inline int64_t max_workers(int64_t count) { return std::min<int64_t>(count, torch::stable::get_num_threads()); }

// Runs `worker(thread, next)` on at most max_workers(count) threads, where next() is the next of `count` units or
// `count` when none is left. Which thread gets which must not matter to the results.
template <typename F>
void parallel_workers(int64_t count, F worker) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] { return std::min(taken.fetch_add(1), count); };
  parallel(max_workers(count), [&](int64_t thread) { worker(thread, next); });
}

}  // namespace qrm_fast
