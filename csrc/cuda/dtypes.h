// Floating dtypes of CUDA kernels, which accumulate in float: the public functions refuse float64 there.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <optional>

namespace qrm_fast {

using torch::headeronly::ScalarType;

// Calls f(T{}) with the C++ type T of `dtype`.
template <typename F>
auto dispatch_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "the public function admits only floating dtypes other than float64");
  }
}

// Data of an optional tensor, or nullptr.
template <typename T>
const T* data_or_null(const std::optional<torch::stable::Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

}  // namespace qrm_fast
