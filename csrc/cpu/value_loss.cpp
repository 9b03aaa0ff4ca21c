// Squared error of a critic and its derivative in one pass over the rows: 12 bytes per token in fp32, 20 with clip and
// weights. Sums run in double over fixed blocks of rows, split over fixed lanes, and are combined in order: their bits
// do not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "dtypes.h"
#include "fresh_rows.h"
#include "target_clones.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 4096;
constexpr int64_t kLanes = 16;

template <typename T>
struct Rows {
  const T* values;
  const acc_t<T>* returns;
  const T* old_values;  // null without clip
  const acc_t<T>* token_weights;
  acc_t<T> mean_weight;
  acc_t<T> clip;
  acc_t<T>* derivative;
};

// Rows [begin, begin + count), count <= kLanes: adds each to its lane. Inlined with its two flags known, it vectorises.
template <bool kClip, bool kWeights, typename T>
[[gnu::always_inline]] inline void add_rows(const Rows<T>& rows, int64_t begin, int64_t count, double* lanes) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = begin + i;
    const A value = rows.values[t], target = rows.returns[t];
    const A weight = kWeights ? rows.token_weights[t] : rows.mean_weight;
    const A error = value - target;
    A loss = error * error, slope = 2 * error;
    if (kClip) {
      const A old = rows.old_values[t], low = old - rows.clip, high = old + rows.clip;
      const A clipped = (!(value >= low) ? low : value > high ? high : value) - target;
      const A clipped_loss = clipped * clipped;
      slope = loss < clipped_loss ? A(0) : slope;
      loss = clipped_loss <= loss || loss != loss ? loss : clipped_loss;  // a NaN of either stays
    }
    const bool keep = weight != 0;
    rows.derivative[t] = keep ? weight * slope : A(0);
    lanes[i] += keep ? double(weight) * double(loss) : 0.0;
  }
}

template <bool kClip, bool kWeights, typename T>
QRM_FAST_TARGET_CLONES double block_sum(const Rows<T>& rows, int64_t begin, int64_t end) {
  double lanes[kLanes] = {};
  for (; begin + kLanes <= end; begin += kLanes) add_rows<kClip, kWeights>(rows, begin, kLanes, lanes);
  add_rows<kClip, kWeights>(rows, begin, end - begin, lanes);
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

std::tuple<Tensor, Tensor> value_loss(const Tensor& values, const Tensor& returns,
                                      const std::optional<Tensor>& old_values,
                                      const std::optional<Tensor>& token_weights, double clip) {
  const int64_t num_tokens = values.size(0);
  Tensor loss = torch::stable::new_empty(returns, {});
  Tensor derivative = fresh_rows(returns, num_tokens);
  dispatch_floating(values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Rows<T> rows{
        static_cast<const T*>(values.const_data_ptr()),
        static_cast<const A*>(returns.const_data_ptr()),
        data_or_null<T>(old_values),
        data_or_null<A>(token_weights),
        static_cast<A>(1.0 / num_tokens),
        static_cast<A>(clip),
        static_cast<A*>(derivative.mutable_data_ptr()),
    };
    const auto sum_block = rows.old_values ? rows.token_weights ? block_sum<true, true, T> : block_sum<true, false, T>
                           : rows.token_weights ? block_sum<false, true, T>
                                                : block_sum<false, false, T>;
    std::vector<double> blocks((num_tokens + kBlock - 1) / kBlock);
    torch::stable::parallel_for(0, blocks.size(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        blocks[i] = sum_block(rows, i * kBlock, std::min((i + 1) * kBlock, num_tokens));
      }
    });
    double sum = 0;
    for (double block : blocks) sum += block;
    *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(sum);
  });
  return {loss, derivative};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("value_loss", TORCH_BOX(&qrm_fast::value_loss)); }
