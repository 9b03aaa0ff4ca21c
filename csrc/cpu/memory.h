// Results of ops bound by memory. The operating system hands out fresh memory page by page, zeroed; with pages of 4 KiB
// that alone takes longer than the op. Large results ask for huge pages, and threads that would meet in one, and each
// zero it, first take turns to touch them all.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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

// Uninitialised [num_rows] of the dtype in which `like` is accumulated. Not by new_empty: the dispatcher looks it up by
// name.
inline torch::stable::Tensor fresh_rows(const torch::stable::Tensor& like, int64_t num_rows) {
  const bool wide = acc_dtype(like.scalar_type()) == ScalarType::Double;
  const int32_t dtype = wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const int64_t stride = 1;
  AtenTensorHandle rows;
  const AOTITorchError error =
      aoti_torch_empty_strided(1, &num_rows, &stride, dtype, aoti_torch_device_type_cpu(), 0, &rows);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "no memory for ", num_rows, " rows");
  return in_huge_pages(torch::stable::Tensor(rows));
}

}  // namespace qrm_fast
