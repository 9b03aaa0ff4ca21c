// Results of ops bound by memory. The operating system hands out fresh memory page by page, zeroed; with pages of 4 KiB
// that alone takes longer than the op. Large results ask for huge pages, and threads that would meet in one, and each
// zero it, first take turns to touch them all.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dtypes.h"

namespace qrm_fast {

// The same tensor, uninitialised before and after, with its memory handed out.
inline torch::stable::Tensor in_huge_pages(torch::stable::Tensor fresh) {
#if defined(__linux__)
  constexpr int64_t kPage = 4096, kHugePage = 2 << 20;
  const int64_t address = reinterpret_cast<int64_t>(fresh.data_ptr());
  const int64_t begin = (address + kPage - 1) / kPage * kPage;
  const int64_t num_bytes = (address + fresh.numel() * int64_t(fresh.element_size()) - begin) / kPage * kPage;
  if (num_bytes >= 2 * kHugePage) {
    madvise(reinterpret_cast<void*>(begin), num_bytes, MADV_HUGEPAGE);  // a hint, which the system may decline
    const auto touch = [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        __atomic_fetch_or(reinterpret_cast<char*>(begin + i * kHugePage), 0, __ATOMIC_RELAXED);
      }
    };
    torch::stable::parallel_for(0, (num_bytes + kHugePage - 1) / kHugePage, 1, touch);
  }
#endif
  return fresh;
}

// Uninitialised [num_rows] of the dtype in which `like` is accumulated.
inline torch::stable::Tensor fresh_rows(const torch::stable::Tensor& like, int64_t num_rows) {
  return in_huge_pages(torch::stable::new_empty(like, {num_rows}, acc_dtype(like.scalar_type())));
}

}  // namespace qrm_fast
