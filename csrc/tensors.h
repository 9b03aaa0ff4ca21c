// What the file of every op starts with: tensors of the stable ABI, their data, and registration.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

namespace qrm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Of an optional tensor, or nullptr.
template <typename T>
const T* data_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? data<T>(*x) : nullptr;
}

}  // namespace qrm_fast
