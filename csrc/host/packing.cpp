// Host side of packing: Python lists of token ids to packed numpy arrays, and micro-batch plans. No tensor comes here.
// The ids are copied out of their Python objects once, under the GIL: the only pass whose cost Python sets. Everything
// derived from the lengths (25 bytes per token, 16 per action) is filled sequence by sequence with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../check.h"
#include "../indices.h"

namespace py = pybind11;

namespace qrm_fast {
namespace {

constexpr int64_t kIgnoreIndex = -100;

// A dense decoder layer of width D spends 24 D^2 FLOP per token in its matrices and 2 D n^2 in causal attention over n
// tokens: in units of 2 D, n (12 D + n). D = 2048.
constexpr double kTokenCost = 12 * 2048;

const char* type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

// A Python list or tuple read in place. Nothing read from it runs Python code, so its length cannot change meanwhile.
class Items {
 public:
  template <typename... Name>
  Items(PyObject* object, const char* of_what, const Name&... name) : object_(object) {
    if (!PyList_Check(object) && !PyTuple_Check(object)) {
      throw py::type_error(sentence(name..., " must be a list of ", of_what, ", got ", type_name(object)));
    }
  }

  int64_t size() const { return PySequence_Fast_GET_SIZE(object_); }
  PyObject* operator[](int64_t i) const { return PySequence_Fast_GET_ITEM(object_, i); }

  // Item i as a number >= 0.
  template <typename... Name>
  int64_t natural(int64_t i, const Name&... name) const {
    PyObject* item = (*this)[i];
    if (!PyLong_Check(item)) {
      throw py::type_error(sentence(name..., "[", i, "] must be an int, got ", type_name(item)));
    }
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(item, &overflow);
    CHECK_VALUE(overflow == 0 && value >= 0, name..., "[", i, "] must be in [0, 2^63), got ",
                std::string(py::str(py::handle(item))));
    return value;
  }

 private:
  PyObject* object_;
};

struct Packed {
  // `num_whole`: rows of all sequences where each counts its prompt, or 0 where no prompt is shared.
  Packed(int64_t num_sequences, int64_t num_tokens, int64_t num_actions, int64_t num_whole)
      : input_ids(num_tokens),
        position_ids(num_tokens),
        cu_seqlens(num_sequences + 1),
        targets(num_tokens),
        action_mask(num_tokens),
        action_index(num_actions),
        action_cu_seqlens(num_sequences + 1),
        seq_ids(num_actions),
        whole_rows(num_whole),
        whole_cu_seqlens(num_whole ? num_sequences + 1 : 0) {}

