// Results of ops bound by memory. Fresh memory arrives page by page from the operating system, and with pages of 4 KiB
// that alone takes longer than the op: large results ask for huge pages.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dtypes.h"

namespace qrm_fast {

// Uninitialised [num_rows] of the dtype in which `like` is accumulated.
inline torch::stable::Tensor fresh_rows(const torch::stable::Tensor& like, int64_t num_rows) {
  torch::stable::Tensor rows = torch::stable::new_empty(like, {num_rows}, acc_dtype(like.scalar_type()));
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096, kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(rows.data_ptr()) + kPage - 1) / kPage * kPage;
  const uintptr_t end = begin + num_rows * rows.element_size() / kPage * kPage;
  // A hint: where the system declines, the pages are small.
  if (end - begin >= 2 * kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin - kPage, MADV_HUGEPAGE);
#endif
  return rows;
}

}  // namespace qrm_fast
