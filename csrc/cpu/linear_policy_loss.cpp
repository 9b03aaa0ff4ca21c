// linear_policy_loss: the policy-gradient loss of hidden states and its gradients in three GEMMs instead of four.
//
// The coefficient of a row's gradient depends on that row's log-probability alone, so it is known as soon as the row's
// fold is complete. A block of rows keeps its logits [rows, V] in float32 meanwhile; they become dZ in place and are
// multiplied into dX and dW before the next block overwrites them. 6 T D V FLOP with both gradients; the block is about
// an eighth of [T, V], between kFewestRows and kMostBlockRows rows. Rows that are ignored or weigh 0 are never read.
//
// gspo's coefficient needs every row of the sequence: its blocks end between sequences, and only the logits of a
// sequence longer than a block are computed twice.

#include <algorithm>

#include "head/fold.h"
#include "memory.h"
#include "packed/cu_seqlens.h"
#include "policy_sums.h"

namespace qrm_fast {
namespace {

constexpr int64_t kFewestRows = 192;     // fewer, and the traffic of W and dW, once per block of rows, dominates
constexpr int64_t kMostBlockRows = 960;  // more gain nothing
constexpr int64_t kBlocks = 8;
constexpr int64_t kSlab = 16896;  // columns between two barriers of the backward pass; a multiple of kChunk

// Where the selected rows may be cut into blocks: anywhere, so at every `most` rows; for gspo between sequences.
std::vector<int64_t> cuts(const std::vector<int64_t>& rows, int64_t most, const CuSeqlens* cu) {
  std::vector<int64_t> cuts{0};
  for (int64_t s = 1; cu && s <= cu->num_sequences(); ++s) {
    cuts.push_back(std::lower_bound(rows.begin(), rows.end(), (*cu)[s]) - rows.begin());
  }
  const int64_t count = rows.size();
  while (cuts.back() < count) cuts.push_back(std::min(count, cuts.back() + most));
  return cuts;
}

template <typename In>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> three_gemms(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const HeadOptions& head_options,
    const PolicyOptions<acc_t<In>>& policy, double entropy_coef, const Tensor& advantages,
    const std::optional<Tensor>& old_logprobs, const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& token_weights, const std::optional<Tensor>& cu_seqlens, bool need_hidden,
    bool need_weight, bool need_bias) {
  using S = acc_t<In>;
  Head<In, S> head(hidden, weight, targets, head_options);
  const S* a = data<S>(advantages);
  const S *old = data_or_null<S>(old_logprobs), *ref = data_or_null<S>(ref_logprobs);
  const S* weights = data_or_null<S>(token_weights);
  head.select_rows([&](int64_t t) { return weights == nullptr || weights[t] != S(0); });
  const int64_t count = head.rows.size(), dim = head.dim, vocab = head.vocab;

  const auto dtype = acc_dtype(hidden.scalar_type());
  const auto zeros = [&](bool needed, int64_t rows, int64_t columns) {
    return needed ? torch::stable::new_zeros(hidden, {rows, columns}, dtype)
                  : torch::stable::new_empty(hidden, {0}, dtype);
  };
  Tensor loss = torch::stable::new_empty(hidden, {}, dtype);
  Tensor metrics = torch::stable::new_empty(hidden, {kPolicyMetrics}, dtype);
  Tensor logprobs = torch::stable::new_zeros(hidden, {hidden.size(0)}, dtype);
  Tensor entropy = torch::stable::new_zeros(hidden, {hidden.size(0)}, dtype);
  Tensor hidden_grad = zeros(need_hidden, hidden.size(0), dim);
  Tensor weight_grad = need_weight && count > 0 ? in_huge_pages(torch::stable::new_empty(hidden, {vocab, dim}, dtype))
                                                : zeros(need_weight, vocab, dim);
  Tensor bias_grad = torch::stable::new_empty(hidden, {need_bias ? vocab : 0}, dtype);
  S* logprobs_out = mutable_data<S>(logprobs);
  S* entropy_out = mutable_data<S>(entropy);
  S* hidden_out = mutable_data<S>(hidden_grad);
  S* weight_out = mutable_data<S>(weight_grad);

  const int64_t nr = head.lanes(), splits = ceil_div(vocab, kSplit);
  const int64_t rows_per_block =
      std::min(round_up(std::max(ceil_div(count, kBlocks), kFewestRows), nr), kMostBlockRows);
  const int64_t panels = ceil_div(std::min(count, rows_per_block), nr), wide = round_up(dim, nr);
  const int64_t z_panel = round_up(vocab, head.kernels.gemm.mr) * nr;
  const bool gradients_needed = need_hidden || need_weight || need_bias;
  const Scratch<S> memory({panels * head.x_panel(), need_weight ? rows_per_block * wide : 0,
                           need_hidden ? panels * head.padded_dim() * nr : 0,
                           need_hidden ? hidden_gradient_scratch(head) : 0, panels * z_panel});
  S *x = memory[0], *x_by_dim = memory[1], *dx = memory[2], *packed = memory[3], *z = memory[4];
  std::vector<double> db(need_bias ? vocab : 0, 0.0);
  std::vector<RowGradient<S>> gradients(rows_per_block);
  BlockGradient<In, S> coefficients(head, panels);
  PolicySums sums;

  std::optional<CuSeqlens> cu;
  if (cu_seqlens) cu.emplace(*cu_seqlens, hidden.size(0));
  std::vector<S> log_ratios(count);
  using Results = std::vector<RowResult<S>>;

  const auto score = [&](int64_t row, int64_t height) -> Results {
    const int64_t here = ceil_div(height, nr);
    head.pack_hidden(row, height, x);
    const int64_t together = kScoredRows / nr, groups = ceil_div(here, together);
    FoldedRows<S> folded(head.kernels, here, splits);
    parallel_workers(groups * splits, [&](int64_t, auto next) {
      for (int64_t unit; (unit = next()) < groups * splits;) {
        const int64_t split = unit / groups, first = unit % groups * together;
        fold_split(head, row + first * nr, std::min(together, here - first), split, x + first * head.x_panel(),
                   z + first * z_panel, z_panel, true, folded, first);
      }
    });
    folded.merge();
    Results results;
    results.reserve(height);
    for (int64_t i = 0; i < height; ++i) results.emplace_back(folded.total(i), folded.target_logits[i]);
    return results;
  };
  const auto log_ratio = [&](int64_t i, const RowResult<S>& r) {
    return r.logprob - (old ? old[head.rows[i]] : r.logprob);
  };

  // Loss and gradients of scored rows, whose logits lie in z.
  const auto differentiate = [&](int64_t row, int64_t height, const Results& results) {
    for (int64_t i = 0; i < height; ++i) {
      const int64_t t = head.rows[row + i];
      const RowResult<S>& r = results[i];
      const S token_weight = weights ? weights[t] : S(1.0 / count);
      const PolicyTerms<S> terms = policy_terms<S>(r.logprob, old ? old[t] : r.logprob, log_ratios[row + i],
                                                   ref ? ref + t : nullptr, a[t], policy);
      sums.add_token(terms, r.entropy, S(entropy_coef), token_weight);
      gradients[i] = {token_weight * terms.dlogprob, -S(entropy_coef) * token_weight, r.lse, r.lse_residual, r.entropy};
      logprobs_out[t] = r.logprob;
      entropy_out[t] = r.entropy;
    }
    if (!gradients_needed) return;
    if (need_weight) head.pack_hidden_by_dim(row, height, x_by_dim);
    const int64_t here = ceil_div(height, nr);
    coefficients.set(row, height, gradients.data());
    for (int64_t column = 0; column < vocab; column += kSlab) {
      const int64_t columns = std::min(kSlab, vocab - column);
      S* dz = z + column * nr;
      parallel_workers(ceil_div(columns, kChunk), [&](int64_t, auto next) {
        for (int64_t unit; (unit = next()) * kChunk < columns;) {
          const int64_t j = unit * kChunk, width = std::min(kChunk, columns - j);
          S* chunk = dz + j * nr;
          for (int64_t p = 0; p < here; ++p) {
            coefficients.apply(p, row + p * nr, column + j, width, chunk + p * z_panel);
          }
          if (need_weight) {
            add_weight_gradient(head, width, chunk, z_panel, height, x_by_dim, weight_out + (column + j) * dim,
                                row > 0);
          }
          if (need_bias) add_bias_gradient(width, chunk, z_panel, height, nr, db.data() + column + j);
        }
      });
      if (need_hidden) add_hidden_gradient(head, column, columns, dz, z_panel, here, packed, dx);
    }
    if (need_hidden) head.unpack_hidden_gradient(row, height, dx, hidden_out);
  };

  // Whole sequences while they fit into a block; a longer one is scored once more before, for its mean.
  const std::vector<int64_t> bounds = cuts(head.rows, rows_per_block, cu ? &*cu : nullptr);
  for (size_t first = 0, last; first + 1 < bounds.size(); first = last) {
    last = first + 1;
    while (last + 1 < bounds.size() && bounds[last + 1] - bounds[first] <= rows_per_block) ++last;
    const int64_t begin = bounds[first], end = bounds[last];
    const auto share_mean = [&](int64_t from, int64_t to, const MeanLogRatio& mean) {
      std::fill(log_ratios.begin() + from, log_ratios.begin() + to, static_cast<S>(mean.value()));
    };
    const bool fits = end - begin <= rows_per_block;
    const bool twice = cu && !fits && old;  // on-policy every ratio is 1
    if (twice) {
      MeanLogRatio mean;
      for (int64_t row = begin; row < end; row += rows_per_block) {
        const Results results = score(row, std::min(rows_per_block, end - row));
        for (size_t i = 0; i < results.size(); ++i) mean.add(log_ratio(row + i, results[i]));
      }
      share_mean(begin, end, mean);
    }
    for (int64_t row = begin; row < end; row += rows_per_block) {
      const int64_t height = std::min(rows_per_block, end - row);
      const Results results = score(row, height);
      for (int64_t i = 0; i < height && !twice; ++i) log_ratios[row + i] = log_ratio(row + i, results[i]);
      for (size_t s = first; s < last && cu && fits; ++s) {
        MeanLogRatio mean;
        for (int64_t i = bounds[s]; i < bounds[s + 1]; ++i) mean.add(log_ratios[i]);
        share_mean(bounds[s], bounds[s + 1], mean);
      }
      differentiate(row, height, results);
    }
  }
  convert(db.data(), db.size(), mutable_data<S>(bias_grad));
  *mutable_data<S>(loss) = static_cast<S>(sums.loss);
  convert(sums.metrics, kPolicyMetrics, mutable_data<S>(metrics));
  return {loss, metrics, logprobs, entropy, hidden_grad, weight_grad, bias_grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_policy_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const Tensor& advantages,
    const std::optional<Tensor>& old_logprobs, const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& token_weights, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& bias, double temperature, const std::optional<Tensor>& temperatures,
    std::optional<double> softcap, int64_t ignore_index, const std::string& kind, double clip_low, double clip_high,
    double dual_clip, double kl_coef, const std::string& kl_estimator, double entropy_coef, bool need_hidden,
    bool need_weight, bool need_bias) {
  const HeadOptions head_options{bias, temperature, temperatures, softcap, ignore_index};
  return dispatch_floating(hidden.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    const auto policy = policy_options<acc_t<In>>(kind, clip_low, clip_high, dual_clip, kl_coef, kl_estimator);
    return three_gemms<In>(hidden, weight, targets, head_options, policy, entropy_coef, advantages, old_logprobs,
                           ref_logprobs, token_weights, cu_seqlens, need_hidden, need_weight, need_bias);
  });
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("linear_policy_loss", TORCH_BOX(&qrm_fast::linear_policy_loss)); }
