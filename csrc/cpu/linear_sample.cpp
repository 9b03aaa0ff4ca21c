// linear_sample: a token of softmax(hidden @ weight.T) per row, at a given place of its distribution function, and its
// log-probability, without [R, V] logits.
//
// The forward pass of linear_logprobs, which also keeps the sums after every chunk of kChunk columns, V / 32 numbers a
// row. The place is looked up among the sums of the splits, then of the chunks of one split; that chunk alone is
// computed again, by the same product, for all rows of a panel that are searched there. 2 R D V FLOP, and at most
// kChunk * lanes / V of that once more. The token's logit and the joined sums are those of linear_logprobs, hence the
// same bits of the log-probability.

#include <tuple>
#include <utility>

#include "head/fold.h"

namespace qrm_fast {
namespace {

// The first of `count` pieces with which `reached` exceeds the goal or, where rounding leaves none, the last that adds
// to it; `reached` becomes what was reached before that piece. `upto(i)`: what is reached with piece i.
template <typename F>
int64_t search(int64_t count, double goal, double& reached, F upto) {
  int64_t found = 0;
  double below = reached;
  for (int64_t i = 0; i < count && !(reached > goal); ++i) {
    const double next = upto(i);
    if (next > reached) {
      found = i;
      below = std::exchange(reached, next);
    }
  }
  reached = below;
  return found;
}

// Where a row's token is: the panel and the chunk of columns, and how much of the distribution function lies below it.
struct Place {
  int64_t row, panel, chunk;
  double top, goal, below;

  bool same_logits(const Place& other) const { return panel == other.panel && chunk == other.chunk; }
  bool operator<(const Place& other) const {
    return std::tie(panel, chunk, row) < std::tie(other.panel, other.chunk, other.row);
  }
};

template <typename S>
Place place_of(const FoldedRows<S>& folded, int64_t row, double u, int64_t vocab, int64_t lanes) {
  const int64_t splits = ceil_div(vocab, kSplit), panel = row / lanes, lane = row % lanes;
  Place place{row, panel, 0, -std::numeric_limits<double>::infinity(), 0, 0};
  for (int64_t s = 0; s < splits; ++s) place.top = std::max<double>(place.top, folded.of(s, panel)[lane]);
  const auto mass = [&](const S* stats) {
    const double sum = stats[lanes + lane];
    return sum > 0 ? std::exp(static_cast<double>(stats[lane]) - place.top) * sum : 0;
  };
  for (int64_t s = 0; s < splits; ++s) place.goal += mass(folded.of(s, panel));
  place.goal *= u;
  const int64_t split =
      search(splits, place.goal, place.below, [&](int64_t s) { return place.below + mass(folded.of(s, panel)); });
  const int64_t first = split * (kSplit / kChunk), chunks = std::min(ceil_div(vocab, kChunk) - first, kSplit / kChunk);
  place.chunk = first + search(chunks, place.goal, place.below, [&, start = place.below](int64_t c) {
                  return start + mass(folded.after(first + c, panel));
                });
  return place;
}

std::tuple<Tensor, Tensor> linear_sample(const Tensor& hidden, const Tensor& weight, const Tensor& uniforms,
                                         const std::optional<Tensor>& bias, double temperature,
                                         const std::optional<Tensor>& temperatures, std::optional<double> softcap) {
  const HeadOptions options{bias, temperature, temperatures, softcap, -1};
  const int64_t num_rows = hidden.size(0);
  Tensor tokens = torch::stable::new_zeros(hidden, {num_rows}, ScalarType::Long);
  Tensor logprobs = torch::stable::new_empty(hidden, {num_rows}, acc_dtype(hidden.scalar_type()));
  const double* u = data<double>(uniforms);
  for (int64_t t = 0; t < num_rows; ++t) {
    CHECK_VALUE(u[t] >= 0 && u[t] < 1, "uniforms must be in [0, 1), got ", u[t], " at row ", t);
  }
  dispatch_floating(hidden.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using S = acc_t<In>;
    Head<In, S> head(hidden, weight, tokens, options, num_rows);
    head.select_rows([](int64_t) { return true; });
    const int64_t lanes = head.lanes(), panels = ceil_div(num_rows, lanes), room = kChunk * lanes;
    const Scratch<S> memory({panels * head.x_panel(), max_workers(num_rows) * room});
    const S* x = memory[0];
    head.pack_hidden(0, num_rows, memory[0]);
    FoldedRows<S> folded(head.kernels, panels, ceil_div(head.vocab, kSplit), ceil_div(head.vocab, kChunk));
    fold_splits(head, x, folded);

    std::vector<Place> places(num_rows);
    parallel(num_rows, 16, [&](int64_t t) { places[t] = place_of(folded, t, u[t], head.vocab, lanes); });
    std::sort(places.begin(), places.end());
    std::vector<int64_t> units;  // the first of those that share their logits
    for (int64_t i = 0; i < num_rows; ++i) {
      if (i == 0 || !places[i].same_logits(places[i - 1])) units.push_back(i);
    }
    const int64_t num_units = units.size();
    units.push_back(num_rows);
    int64_t* token = mutable_data<int64_t>(tokens);
    parallel_workers(num_units, [&](int64_t thread, auto next) {
      S* z = memory[1] + thread * room;
      for (int64_t unit; (unit = next()) < num_units;) {
        const int64_t panel = places[units[unit]].panel, column = places[units[unit]].chunk * kChunk;
        const int64_t width = std::min(kChunk, head.vocab - column);
        form_logits(head, panel * lanes, 1, column, width, x + panel * head.x_panel(), z, room);
        for (int64_t i = units[unit]; i < units[unit + 1]; ++i) {
          Place& place = places[i];
          const S* logits = z + place.row % lanes;
          const int64_t v = search(width, place.goal, place.below,
                                   [&](int64_t v) { return place.below + std::exp(logits[v * lanes] - place.top); });
          token[place.row] = column + v;
          folded.target_logits[place.row] = logits[v * lanes];
        }
      }
    });
    folded.merge();
    S* out = mutable_data<S>(logprobs);
    for (int64_t t = 0; t < num_rows; ++t) out[t] = RowResult<S>(folded.total(t), folded.target_logits[t]).logprob;
  });
  return {tokens, logprobs};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("linear_sample", TORCH_BOX(&qrm_fast::linear_sample)); }