  py::array_t<int64_t> input_ids, position_ids;
  py::array_t<int32_t> cu_seqlens;
  py::array_t<int64_t> targets;
  py::array_t<bool> action_mask;
  py::array_t<int64_t> action_index;
  py::array_t<int32_t> action_cu_seqlens;
  py::array_t<int64_t> seq_ids;
  py::array_t<int64_t> whole_rows;
  py::array_t<int32_t> whole_cu_seqlens;
};

// Model row bos + i predicts token i + 1, so the actions prompt_len .. len - 1 are predicted by rows
// bos + prompt_len - 1 .. bos + len - 2, and the last row predicts nothing. `start` tokens, rows of another sequence,
// stand before the `len` here, of which `prompt_len` belong to the prompt.
void fill_sequence(int64_t i_seq, int64_t bos, int64_t len, int64_t prompt_len, int64_t start, const int64_t* input_ids,
                   int64_t* position_ids, int64_t* targets, bool* action_mask, int64_t* action_index,
                   int64_t* seq_ids) {
  const int64_t num_actions = len - prompt_len;
  for (int64_t i = 0; i < len; ++i) position_ids[bos + i] = start + i;
  std::copy_n(input_ids + bos + 1, len - 1, targets + bos);
  targets[bos + len - 1] = kIgnoreIndex;
  std::fill_n(action_mask + bos, len, false);
  std::fill_n(action_mask + bos + prompt_len - 1, num_actions, true);
  for (int64_t t = 0; t < num_actions; ++t) action_index[t] = bos + prompt_len - 1 + t;
  std::fill_n(seq_ids, num_actions, i_seq);
}

// Whether two sequences begin with the same `num` tokens. Lists that share their ints are compared by pointer.
bool same_beginning(const Items& a, const Items& b, int64_t num, int64_t i_a, int64_t i_b) {
  for (int64_t i = 0; i < num; ++i) {
    if (a[i] != b[i] && a.natural(i, "sequences[", i_a, "]") != b.natural(i, "sequences[", i_b, "]")) return false;
  }
  return true;
}

py::tuple pack(const py::object& sequences, const py::object& prompt_lens, bool share_prompts) {
  const Items seqs(sequences.ptr(), "lists of token ids", "sequences");
  const Items prompts(prompt_lens.ptr(), "ints", "prompt_lens");
  const int64_t num_sequences = seqs.size();
  CHECK_VALUE(prompts.size() == num_sequences, "prompt_lens must have one entry per sequence, ", num_sequences,
              ", got ", prompts.size());

  // The first start[s] tokens of sequence s are rows of sequence first[s], the nearest one before it without such.
  std::vector<int64_t> prompt_len(num_sequences), start(num_sequences, 0), first(num_sequences);
  std::vector<int64_t> bos(num_sequences + 1, 0), action_bos(num_sequences + 1, 0), whole_bos(num_sequences + 1, 0);
  int64_t max_seqlen = 0;
  for (int64_t s = 0; s < num_sequences; ++s) {
    const Items ids(seqs[s], "token ids", "sequences[", s, "]");
    const int64_t len = ids.size();
    prompt_len[s] = prompts.natural(s, "prompt_lens");
    CHECK_VALUE(len > 0, "sequences[", s, "] must hold at least one prompt token, got an empty list");
    CHECK_VALUE(prompt_len[s] >= 1 && prompt_len[s] <= len, "prompt_lens[", s, "] must be between 1 and ", len,
                ", the length of sequences[", s, "], got ", prompt_len[s]);
    first[s] = s;
    if (share_prompts && s > 0 && prompt_len[s] > 1 && prompt_len[s] == prompt_len[s - 1]) {
      const int64_t other = first[s - 1];
      if (same_beginning(ids, Items(seqs[other], "token ids"), prompt_len[s], s, other)) {
        first[s] = other;
        start[s] = prompt_len[s] - 1;
      }
    }
    bos[s + 1] = bos[s] + len - start[s];
    action_bos[s + 1] = action_bos[s] + len - prompt_len[s];
    whole_bos[s + 1] = whole_bos[s] + len;
    max_seqlen = std::max(max_seqlen, len);
  }
  const int64_t num_tokens = bos[num_sequences], num_whole = whole_bos[num_sequences];
  CHECK_VALUE(num_whole <= std::numeric_limits<int32_t>::max(),
              "a packed batch must have fewer than 2^31 tokens, its cu_seqlens being int32, got ", num_whole);

  const bool shared = num_whole > num_tokens;
  Packed out(num_sequences, num_tokens, action_bos[num_sequences], shared ? num_whole : 0);
  int64_t* input_ids = out.input_ids.mutable_data();
  for (int64_t s = 0; s < num_sequences; ++s) {
    const Items ids(seqs[s], "token ids", "sequences[", s, "]");
    for (int64_t i = start[s]; i < ids.size(); ++i) {
      input_ids[bos[s] + i - start[s]] = ids.natural(i, "sequences[", s, "]");
    }
  }

  int64_t* position_ids = out.position_ids.mutable_data();
  int64_t* targets = out.targets.mutable_data();
  bool* action_mask = out.action_mask.mutable_data();
  int64_t* action_index = out.action_index.mutable_data();
  int64_t* seq_ids = out.seq_ids.mutable_data();
  int32_t* cu_seqlens = out.cu_seqlens.mutable_data();
  int32_t* action_cu_seqlens = out.action_cu_seqlens.mutable_data();
  int64_t* whole_rows = out.whole_rows.mutable_data();
  int32_t* whole_cu_seqlens = out.whole_cu_seqlens.mutable_data();
  {
    const py::gil_scoped_release no_gil;
    std::copy(bos.begin(), bos.end(), cu_seqlens);
    std::copy(action_bos.begin(), action_bos.end(), action_cu_seqlens);
    for (int64_t s = 0; s < num_sequences; ++s) {
      fill_sequence(s, bos[s], bos[s + 1] - bos[s], prompt_len[s] - start[s], start[s], input_ids, position_ids,
                    targets, action_mask, action_index + action_bos[s], seq_ids + action_bos[s]);
    }
    if (shared) {
      std::copy(whole_bos.begin(), whole_bos.end(), whole_cu_seqlens);
      for (int64_t s = 0; s < num_sequences; ++s) {
        int64_t* rows = whole_rows + whole_bos[s];
        std::iota(rows, rows + start[s], bos[first[s]]);
        std::iota(rows + start[s], whole_rows + whole_bos[s + 1], bos[s]);
      }
    }
  }
  return py::make_tuple(out.input_ids, out.position_ids, out.cu_seqlens, out.targets, out.action_mask, out.action_index,
                        out.action_cu_seqlens, out.seq_ids, max_seqlen,
                        shared ? py::object(out.whole_rows) : py::none(),
                        shared ? py::object(out.whole_cu_seqlens) : py::none());
}

struct Sequence {
  int64_t index, tokens;
  double cost;
};

// Sequences in bins; bins m R .. m R + R - 1 are micro-batch m of the R ranks.
struct Partition {
  std::vector<int64_t> bin_of;  // [sequence]
  std::vector<int64_t> tokens;  // [bin]
  std::vector<double> cost;     // [bin]
  std::vector<double> peak;     // [micro-batch] its dearest bin
};

// Puts each sequence into the bin of smallest key among those with room; nothing if one finds no room. Looks at every
// bin for every sequence.
template <typename Key>
std::optional<Partition> place(const std::vector<Sequence>& sequences, int64_t max_tokens, double max_cost,
                               int64_t num_micro, int64_t num_ranks, Key key) {
  const int64_t num_bins = num_micro * num_ranks;
  Partition p{std::vector<int64_t>(sequences.size()), std::vector<int64_t>(num_bins), std::vector<double>(num_bins),
              std::vector<double>(num_micro)};
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& sequence = sequences[i];
    int64_t best = -1;
    decltype(key(p, best, sequence)) best_key{};
    for (int64_t b = 0; b < num_bins; ++b) {
      if (p.tokens[b] + sequence.tokens > max_tokens || p.cost[b] + sequence.cost > max_cost) continue;
      const auto b_key = key(p, b, sequence);
      if (best < 0 || b_key < best_key) {
        best = b;
        best_key = b_key;
      }
    }
    if (best < 0) return std::nullopt;
    p.bin_of[i] = best;
    p.tokens[best] += sequence.tokens;
    p.cost[best] += sequence.cost;
    p.peak[best / num_ranks] = std::max(p.peak[best / num_ranks], p.cost[best]);
  }
  return p;
}

// Ranks wait for each other at every micro-batch, so a step takes the sum of the peaks. Micro-batches cut from the bins
// in order of falling cost make that sum as small as these bins allow.
struct Balance {
  Balance(std::vector<double> bin_costs, int64_t num_ranks) {
    std::sort(bin_costs.begin(), bin_costs.end(), std::greater<>());
    dearest = bin_costs.front();
    for (size_t b = 0; b < bin_costs.size(); b += num_ranks) step += bin_costs[b];
  }
  bool operator<(const Balance& other) const { return std::tie(step, dearest) < std::tie(other.step, other.dearest); }

