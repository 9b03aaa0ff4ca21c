// Q-values of taken actions: the scalar head or the gathered row of a vocabulary head, final RMSNorm included.
// Forward reads each hidden row once (2 D bytes per token in bf16, as much again for a gathered head row) and does
// 2 D FLOP, so it runs at the speed of memory; neither normalised states nor logits are written. Backward reads the row
// once more and forms its gradient, rank-1 in the head, while the row is in cache. The head's gradient sums rows in
// blocks of the order sorted by action, in float32: pieces that cross blocks are combined in order, so no bit depends
// on the number of threads and workspace is 3 D floats per block.
#include "token_q.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "../check.h"
#include "../dtypes.h"
#include "../indices.h"
#include "parallel.h"
#include "simd/simd.h"

namespace qrm_fast {
namespace {

constexpr int64_t kLanes = 64;     // partial sums of a dot product: enough to hide the latency of an FMA at any width
constexpr int64_t kAhead = 4096;   // bytes
constexpr int64_t kBlock = 128;    // rows of one partial sum of the head's gradient
constexpr int64_t kRows = 8;       // rows that enter it at once
constexpr int64_t kColumns = 512;  // columns of one task of the combine step

// Fetches the kLanes elements that lie kAhead bytes after `x`, mostly the next row: 1.5 times the speed in bf16.
template <typename T>
inline void prefetch(const T* x) {
  const char* line = reinterpret_cast<const char*>(x) + kAhead;
  for (size_t byte = 0; byte < kLanes * sizeof(T); byte += 64) __builtin_prefetch(line + byte);
}

// A row's sum is split over the lanes by column alone, so its bits depend on nothing but the row.
template <typename T, typename A = acc_t<T>>
QRM_FAST_CLONES A dot(const T* __restrict x, const T* __restrict w, int64_t n) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(x + i);
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += static_cast<A>(x[i + j]) * static_cast<A>(w[i + j]);
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += static_cast<A>(x[i + j]) * static_cast<A>(w[i + j]);
  return sum_halves(lanes, kLanes);
}

// sum x scale w; the squares' sum goes to `squares`.
template <typename T, typename A = acc_t<T>>
QRM_FAST_CLONES A scaled_dot(const T* __restrict x, const T* __restrict w, const T* __restrict scale, int64_t n,
                             A* squares) {
  A lanes[kLanes] = {}, square_lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(x + i);
    for (int64_t j = 0; j < kLanes; ++j) {
      const A value = x[i + j];
      lanes[j] += value * (static_cast<A>(scale[i + j]) * static_cast<A>(w[i + j]));
      square_lanes[j] += value * value;
    }
  }
  for (int64_t j = 0; i + j < n; ++j) {
    const A value = x[i + j];
    lanes[j] += value * (static_cast<A>(scale[i + j]) * static_cast<A>(w[i + j]));
    square_lanes[j] += value * value;
  }
  *squares = sum_halves(square_lanes, kLanes);
  return sum_halves(lanes, kLanes);
}

// out = a w
template <typename T, typename A = acc_t<T>>
QRM_FAST_CLONES void multiple(A a, const T* __restrict w, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(a * static_cast<A>(w[i]));
}

// out = a scale w - b x
template <typename T, typename A = acc_t<T>>
QRM_FAST_CLONES void normed_gradient(A a, const T* __restrict w, const T* __restrict scale, A b, const T* __restrict x,
                                     T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<T>(a * (static_cast<A>(scale[i]) * static_cast<A>(w[i])) - b * static_cast<A>(x[i]));
  }
}

// sum += a[0] x[0] + ... + a[rows - 1] x[rows - 1], rows <= kRows. Adding several rows at once keeps rounding errors
// and the traffic of `sum` low.
template <typename T, typename A = acc_t<T>>
QRM_FAST_CLONES void accumulate(const A* __restrict a, const T* const* x, int64_t rows, A* __restrict sum, int64_t n) {
  if (rows == kRows) {
    const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *x4 = x[4], *x5 = x[5], *x6 = x[6], *x7 = x[7];
    for (int64_t i = 0; i < n; ++i) {
      const A low = (a[0] * static_cast<A>(x0[i]) + a[1] * static_cast<A>(x1[i])) +
                    (a[2] * static_cast<A>(x2[i]) + a[3] * static_cast<A>(x3[i]));
      const A high = (a[4] * static_cast<A>(x4[i]) + a[5] * static_cast<A>(x5[i])) +
                     (a[6] * static_cast<A>(x6[i]) + a[7] * static_cast<A>(x7[i]));
      sum[i] += low + high;
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < n; ++i) sum[i] += a[row] * static_cast<A>(x[row][i]);
  }
}

