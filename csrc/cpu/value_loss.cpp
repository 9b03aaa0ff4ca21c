// Squared error of a critic and its derivative in one pass over the rows: 12 bytes per token in fp32, 20 with clip and
// weights. Terms are in double, a token per lane, and rounded once. Sums run over fixed lanes of fixed blocks of rows
// and are combined in order: their bits do not depend on the number of threads.

#include <algorithm>
#include <vector>

#include "../dtypes.h"
#include "../indices.h"
#include "memory.h"
#include "simd/lanes.h"

namespace qrm_fast {
namespace {

constexpr int64_t kBlock = 4096;

template <typename T>
struct Rows {
  const T* values;
  const acc_t<T>* returns;
  const T* old_values;  // null without clip
  const acc_t<T>* token_weights;
  acc_t<T> mean_weight;
  double clip;
  acc_t<T>* derivative;
};

// Sum over the rows [begin, end).
template <int Bytes, typename T>
QRM_FAST_INLINE double value_rows(const Rows<T>& rows, int64_t begin, int64_t end) {
  using L = Lanes<Bytes>;
  using V = typename L::Vec;
  acc_t<T> mean_weights[L::kLanes];
  std::fill_n(mean_weights, L::kLanes, rows.mean_weight);
  V sum = {};
  const auto add = [&](int64_t t, int64_t count) __attribute__((always_inline)) {
    const V weight = L::load_first(rows.token_weights ? rows.token_weights + t : mean_weights, count);
    const V value = L::load_first(rows.values + t, count), target = L::load_first(rows.returns + t, count);
    const V error = value - target;
    V loss = error * error, slope = 2 * error;
    if (rows.old_values) {
      const V old = L::load_first(rows.old_values + t, count), low = old - rows.clip, high = old + rows.clip;
      // where one is NaN it stays
      const V clipped = L::where_less(low, value, L::where_less(high, value, high, value), low) - target;
      const V clipped_loss = clipped * clipped, larger = L::where_less(loss, clipped_loss, clipped_loss, loss);
      slope = L::where_less(loss, clipped_loss, V{}, slope);
      loss = L::where_equal(clipped_loss, clipped_loss, larger, clipped_loss);
    }
    L::store_first(rows.derivative + t, count, L::where_equal(weight, V{}, V{}, weight * slope));
    sum += L::where_equal(weight, V{}, V{}, weight * loss);
  };
  int64_t t = begin;
  for (; t + L::kLanes <= end; t += L::kLanes) add(t, L::kLanes);  // whose loads have a fixed size
  if (t < end) add(t, end - t);
  return L::sum(sum);
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
        data<T>(values),
        data<A>(returns),
        data_or_null<T>(old_values),
        data_or_null<A>(token_weights),
        static_cast<A>(1.0 / num_tokens),
        clip,
        mutable_data<A>(derivative),
    };
    static const auto sum_rows = widest([](auto bytes) { return Compiled<bytes, value_rows<bytes, T>>::run; });
    std::vector<double> blocks(ceil_div(num_tokens, kBlock));
    parallel(blocks.size(), 4,
             [&](int64_t i) { blocks[i] = sum_rows(rows, i * kBlock, std::min((i + 1) * kBlock, num_tokens)); });
    double sum = 0;
    for (double block : blocks) sum += block;
    *mutable_data<A>(loss) = static_cast<A>(sum);
  });
  return {loss, derivative};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("value_loss", TORCH_BOX(&qrm_fast::value_loss)); }
