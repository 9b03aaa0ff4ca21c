// linear_q_values: a policy head and a Q head over the same vocabulary, folded together while both are in cache.
//
// A chunk of both weights is packed once and multiplied with every block of rows: logits stand transposed,
// [chunk][rows], so that a row is a SIMD lane and nothing is reduced across lanes. The two blocks, 200 KB, stay in L2
// while they are folded into each row's sums of e^z, z e^z, Q e^z and e^(Q / beta). 2 T (Dp + Dq) V FLOP. V is cut into
// splits from V only, whose sums are merged in order: a row's bits depend on that row and the weights. Ignored rows are
// never read.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "head.h"
#include "target_clones.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

constexpr int64_t kColumns = 96;     // of a chunk; a multiple of every tile's rows
constexpr int64_t kLaneRows = 256;   // rows of a block of logits; a multiple of every tile's columns
constexpr int64_t kUnitRows = 1024;  // rows that share a packed chunk
constexpr int64_t kUnitColumns = 20 * kColumns;

// What a row's columns so far come to: max z, sums of e = e^(z - max), (z - max) e and Q e; max Q / beta, and the sum
// of e^(Q / beta - max).
template <typename S>
struct QStats {
  SoftmaxStats<S> policy = SoftmaxStats<S>::empty();
  S expected = 0;
  SoftmaxStats<S> soft = SoftmaxStats<S>::empty();

  void merge(const QStats& other) {
    const S top = std::max(policy.max, other.policy.max);
    const auto moved = [&](const QStats& x) {
      return x.policy.sum == S(0) ? S(0) : x.expected * std::exp(x.policy.max - top);
    };
    expected = moved(*this) + moved(other);
    policy.merge(other.policy);
    soft.merge(other.soft);
  }
};

constexpr int kFields = 6;

