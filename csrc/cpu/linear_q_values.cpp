// linear_q_values: a policy head and a Q head over the same vocabulary, folded together while both are in cache.
//
// Both heads' rows stand in panels, as in head/inputs.h: a row is a SIMD lane and nothing is reduced across lanes. A
// thread multiplies a chunk of columns of one weight and then of the other with the rows of a unit, and folds the two
// blocks, 96 KB, into each row's sums of e^z, z e^z, Q e^z and e^(Q / beta) before the next overwrites them. 2 T (Dp +
// Dq) V FLOP. V is cut into splits from V only, whose sums are joined in order, in double: a row's bits depend on that
// row and the weights. Ignored rows are never read.

#include "head/fold.h"

namespace qrm_fast {
namespace {

constexpr int64_t kSplitColumns = 20 * kChunk;

// What a row's columns so far come to: max z, sums of e = e^(z - max), (z - max) e and Q e; max Q / beta, and the sum
// of e^(Q / beta - max).
struct QStats {
  SoftmaxStats<double> policy = SoftmaxStats<double>::empty();
  double expected = 0;
  SoftmaxStats<double> soft = SoftmaxStats<double>::empty();

  void merge(const QStats& other) {
    const double top = std::max(policy.max, other.policy.max);
    const auto moved = [&](const QStats& x) {
      return x.policy.sum == 0 ? 0 : x.expected * std::exp(x.policy.max - top);
    };
    expected = moved(*this) + moved(other);
    policy.merge(other.policy);
    soft.merge(other.soft);
  }
};

constexpr int kFields = 6;

// Joins `n` lines of logits z and q, [n][lanes], to the lanes' sums `stats` [kFields][lanes]. q is yet to be divided by
// beta.
template <typename S>
QRM_FAST_CLONES void fold(const S* z, const S* q, int64_t n, int64_t lanes, S beta, S* stats) {
  using V = Simd<S, 64>;
  using Vec = typename V::Vec;
  const S never = -std::numeric_limits<S>::infinity();
  for (int64_t j = 0; j < lanes; j += V::kLanes) {
    Vec top = V::broadcast(never), q_top = top;
    for (int64_t i = j; i < n * lanes; i += lanes) {
      top = V::max(V::load(z + i), top);
      q_top = V::max(V::load(q + i), q_top);
    }
    q_top /= beta;
    const Vec origin = top == never ? Vec{} : top, q_origin = q_top == never ? Vec{} : q_top;
    Vec sum = {}, weighted = {}, expected = {}, q_sum = {}, q_shifts = {};
    for (int64_t i = j; i < n * lanes; i += lanes) {
      const Vec shifted = V::load(z + i) - origin, e = V::exp_in_range(shifted), y = V::load(q + i);
      const auto gone = shifted < V::kLowestExp;
      sum += gone ? Vec{} : e;
      weighted += gone ? Vec{} : shifted * e;
      expected += gone ? Vec{} : y * e;
      const Vec q_shifted = (beta == S(1) ? y : y / beta) - q_origin;
      const auto q_gone = q_shifted < V::kLowestExp;
      q_sum += q_gone ? Vec{} : V::exp_in_range(q_shifted);
      q_shifts += q_gone ? Vec{} : q_shifted;
    }
    // NaN, which exp_in_range does not keep, reached the other sums
    sum += weighted - weighted;
    q_sum += q_shifts - q_shifts;
    S* s = stats + j;
    const auto join = [&](int field, Vec more_max, Vec more_sum) __attribute__((always_inline)) {
      const Vec max = V::load(s + field * lanes), old = V::load(s + (field + 1) * lanes);
      const Vec both = V::max(max, more_max), base = both == never ? Vec{} : both;
      const Vec a = max - base, b = more_max - base, scale_a = V::exp(a), scale_b = V::exp(b);
      V::store(s + field * lanes, both);
      V::store(s + (field + 1) * lanes, scale_a * old + scale_b * more_sum);
      if (field > 0) return;
      const Vec old_weighted = V::load(s + 2 * lanes), old_expected = V::load(s + 3 * lanes);
      const Vec moved = old == S(0) ? Vec{} : scale_a * (old_weighted + a * old);
      V::store(s + 2 * lanes, moved + (more_sum == S(0) ? Vec{} : scale_b * (weighted + b * more_sum)));
      V::store(s + 3 * lanes, scale_a * old_expected + scale_b * expected);
    };
    join(0, top, sum);
    join(4, q_top, q_sum);
  }
}

// Sums of every row, [splits][panels][kFields][lanes], and the taken actions' logits.
template <typename S>
struct Folded {
  Folded(int64_t panels, int64_t lanes, int64_t num_splits)
      : stats(num_splits * panels * kFields * lanes),
        z(panels * lanes),
        q(panels * lanes),
        lanes_(lanes),
        panels_(panels),
        num_splits_(num_splits) {}