// sum += x w, or x without w
template <typename T, typename A>
QRM_FAST_CLONES void add_product(const A* __restrict x, const T* __restrict w, double* __restrict sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += w ? static_cast<double>(x[i]) * static_cast<acc_t<T>>(w[i]) : x[i];
}

// out = scale x, or x without a scale
template <typename T, typename A>
QRM_FAST_CLONES void round_scaled(const A* __restrict x, const T* __restrict scale, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<T>(static_cast<acc_t<T>>(scale ? x[i] * static_cast<A>(scale[i]) : x[i]));
  }
}

// The operands of one call. `targets` is null for the scalar head, `norm` without an RMSNorm.
template <typename T>
struct Operands {
  const T* hidden;
  int64_t hidden_stride;
  const T* head;
  int64_t head_stride;
  const int64_t* targets;
  const T* norm;
  acc_t<T> eps;
  int64_t dim;

  const T* row(int64_t t) const { return hidden + t * hidden_stride; }
  int64_t id(int64_t t) const { return targets ? targets[t] : 0; }
  const T* head_row(int64_t t) const { return head + id(t) * head_stride; }

  // hidden . head, with the norm's factor 1 / rms(hidden) set aside in `rstd`.
  acc_t<T> product(int64_t t, acc_t<T>* rstd) const {
    *rstd = 1;
    if (!norm) return dot<T>(row(t), head_row(t), dim);
    acc_t<T> squares;
    const acc_t<T> sum = scaled_dot<T>(row(t), head_row(t), norm, dim, &squares);
    *rstd = 1 / std::sqrt(squares / dim + eps);
    return sum;
  }
};

template <typename T>
Operands<T> operands(const Tensor& hidden, const Tensor& head, const std::optional<Tensor>& targets,
                     const std::optional<Tensor>& norm_weight, double norm_eps) {
  return {data<T>(hidden),
          hidden.stride(0),
          data<T>(head),
          head.stride(0),
          data_or_null<int64_t>(targets),
          data_or_null<T>(norm_weight),
          static_cast<acc_t<T>>(norm_eps),
          hidden.size(1)};
}

int64_t row_grain(int64_t dim) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(dim, 1)); }

constexpr int64_t kIgnore = -100;

Tensor token_q(const Tensor& hidden, const Tensor& head, const std::optional<Tensor>& targets,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& norm_weight, double norm_eps) {
  const int64_t num_tokens = hidden.size(0);
  if (targets.has_value()) {
    const int64_t* ids = data<int64_t>(*targets);
    for (int64_t t = 0; t < num_tokens; ++t) {
      CHECK_VALUE(ids[t] == kIgnore || (ids[t] >= 0 && ids[t] < head.size(0)),
                  "targets must be in [0, V = ", head.size(0), ") or ", kIgnore, ", got ", ids[t], " in row ", t);
    }
  }
  Tensor q = torch::stable::new_empty(hidden, {num_tokens}, acc_dtype(hidden.scalar_type()));
  dispatch_floating(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Operands<T> in = operands<T>(hidden, head, targets, norm_weight, norm_eps);
    const T* b = data_or_null<T>(bias);
    A* out = mutable_data<A>(q);
    torch::stable::parallel_for(0, num_tokens, row_grain(in.dim), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        if (in.id(t) == kIgnore) {
          out[t] = 0;
          continue;
        }
        A rstd;
        const A product = in.product(t, &rstd);
        out[t] = product * rstd + (b ? static_cast<A>(b[in.id(t)]) : A(0));
      }
    });
  });
  return q;
}

// Consecutive rows of the backward order that took the same action.
struct Segment {
  int64_t id, begin, end;

  int64_t first_block() const { return begin / kBlock; }
  int64_t last_block() const { return (end - 1) / kBlock; }
};

// The rows that carry a gradient, sorted by action where sums per action are needed, and cut into segments and blocks.
template <typename T>
struct BackwardOrder {
  std::vector<int64_t> rows;
  std::vector<Segment> segments;
  std::vector<size_t> first_segment;  // of each block