  double step = 0, dearest;
};

// `sequences` by falling length. As few micro-batches as are found, then the smallest Balance.
Partition partition(const std::vector<Sequence>& sequences, int64_t max_tokens, int64_t num_ranks) {
  const auto cheapest = [](const Partition& p, int64_t b, const Sequence&) { return p.cost[b]; };
  const auto fullest = [](const Partition& p, int64_t b, const Sequence&) { return -p.tokens[b]; };
  // Raises its micro-batch's peak least; where several stay below their peaks, the one that then comes closest to it.
  const auto least_rise = [&](const Partition& p, int64_t b, const Sequence& sequence) {
    const double rise = p.cost[b] + sequence.cost - p.peak[b / num_ranks];
    return rise > 0 ? std::make_pair(rise, -p.cost[b]) : std::make_pair(0.0, -rise);
  };
  constexpr double kNoLimit = std::numeric_limits<double>::infinity();

  int64_t num_tokens = 0;
  double total_cost = 0;
  for (const Sequence& sequence : sequences) {
    num_tokens += sequence.tokens;
    total_cost += sequence.cost;
  }
  const int64_t capacity = max_tokens * num_ranks;
  int64_t num_micro = std::max<int64_t>(1, ceil_div(num_tokens, capacity));
  const auto try_place = [&](double max_cost, const auto& key) {
    return place(sequences, max_tokens, max_cost, num_micro, num_ranks, key);
  };

  // Longest first (LPT); where that breaks the budget, best fit.
  std::optional<Partition> first;
  while (!(first = try_place(kNoLimit, cheapest)) && !(first = try_place(kNoLimit, fullest))) ++num_micro;
  Partition best = *std::move(first);
  Balance balance(best.cost, num_ranks);
  const auto consider = [&](Partition& p) {
    const Balance candidate(p.cost, num_ranks);
    if (candidate < balance) {
      balance = candidate;
      best = std::move(p);
    }
    return candidate.dearest;
  };
  double high = balance.dearest;
  if (auto p = try_place(high, least_rise)) consider(*p);
  // Bisecting the limit of best fit (MULTIFIT; Coffman, Garey and Johnson 1978) lowers the dearest bin.
  double low = std::max(sequences.front().cost, total_cost / (num_micro * num_ranks));
  for (int round = 0; round < 8 && low < high; ++round) {
    const double middle = (low + high) / 2;
    if (auto p = try_place(middle, fullest)) {
      high = consider(*p);
    } else {
      low = middle;
    }
  }
  return best;
}

using Plan = std::vector<std::vector<std::vector<int64_t>>>;  // [rank][micro-batch] to sequences

Plan plan_microbatches(const py::object& lengths, int64_t max_tokens, int64_t num_ranks, bool attention) {
  const Items items(lengths.ptr(), "ints", "lengths");
  std::vector<Sequence> sequences(items.size());
  for (int64_t s = 0; s < items.size(); ++s) {
    const int64_t len = items.natural(s, "lengths");
    CHECK_VALUE(len <= max_tokens, "lengths[", s, "] must be at most max_tokens, ", max_tokens, ", got ", len);
    sequences[s] = {s, len, attention ? len * (kTokenCost + len) : len};
  }

  const py::gil_scoped_release no_gil;
  Plan plan(num_ranks);
  if (sequences.empty()) return plan;
  std::stable_sort(sequences.begin(), sequences.end(),
                   [](const Sequence& a, const Sequence& b) { return a.tokens > b.tokens; });
  const Partition p = partition(sequences, max_tokens, num_ranks);

  struct Bin {
    double cost;
    std::vector<int64_t> sequences;
  };
  std::vector<Bin> bins(p.cost.size());
  for (size_t b = 0; b < bins.size(); ++b) bins[b].cost = p.cost[b];
  for (size_t i = 0; i < sequences.size(); ++i) bins[p.bin_of[i]].sequences.push_back(sequences[i].index);
  std::stable_sort(bins.begin(), bins.end(), [](const Bin& a, const Bin& b) { return a.cost > b.cost; });
  // Inside a micro-batch the dearest bin goes to the rank with the least work so far.
  std::vector<double> work(num_ranks);
  std::vector<int64_t> ranks(num_ranks);
  std::iota(ranks.begin(), ranks.end(), 0);
  for (auto bin = bins.begin(); bin != bins.end();) {
    std::stable_sort(ranks.begin(), ranks.end(), [&](int64_t a, int64_t b) { return work[a] < work[b]; });
    for (const int64_t rank : ranks) {
      work[rank] += bin->cost;
      std::sort(bin->sequences.begin(), bin->sequences.end());
      plan[rank].push_back(std::move(bin->sequences));
      ++bin;
    }
  }
  return plan;
}

}  // namespace
}  // namespace qrm_fast

PYBIND11_MODULE(_host, m) {
  m.def("pack", &qrm_fast::pack);
  m.def("plan_microbatches", &qrm_fast::plan_microbatches);
}