  S* of(int64_t split, int64_t panel) const { return stats.get() + (split * panels_ + panel) * kFields * lanes_; }
  QStats total(int64_t row) const {
    QStats sum;
    for (int64_t split = 0; split < num_splits_; ++split) {
      const S* at = of(split, row / lanes_) + row % lanes_;
      const auto field = [&](int f) -> double { return at[f * lanes_]; };
      sum.merge({{field(0), field(1), field(2)}, field(3), {field(4), field(5), 0}});
    }
    return sum;
  }

  Scratch<S> stats;
  std::vector<S> z, q;

 private:
  int64_t lanes_, panels_, num_splits_;
};

template <typename In, typename S>
Folded<S> fold_both(const Head<In, S>& policy, const Head<In, S>& critic, S beta) {
  const int64_t count = policy.rows.size(), nr = policy.lanes(), panels = ceil_div(count, nr);
  const int64_t most = kScoredRows / nr, units = ceil_div(panels, most), splits = ceil_div(policy.vocab, kSplitColumns);
  const int64_t chunk = kChunk * nr, block = most * chunk, workers = max_workers(splits * units);
  const Scratch<S> memory({panels * policy.x_panel(), panels * critic.x_panel(), workers * 2 * block});
  S *x = memory[0], *y = memory[1], *logits = memory[2];
  policy.pack_hidden(0, count, x);
  critic.pack_hidden(0, count, y);
  Folded<S> folded(panels, nr, splits);
  parallel_workers(splits * units, [&](int64_t thread, auto next) {
    S *z = logits + thread * 2 * block, *q = z + block;
    for (int64_t unit; (unit = next()) < splits * units;) {
      const int64_t split = unit / units, first = unit % units * most, here = std::min(most, panels - first);
      const int64_t end = std::min(policy.vocab, (split + 1) * kSplitColumns);
      for (int64_t p = 0; p < here; ++p) {
        S* stats = folded.of(split, first + p);
        std::fill_n(stats, kFields * nr, S(0));
        for (int f : {0, 4}) std::fill_n(stats + f * nr, nr, -std::numeric_limits<S>::infinity());
      }
      for (int64_t column = split * kSplitColumns; column < end; column += kChunk) {
        const int64_t width = std::min(kChunk, end - column);
        form_logits(policy, first * nr, here, column, width, x + first * policy.x_panel(), z, chunk);
        form_logits(critic, first * nr, here, column, width, y + first * critic.x_panel(), q, chunk);
        for (int64_t p = 0; p < here; ++p) {
          const int64_t row = (first + p) * nr;
          fold(z + p * chunk, q + p * chunk, width, nr, beta, folded.of(split, first + p));
          policy.for_targets(row, column, width, [&](int64_t j, int64_t v) {
            folded.z[row + j] = z[p * chunk + v * nr + j];
            folded.q[row + j] = q[p * chunk + v * nr + j];
          });
        }
      }
    }
  });
  return folded;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results linear_q_values(const Tensor& policy_hidden, const Tensor& policy_weight, const Tensor& q_hidden,
                        const Tensor& q_weight, const Tensor& targets, double temperature,
                        const std::optional<Tensor>& temperatures, double beta, int64_t ignore_index) {
  const int64_t num_rows = targets.size(0);
  Tensor outputs[5];
  for (Tensor& x : outputs) {
    x = torch::stable::new_zeros(policy_hidden, {num_rows}, acc_dtype(policy_hidden.scalar_type()));
  }
  dispatch_floating(policy_hidden.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using S = acc_t<In>;
    Head<In, S> policy(policy_hidden, policy_weight, targets, {{}, temperature, temperatures, {}, ignore_index});
    Head<In, S> critic(q_hidden, q_weight, targets, {{}, 1.0, {}, {}, ignore_index});
    policy.select_rows([](int64_t) { return true; });
    critic.rows = policy.rows;
    const Folded<S> folded = fold_both(policy, critic, S(beta));
    S* out[5];
    for (int i = 0; i < 5; ++i) out[i] = mutable_data<S>(outputs[i]);
    parallel(policy.rows.size(), [&](int64_t i) {
      const QStats total = folded.total(i);
      const RowResult<double> result(total.policy, folded.z[i]);
      const int64_t t = policy.rows[i];
      out[0][t] = result.logprob;
      out[1][t] = result.entropy;
      out[2][t] = folded.q[i];
      out[3][t] = total.expected / total.policy.sum;
      out[4][t] = beta * (total.soft.max + std::log(total.soft.sum));
    });
  });
  return {outputs[0], outputs[1], outputs[2], outputs[3], outputs[4]};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("linear_q_values", TORCH_BOX(&qrm_fast::linear_q_values)); }