  BackwardOrder(const Operands<T>& in, const acc_t<T>* grad_q, int64_t num_tokens, bool sorted) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      if (in.id(t) != kIgnore && grad_q[t] != 0) rows.push_back(t);
    }
    if (sorted && in.targets) {
      std::stable_sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return in.id(a) < in.id(b); });
    }
    for (int64_t i = 0; i < num_rows(); ++i) {
      if (i == 0 || in.id(rows[i]) != segments.back().id) segments.push_back({in.id(rows[i]), i, i});
      if (i % kBlock == 0) first_segment.push_back(segments.size() - 1);
      ++segments.back().end;
    }
  }

  int64_t num_rows() const { return rows.size(); }
  int64_t num_blocks() const { return first_segment.size(); }
};

// Where the gradients go; null where one is not needed. Of a segment that crosses blocks, the block where it begins
// sums its piece into `tails`, every later block into `heads`; these and `norms` are [blocks, dim].
template <typename T>
struct Gradients {
  T* hidden;
  T* head;
  T* norm;
  acc_t<T>* tails;
  acc_t<T>* heads;
  double* norms;
};

// Writes dhidden = g rstd (norm w - xhat (xhat . norm w) / D), xhat = rstd x, or g w without an RMSNorm. Returns the
// factor g rstd with which x enters the gradients of head and norm.
template <typename T>
acc_t<T> backward_row(const Operands<T>& in, int64_t t, acc_t<T> grad_q, T* dhidden) {
  using A = acc_t<T>;
  if (!in.norm) {
    if (dhidden) multiple<T>(grad_q, in.head_row(t), dhidden, in.dim);
    return grad_q;
  }
  A rstd;
  const A product = in.product(t, &rstd);
  const A factor = grad_q * rstd;
  if (dhidden) {
    const A along = factor * rstd * rstd * product / in.dim;
    normed_gradient<T>(factor, in.head_row(t), in.norm, along, in.row(t), dhidden, in.dim);
  }
  return factor;
}

template <typename T>
void backward_block(const Operands<T>& in, const BackwardOrder<T>& order, const acc_t<T>* grad_q, int64_t block,
                    const Gradients<T>& out, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const int64_t begin = block * kBlock, end = std::min(begin + kBlock, order.num_rows());
  if (out.norm) std::fill_n(out.norms + block * in.dim, in.dim, 0.0);
  for (size_t s = order.first_segment[block]; s < order.segments.size() && order.segments[s].begin < end; ++s) {
    const Segment& segment = order.segments[s];
    const bool whole = segment.first_block() == segment.last_block();
    A* sum = nullptr;
    if (out.head || out.norm) {
      sum = whole ? scratch : (segment.begin < begin ? out.heads : out.tails) + block * in.dim;
      std::fill_n(sum, in.dim, A(0));
    }
    A factors[kRows];
    const T* rows[kRows];
    int64_t held = 0;
    const int64_t piece_end = std::min(end, segment.end);
    for (int64_t i = std::max(begin, segment.begin); i < piece_end; ++i) {
      const int64_t t = order.rows[i];
      factors[held] = backward_row<T>(in, t, grad_q[t], out.hidden ? out.hidden + t * in.dim : nullptr);
      rows[held++] = in.row(t);
      if (sum && (held == kRows || i + 1 == piece_end)) accumulate<T>(factors, rows, held, sum, in.dim);
      if (held == kRows) held = 0;
    }
    if (out.norm) {
      add_product<T>(sum, in.head + segment.id * in.head_stride, out.norms + block * in.dim, in.dim);
    }
    if (out.head && whole) round_scaled<T>(sum, in.norm, out.head + segment.id * in.dim, in.dim);
  }
}

