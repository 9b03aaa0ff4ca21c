// merge_logprobs: softmax statistics of R shards of a vocabulary into log-probability, entropy and log-partition. Reads
// 16 R bytes per row in fp32 and writes 12; shards are merged in their order.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "head/fold.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> merge_logprobs(const Tensor& max, const Tensor& sumexp, const Tensor& sum_z_exp,
                                                  const Tensor& target_logit) {
  const int64_t num_shards = max.size(0), num_rows = max.size(1);
  Tensor outputs[3];
  for (Tensor& x : outputs) x = torch::stable::new_empty(max, {num_rows});
  std::vector<int64_t> holders(num_rows, 1);  // shards that hold the row's target; 1 where that does not matter
  dispatch_floating(max.scalar_type(), [&](auto zero) {
    using S = acc_t<decltype(zero)>;
    const Tensor* fields[4] = {&max, &sumexp, &sum_z_exp, &target_logit};
    const auto at = [&](int field, int64_t shard, int64_t row) {
      return static_cast<const S*>(fields[field]->const_data_ptr())[shard * fields[field]->stride(0) + row];
    };
    S* out[3];
    for (int i = 0; i < 3; ++i) out[i] = static_cast<S*>(outputs[i].mutable_data_ptr());
    torch::stable::parallel_for(0, num_rows, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        SoftmaxStats<S> total = SoftmaxStats<S>::empty();
        S target = std::numeric_limits<S>::quiet_NaN();
        int64_t held = 0;
        for (int64_t r = 0; r < num_shards; ++r) {
          total.merge({at(0, r, t), at(1, r, t), at(2, r, t)});
          const S logit = at(3, r, t);
          if (std::isnan(logit)) continue;
          target = logit;
          ++held;
        }
        if (total.sum == S(0) && held == 0) {
          for (S* x : out) x[t] = 0;
          continue;
        }
        if (!std::isnan(total.sum)) holders[t] = held;
        const RowResult<S> result(total, target);
        out[0][t] = result.logprob;
        out[1][t] = result.entropy;
        out[2][t] = result.lse;
      }
    });
  });
  for (int64_t t = 0; t < num_rows; ++t) {
    CHECK_VALUE(holders[t] == 1, "the target of every row must lie in one shard, got ", holders[t], " of ", num_shards,
                " shards that hold the target of row ", t);
  }
  return {outputs[0], outputs[1], outputs[2]};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("merge_logprobs", TORCH_BOX(&qrm_fast::merge_logprobs)); }