// Joins `n` lines of logits z and q, [n][lanes], to the lanes' sums `stats` [kFields][lanes]. z is yet to be divided by
// the temperature of its lane, q by beta.
template <typename S>
QRM_FAST_TARGET_CLONES void fold(S* z, S* q, int64_t n, int64_t lanes, const S* temperature, S beta, S* stats) {
  using V = Simd<S, 64>;
  using Vec = typename V::Vec;
  const S never = -std::numeric_limits<S>::infinity();
  for (int64_t j = 0; j < lanes; j += V::kLanes) {
    const Vec t = V::load(temperature + j);
    Vec top = V::broadcast(never), q_top = top;
    for (int64_t i = j; i < n * lanes; i += lanes) {
      const Vec x = V::load(z + i) / t, y = V::load(q + i) / beta;
      V::store(z + i, x);
      top = V::max(x, top);
      q_top = V::max(y, q_top);
    }
    const Vec origin = top == never ? Vec{} : top, q_origin = q_top == never ? Vec{} : q_top;
    Vec sum = {}, weighted = {}, expected = {}, q_sum = {};
    for (int64_t i = j; i < n * lanes; i += lanes) {
      const Vec shifted = V::load(z + i) - origin, e = V::exp(shifted), y = V::load(q + i);
      sum += e;
      weighted += e == S(0) ? Vec{} : shifted * e;
      expected += e == S(0) ? Vec{} : y * e;
      q_sum += V::exp(y / beta - q_origin);
    }
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

template <typename In, typename S = acc_t<In>>
class LaneHead {
 public:
  LaneHead(const Tensor& hidden, const Tensor& weight)
      : dim_(hidden.size(1)),
        x_(static_cast<const In*>(hidden.const_data_ptr())),
        w_(static_cast<const In*>(weight.const_data_ptr())),
        x_stride_(hidden.stride(0)),
        w_stride_(weight.stride(0)),
        gemm_(panel_kernels<S>().gemm),
        packed_(0) {}

  void pack_hidden(const std::vector<int64_t>& rows) {
    const int64_t blocks = ceil_div(rows.size(), kLaneRows), count = rows.size();
    packed_ = Scratch<S>(blocks * kLaneRows * dim_);
    parallel(blocks, [&](int64_t i) {
      S* out = packed_.get() + i * kLaneRows * dim_;
      std::fill_n(out, kLaneRows * dim_, S(0));
      const int64_t first = i * kLaneRows;
      pack_panels(x_, x_stride_, 1, rows.data(), first, std::min(kLaneRows, count - first), dim_, gemm_.nr, out);
    });
  }

  int64_t packed_weight() const { return kColumns * dim_; }
  void pack_weight(int64_t column, int64_t width, S* a) const {
    pack_panels(w_, w_stride_, 1, static_cast<const int64_t*>(nullptr), column, width, dim_, gemm_.mr, a);
  }

  // [width][kLaneRows] logits of the block of rows from `row` on.
  void logits(const S* a, int64_t width, int64_t row, S* z) const {
    multiply_panels(gemm_, width, kLaneRows, dim_, a, packed_.get() + row * dim_, z, kLaneRows);
  }

 private:
  int64_t dim_;
  const In* x_;
  const In* w_;
  int64_t x_stride_, w_stride_;
  const GemmKernel<S>& gemm_;
  Scratch<S> packed_;  // hidden rows, by blocks of kLaneRows
};

// Sums of every row, [splits][rows], and the taken actions' logits.
template <typename S>
struct Folded {
  Folded(int64_t count, int64_t splits) : stats(splits * count), z(count), q(count) {}
  std::vector<QStats<S>> stats;
  std::vector<S> z, q;
};

template <typename In, typename S>
Folded<S> sweep(const LaneHead<In, S>& policy, const LaneHead<In, S>& critic, const std::vector<int64_t>& rows,
                const int64_t* targets, int64_t vocab, const S* temperatures, S temperature, S beta) {
  const int64_t count = rows.size(), splits = ceil_div(vocab, kUnitColumns), units = ceil_div(count, kUnitRows);
  Folded<S> folded(count, splits);
  parallel(splits * units, [&](int64_t unit) {
    const int64_t split = unit / units, first = unit % units * kUnitRows, last = std::min(count, first + kUnitRows);
    const int64_t blocks = ceil_div(last - first, kLaneRows), end = std::min(vocab, (split + 1) * kUnitColumns);
    Scratch<S> a(policy.packed_weight()), b(critic.packed_weight());
    Scratch<S> z(kColumns * kLaneRows), q(kColumns * kLaneRows);
    std::vector<S> t(blocks * kLaneRows, S(1)), stats(blocks * kFields * kLaneRows, S(0));
    for (int64_t i = first; i < last; ++i) t[i - first] = temperatures ? temperatures[rows[i]] : temperature;
    const auto field = [&](int64_t block, int f) { return stats.data() + (block * kFields + f) * kLaneRows; };
    for (int64_t block = 0; block < blocks; ++block) {
      for (int f : {0, 4}) std::fill_n(field(block, f), kLaneRows, -std::numeric_limits<S>::infinity());
    }
    for (int64_t column = split * kUnitColumns; column < end; column += kColumns) {
      const int64_t width = std::min(kColumns, end - column);
      policy.pack_weight(column, width, a.get());
      critic.pack_weight(column, width, b.get());
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = first + block * kLaneRows, height = std::min(kLaneRows, last - row);
        policy.logits(a.get(), width, row, z.get());
        critic.logits(b.get(), width, row, q.get());
        fold(z.get(), q.get(), width, kLaneRows, t.data() + block * kLaneRows, beta, field(block, 0));
        for (int64_t i = 0; i < height; ++i) {
          const int64_t v = targets[rows[row + i]] - column;
          if (v < 0 || v >= width) continue;
          folded.z[row + i] = z.get()[v * kLaneRows + i];
          folded.q[row + i] = q.get()[v * kLaneRows + i];
        }
      }
    }
    for (int64_t i = first; i < last; ++i) {
      const int64_t block = (i - first) / kLaneRows, lane = (i - first) % kLaneRows;
      const auto at = [&](int f) { return field(block, f)[lane]; };
      folded.stats[split * count + i] = {{at(0), at(1), at(2)}, at(3), {at(4), at(5), S(0)}};
    }
  });
  return folded;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results linear_q_values(const Tensor& policy_hidden, const Tensor& policy_weight, const Tensor& q_hidden,
                        const Tensor& q_weight, const Tensor& targets, double temperature,
                        const std::optional<Tensor>& temperatures, double beta, int64_t ignore_index) {
  const int64_t num_rows = targets.size(0), vocab = q_weight.size(0);
  const int64_t* ids = static_cast<const int64_t*>(targets.const_data_ptr());
  std::vector<int64_t> rows;
  for (int64_t t = 0; t < num_rows; ++t) {
    if (ids[t] == ignore_index) continue;
    CHECK_VALUE(ids[t] >= 0 && ids[t] < vocab, "targets must be in [0, ", vocab, ") or ", ignore_index, ", got ",
                ids[t], " at row ", t);
    rows.push_back(t);
  }
  Tensor outputs[5];
  for (Tensor& x : outputs) {
    x = torch::stable::new_zeros(policy_hidden, {num_rows}, acc_dtype(policy_hidden.scalar_type()));
  }
  dispatch_floating(policy_hidden.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using S = acc_t<In>;
    LaneHead<In> policy(policy_hidden, policy_weight), critic(q_hidden, q_weight);
    policy.pack_hidden(rows);
    critic.pack_hidden(rows);
    const Folded<S> folded =
        sweep(policy, critic, rows, ids, vocab, data_or_null<S>(temperatures), S(temperature), S(beta));
    S* out[5];
    for (int i = 0; i < 5; ++i) out[i] = static_cast<S*>(outputs[i].mutable_data_ptr());
    for (size_t i = 0; i < rows.size(); ++i) {
      QStats<S> total = folded.stats[i];
      for (size_t j = i + rows.size(); j < folded.stats.size(); j += rows.size()) total.merge(folded.stats[j]);
      const RowResult<S> result(total.policy, folded.z[i]);
      const int64_t t = rows[i];
      out[0][t] = result.logprob;
      out[1][t] = result.entropy;
      out[2][t] = folded.q[i];
      out[3][t] = total.expected / total.policy.sum;
      out[4][t] = S(beta) * (total.soft.max + std::log(total.soft.sum));
    }
  });
  return {outputs[0], outputs[1], outputs[2], outputs[3], outputs[4]};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("linear_q_values", TORCH_BOX(&qrm_fast::linear_q_values)); }