// Adds the pieces of every segment that crosses blocks, and the norm's pieces, in the order of the blocks.
template <typename T>
void combine_columns(const Operands<T>& in, const BackwardOrder<T>& order, const Gradients<T>& out, int64_t column,
                     int64_t n) {
  double sum[kColumns];
  const T* none = nullptr;
  if (out.head) {
    for (const Segment& segment : order.segments) {
      const int64_t first = segment.first_block(), last = segment.last_block();
      if (first == last) continue;
      std::fill_n(sum, n, 0.0);
      add_product(out.tails + first * in.dim + column, none, sum, n);
      for (int64_t block = first + 1; block <= last; ++block) {
        add_product(out.heads + block * in.dim + column, none, sum, n);
      }
      round_scaled(sum, in.norm ? in.norm + column : none, out.head + segment.id * in.dim + column, n);
    }
  }
  if (out.norm) {
    std::fill_n(sum, n, 0.0);
    for (int64_t block = 0; block < order.num_blocks(); ++block) {
      add_product(out.norms + block * in.dim + column, none, sum, n);
    }
    round_scaled(sum, none, out.norm + column, n);
  }
}

// Gradients of hidden, head, bias and norm_weight; an empty [0] tensor where one is not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> token_q_backward(const Tensor& grad_q, const Tensor& hidden,
                                                            const Tensor& head, const std::optional<Tensor>& targets,
                                                            const std::optional<Tensor>& norm_weight, double norm_eps,
                                                            bool need_hidden, bool need_head, bool need_bias,
                                                            bool need_norm) {
  const int64_t num_tokens = hidden.size(0), dim = hidden.size(1), num_ids = head.size(0);
  using Sizes = std::vector<int64_t>;
  const auto zeros = [&](bool needed, const Sizes& sizes) {
    return torch::stable::new_zeros(hidden, needed ? sizes : Sizes{0});
  };
  const Sizes hidden_sizes{num_tokens, dim}, none{0};
  Tensor dhidden = torch::stable::new_empty(hidden, need_hidden ? hidden_sizes : none);
  Tensor dhead = zeros(need_head, {num_ids, dim});
  Tensor dbias = zeros(need_bias, {num_ids});
  Tensor dnorm = zeros(need_norm, {dim});
  dispatch_floating(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Operands<T> in = operands<T>(hidden, head, targets, norm_weight, norm_eps);
    const A* g = data<A>(grad_q);
    const BackwardOrder<T> order(in, g, num_tokens, need_head || need_bias || need_norm);
    const int64_t slots = order.num_blocks() * dim;
    const std::unique_ptr<A[]> tails(new A[need_head || need_norm ? slots : 0]);
    const std::unique_ptr<A[]> heads(new A[need_head || need_norm ? slots : 0]);
    const std::unique_ptr<double[]> norms(new double[need_norm ? slots : 0]);
    const Gradients<T> out{
        need_hidden ? mutable_data<T>(dhidden) : nullptr,
        need_head ? mutable_data<T>(dhead) : nullptr,
        need_norm ? mutable_data<T>(dnorm) : nullptr,
        tails.get(),
        heads.get(),
        norms.get(),
    };
    if (need_hidden) {
      parallel(num_tokens, row_grain(dim), [&](int64_t t) {
        if (in.id(t) == kIgnore || g[t] == 0) std::fill_n(out.hidden + t * dim, dim, static_cast<T>(A(0)));
      });
    }
    torch::stable::parallel_for(0, order.num_blocks(), 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(dim);
      for (int64_t block = begin; block < end; ++block) {
        backward_block<T>(in, order, g, block, out, scratch.data());
      }
    });
    parallel(ceil_div(dim, kColumns), [&](int64_t i) {
      combine_columns<T>(in, order, out, i * kColumns, std::min(kColumns, dim - i * kColumns));
    });
    if (need_bias) {
      T* db = mutable_data<T>(dbias);
      for (const Segment& segment : order.segments) {
        double sum = 0;
        for (int64_t i = segment.begin; i < segment.end; ++i) sum += g[order.rows[i]];
        db[segment.id] = static_cast<T>(static_cast<A>(sum));
      }
    }
  });
  return {dhidden, dhead, dbias, dnorm};
}

}  // namespace

template <typename T>
acc_t<T> row_dot(const T* x, const T* w, int64_t n) {
  return dot<T>(x, w, n);
}

template float row_dot(const float*, const float*, int64_t);
template double row_dot(const double*, const double*, int64_t);
template float row_dot(const torch::headeronly::BFloat16*, const torch::headeronly::BFloat16*, int64_t);
template float row_dot(const torch::headeronly::Half*, const torch::headeronly::Half*, int64_t);

}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) {
  m.impl("token_q", TORCH_BOX(&qrm_fast::token_q));
  m.impl("token_q_backward", TORCH_BOX(&qrm_fast::token_q_backward));
}
