// Memory in huge pages. The operating system hands out fresh memory page by page, zeroed; with pages of 4 KiB that
// alone takes longer than an op that is bound by memory.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../dtypes.h"
#include "../indices.h"
#include "parallel.h"
#include "simd/simd.h"

namespace qrm_fast {

inline constexpr int64_t kPageBytes = 4096, kHugePageBytes = 2 << 20;

// A hint, which the system may decline. Whole pages of 4 KiB only.
inline void ask_for_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t num_bytes) {
#if defined(__linux__)
  madvise(begin, num_bytes, MADV_HUGEPAGE);
#endif
}

// The same tensor, uninitialised before and after, with its memory handed out. Threads that meet in a huge page would
// each zero it, so they first take turns to touch them all.
inline Tensor in_huge_pages(Tensor fresh) {
  const int64_t address = reinterpret_cast<int64_t>(fresh.data_ptr()), begin = round_up(address, kPageBytes);
  const int64_t num_bytes = (address + fresh.numel() * int64_t(fresh.element_size()) - begin) / kPageBytes * kPageBytes;
  if (num_bytes < 2 * kHugePageBytes) return fresh;
  ask_for_huge_pages(reinterpret_cast<void*>(begin), num_bytes);
  parallel(ceil_div(num_bytes, kHugePageBytes), [&](int64_t i) {
    __atomic_fetch_or(reinterpret_cast<char*>(begin + i * kHugePageBytes), 0, __ATOMIC_RELAXED);
  });
  return fresh;
}

// Uninitialised [num_rows] of the dtype in which `like` is accumulated. Not by new_empty: the dispatcher looks it up by
// name.
inline Tensor fresh_rows(const Tensor& like, int64_t num_rows) {
  const bool wide = acc_dtype(like.scalar_type()) == ScalarType::Double;
  const int32_t dtype = wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const int64_t stride = 1;
  AtenTensorHandle rows;
  const AOTITorchError error =
      aoti_torch_empty_strided(1, &num_rows, &stride, dtype, aoti_torch_device_type_cpu(), 0, &rows);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "no memory for ", num_rows, " rows");
  return in_huge_pages(Tensor(rows));
}

// Uninitialised arrays in one allocation. Panels in pages scattered over the sets of L2 would not stay there.
template <typename S>
class Scratch {
 public:
  explicit Scratch(std::initializer_list<int64_t> counts) {
    int64_t total = 0;
    for (int64_t count : counts) {
      starts_.push_back(total);
      total += round_up(count, kLineBytes / sizeof(S));
    }
    const int64_t num_bytes = std::max<int64_t>(total, 1) * sizeof(S);
    const bool huge = num_bytes >= kHugePageBytes;
    data_.get_deleter().align = std::align_val_t(huge ? kHugePageBytes : kLineBytes);
    data_.reset(static_cast<S*>(::operator new(num_bytes, data_.get_deleter().align)));
    if (huge) ask_for_huge_pages(data_.get(), num_bytes / kHugePageBytes * kHugePageBytes);
  }
  explicit Scratch(int64_t count) : Scratch({count}) {}

  S* get() const { return data_.get(); }
  S* operator[](int i) const { return data_.get() + starts_[i]; }

 private:
  struct Delete {
    std::align_val_t align{64};
    void operator()(S* p) const { ::operator delete(p, align); }
  };
  std::unique_ptr<S, Delete> data_;
  std::vector<int64_t> starts_;
};

}  // namespace qrm_fast
