// Floating dtypes: what a kernel reads (T), what it accumulates and returns (acc_t<T>: float, or double for double).
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "tensors.h"

namespace qrm_fast {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType acc_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(T{}) with the C++ type T of `dtype`.
template <typename F>
auto dispatch_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "the public function admits only floating dtypes");
  }
}

}  // namespace qrm_fast
