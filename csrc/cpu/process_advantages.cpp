// The advantage of every step from its return: the group baselines of PURE and of its two codes, and the moments that
// whitening needs. Reads and writes 8 bytes per step, some 40 times fewer than tokens; rows are read only where they
// carry a penalty. step_rows then writes the rows. process_rows fuses all of it, step rewards to rows; returns and
// advantages of the steps stay in cache, and each row is written once and never read. In double; sequences run in
// parallel, groups and moments are summed in the order of the sequences, so no bit depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "../dtypes.h"
#include "memory.h"
#include "min_form_returns.h"
#include "moments.h"
#include "packed/cu_seqlens.h"
#include "packed/groups.h"
#include "packed/steps.h"
#include "step_rows.h"

namespace qrm_fast {
namespace {

enum class Preset { paper, paper_step, openrlhf, verl };

Preset preset_of(const std::string& name) {
  if (name == "paper") return Preset::paper;
  if (name == "paper-step") return Preset::paper_step;
  if (name == "openrlhf") return Preset::openrlhf;
  STD_TORCH_CHECK(name == "verl", "the public function admits only known presets");
  return Preset::verl;
}

// A sequence's share of its group's baseline, numerator over denominator; 0 and 0 where it does not count.
struct Share {
  double numerator = 0;
  double denominator = 0;
};

// The shares of the others in the group, summed and divided; `alone` where no other counts.
std::vector<double> leave_one_out(const Groups& groups, const std::vector<Share>& shares, double alone) {
  std::vector<double> baselines(shares.size());
  for (int64_t id = 0; id < groups.size(); ++id) {
    const Groups::Members members = groups.members(id);
    Share sum;
    for (const int64_t i : members) {
      sum.numerator += shares[i].numerator;
      sum.denominator += shares[i].denominator;
    }
    for (const int64_t i : members) {
      const double others = sum.denominator - shares[i].denominator;
      baselines[i] = others > 0 ? (sum.numerator - shares[i].numerator) / others : alone;
    }
  }
  return baselines;
}

// The step ends of one sequence that begins at row bos; with those of the sequences behind it there are `readable`.
template <typename I>
struct Ends {
  const I* ends;
  int64_t num_steps;
  int64_t readable;
  int64_t bos;

  // Rows of the steps from k > 0 on, none in lanes behind the last.
  QRM_FAST_INLINE Simd8::Vec lengths_from(int64_t k) const {
    typedef I Ints __attribute__((vector_size(Simd8::kLanes * sizeof(I))));
    Ints end = {}, before = {};
    if (k + Simd8::kLanes <= readable) {
      std::memcpy(&end, ends + k, sizeof end);
      std::memcpy(&before, ends + k - 1, sizeof before);
    } else {
      for (int64_t j = 0; k + j < num_steps; ++j) {
        end[j] = ends[k + j];
        before[j] = ends[k + j - 1];
      }
    }
    return Simd8::keep_first(__builtin_convertvector(end - before, Simd8::Vec), num_steps - k);
  }
};

// The returns of all rows of a sequence of steps, read in whole vectors.
template <typename I>
QRM_FAST_CLONES double sum_of_returns(const double* returns, const Ends<I>& x) {
  Simd8::Vec sums = {};
  for (int64_t k = 1; k < x.num_steps; k += Simd8::kLanes) {
    sums += Simd8::keep_first(Simd8::load(returns + k), x.num_steps - k) * x.lengths_from(k);
  }
  return returns[0] * (x.ends[0] + 1 - x.bos) + Simd8::sum(sums);
}

// Counted values, each `n` times, about the first of them: the mean is no further from it than the spread allows.
struct Deviations {
  double count = 0, origin = 0, sum = 0, squares = 0;
  double lost = 0;  // times a value that is not finite
  bool drop_zeros = false;

  void add(double value, double n) {
    if (!(n > 0) || (drop_zeros && value == 0)) return;
    if (!std::isfinite(value)) {
      lost += n;
      return;
    }
    if (count == 0) origin = value;
    const double deviation = value - origin;
    count += n;
    sum += n * deviation;
    squares += n * deviation * deviation;
  }
  Moments moments() const {
    if (count == 0) return {};
    return {count, origin + sum / count, std::max(squares - sum * sum / count, 0.0)};
  }
};

// Adds the levels of the steps behind a sequence's first, read in whole vectors.
template <typename I>
QRM_FAST_CLONES void add_steps(const double* levels, const Ends<I>& ends, bool mask_step_ends, Deviations& x) {
  int64_t k = 1;
  for (; k < ends.num_steps && x.count == 0; ++k) x.add(levels[k], ends.ends[k] - ends.ends[k - 1] - mask_step_ends);
  const Simd8::Vec origin = Simd8::broadcast(x.origin), fewer = Simd8::broadcast(mask_step_ends);
  Simd8::Vec count = {}, sum = {}, squares = {}, lost = {};
  for (; k < ends.num_steps; k += Simd8::kLanes) {
    const Simd8::Vec level = Simd8::load(levels + k);
    Simd8::Vec n = ends.lengths_from(k) - fewer;
    n = n > 0.0 ? n : Simd8::Vec{};
    lost += level - level == 0.0 ? Simd8::Vec{} : n;
    n = level - level == 0.0 ? n : Simd8::Vec{};
    if (x.drop_zeros) n = level == 0.0 ? Simd8::Vec{} : n;
    const Simd8::Vec deviation = n == 0.0 ? Simd8::Vec{} : level - origin;
    count += n;
    sum += n * deviation;
    squares += n * deviation * deviation;
  }
  x.count += Simd8::sum(count);
  x.sum += Simd8::sum(sum);
  x.squares += Simd8::sum(squares);
  x.lost += Simd8::sum(lost);
}

// What process returns add to the rows of their steps, over `base`.
QRM_FAST_CLONES void set_levels(const double* returns, int64_t n, double coef, double base, double* levels) {
  for (int64_t k = 0; k < n; ++k) levels[k] = coef * returns[k] + base;
}

template <typename A>
struct Batch {
  const CuSeqlens& cu;
  const Steps& steps;
  const A* outcomes;       // [S] or null
  const bool* has_answer;  // [S] or null
  const A* penalty;        // [T] or null, summed over the rest of its sequence
  Preset preset;
  double max_gen_len;
  double process_coef;
  double outcome_coef;
  bool mask_step_ends;

  int64_t num_rows(int64_t i) const { return cu[i + 1] - cu[i]; }
  bool has_steps(int64_t i) const { return steps.count(i) > 0; }
  bool asked(int64_t i) const { return outcomes != nullptr && (has_answer == nullptr || has_answer[i]); }
  double outcome(int64_t i) const { return asked(i) ? static_cast<double>(outcomes[i]) : 0; }

  // The same function of the step ends, whichever integers they are.
  template <typename F>
  auto with_ends(int64_t i, F&& f) const {
    const auto of = [&](const auto* ends) {
      return Ends<std::remove_const_t<std::remove_pointer_t<decltype(ends)>>>{
          ends + steps.first(i), steps.count(i), steps.first(cu.num_sequences()) - steps.first(i), cu[i]};
    };
    return steps.wide() ? f(of(steps.template ends<int64_t>())) : f(of(steps.template ends<int32_t>()));
  }

  double sum_of_returns(int64_t i, const double* returns) const {
    if (!has_steps(i)) return 0;
    return with_ends(i, [&](const auto& ends) { return qrm_fast::sum_of_returns(returns, ends); });
  }

  // What verl compares: the return of every row with outcome and penalty in it, summed.
  double sum_of_scores(int64_t i, const double* returns) const {
    double sum = process_coef * sum_of_returns(i, returns) + outcome_coef * outcome(i) * num_rows(i);
    for (int64_t t = cu[i]; penalty != nullptr && t < cu[i + 1]; ++t) sum -= penalty[t];
    return sum;
  }

  // `returns`: of the sequence's steps, read in whole vectors; NaN where a step reward is not finite.
  Share process_share(int64_t i, const double* returns) const {
    const Share share = preset == Preset::paper        ? Share{sum_of_returns(i, returns) / max_gen_len, 1}
                        : preset == Preset::paper_step ? Share{returns[0] / steps.count(i), 1}
                        : preset == Preset::openrlhf   ? Share{returns[0], static_cast<double>(num_rows(i))}
                                                       : Share{sum_of_scores(i, returns) / max_gen_len, 1};
    const bool counts = preset == Preset::verl ? num_rows(i) > 0 : has_steps(i);
    return counts && std::isfinite(share.numerator) ? share : Share{};
  }

  Share outcome_share(int64_t i) const {
    return asked(i) && num_rows(i) > 0 && std::isfinite(outcome(i)) ? Share{outcome(i), 1} : Share{};
  }

  // What every row of the sequence holds beside its step's return; NaN where `process`, its first return, is.
  double constant(int64_t i, double process, double process_baseline, double outcome_baseline) const {
    const double nan_or_0 = process - process;
    if (preset == Preset::verl) return outcome_coef * outcome(i) - process_baseline + nan_or_0;
    const double constant = asked(i) ? outcome_coef * (outcome(i) - outcome_baseline) : 0;
    if (preset == Preset::paper && has_steps(i)) return constant - process_coef * (nan_or_0 + process_baseline);
    return constant + nan_or_0;
  }

  // How often paper-step and openrlhf subtract the process baseline from step k of sequence i on: once per step, or
  // once per row that does not end one.
  double repeats(int64_t i, int64_t k) const {
    const int64_t remaining = steps.first(i + 1) - k;
    if (preset == Preset::paper_step) return remaining;
    return steps.end(steps.first(i + 1) - 1) + 1 - steps.begin(i, k) - remaining;
  }

  // Of the rows that are not 0 where `drop_zeros`, of all unmasked ones else; rows that are not finite count nowhere.
  // `levels`: of the sequence's steps, read in whole vectors.
  Deviations deviations(int64_t i, const double* levels, double base, bool drop_zeros) const {
    const int64_t first = steps.first(i), last = steps.first(i + 1);
    Deviations x;
    x.drop_zeros = drop_zeros;
    if (penalty != nullptr) {
      for (int64_t k = first; k <= last; ++k) {
        const int64_t end = k < last ? steps.end(k) + !mask_step_ends : cu[i + 1];
        const double level = k < last ? levels[k - first] : base;
        for (int64_t t = steps.begin(i, k); t < end; ++t) x.add(level - penalty[t], 1);
      }
    } else {
      if (first < last) {
        x.add(levels[0], steps.end(first) + !mask_step_ends - cu[i]);
        with_ends(i, [&](const auto& ends) { add_steps(levels, ends, mask_step_ends, x); });
      }
      x.add(base, cu[i + 1] - steps.begin(i, last));
    }
    return x;
  }
};

// Levels of the steps, bases of the rows after them, and the moments that whitening needs, as two sets.
// `take_returns(i, x)` puts the returns of a sequence with steps into x, which has room for whole vectors.
template <typename A, typename F>
void step_advantages(const Batch<A>& batch, const Groups& groups, F&& take_returns, double* level, double* base,
                     Moments* sets) {
  const int64_t num_sequences = groups.size();
  const Steps& steps = batch.steps;
  const int64_t room = whole_vectors(steps.longest()) + Simd8::kLanes;  // vectors begin at the second step, too
  std::vector<Share> process(num_sequences), outcome(num_sequences);
  torch::stable::parallel_for(0, num_sequences, 16, [&](int64_t begin, int64_t end) {
    std::vector<double> returns(room);
    for (int64_t i = begin; i < end; ++i) {
      if (batch.has_steps(i)) take_returns(i, returns.data());
      process[i] = batch.process_share(i, returns.data());
      outcome[i] = batch.outcome_share(i);
      std::copy_n(returns.begin(), steps.count(i), level + steps.first(i));
    }
  });
  // openrlhf shifts outcomes to {-1, 0}, which shows only where there are no others to compare with.
  const bool openrlhf = batch.preset == Preset::openrlhf, whitens = openrlhf || batch.preset == Preset::verl;
  const bool repeats = openrlhf || batch.preset == Preset::paper_step;
  const std::vector<double> process_baseline = leave_one_out(groups, process, 0);
  const std::vector<double> outcome_baseline = leave_one_out(groups, outcome, openrlhf ? 1 : 0);
  std::vector<Moments> parts(num_sequences);
  std::vector<int64_t> num_zeros(num_sequences);
  torch::stable::parallel_for(0, num_sequences, 16, [&](int64_t begin, int64_t end) {
    std::vector<double> levels(room);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = steps.first(i), n = steps.count(i);
      base[i] = batch.constant(i, n > 0 ? level[first] : 0, process_baseline[i], outcome_baseline[i]);
      for (int64_t k = first; repeats && k < first + n; ++k) level[k] -= process_baseline[i] * batch.repeats(i, k);
      set_levels(level + first, n, batch.process_coef, base[i], levels.data());
      std::copy_n(levels.begin(), n, level + first);
      if (!whitens) continue;
      const Deviations rows = batch.deviations(i, levels.data(), base[i], openrlhf);
      parts[i] = rows.moments();
      if (openrlhf && std::isfinite(base[i])) num_zeros[i] = batch.num_rows(i) - rows.count - rows.lost;
    }
  });
  sets[0] = join(num_sequences, [&](int64_t i) { return parts[i]; });
  for (const int64_t n : num_zeros) sets[1].count += n;
}

std::tuple<Tensor, Tensor, Tensor> process_advantages(const Tensor& returns, const Tensor& step_ends,
                                                      const Tensor& cu_seqlens, const Tensor& group_ids,
                                                      const std::optional<Tensor>& outcome_rewards,
                                                      const std::optional<Tensor>& has_answer,
                                                      const std::optional<Tensor>& penalty, int64_t num_tokens,
                                                      std::string preset, double max_gen_len, double process_coef,
                                                      double outcome_coef, bool mask_step_ends) {
  const CuSeqlens cu(cu_seqlens, num_tokens);
  const Steps steps(step_ends, cu);
  const Groups groups(group_ids);
  Tensor levels = torch::stable::new_empty(returns, {returns.size(0)});
  Tensor bases = torch::stable::new_empty(returns, {groups.size()});
  Tensor stats = torch::stable::new_zeros(returns, {2, 3});
  const auto dtype = outcome_rewards.has_value() ? outcome_rewards->scalar_type()
                     : penalty.has_value()       ? penalty->scalar_type()
                                                 : ScalarType::Float;
  dispatch_floating(dtype, [&](auto zero) {
    using A = acc_t<decltype(zero)>;
    const Batch<A> batch{cu,
                         steps,
                         data_or_null<A>(outcome_rewards),
                         data_or_null<bool>(has_answer),
                         data_or_null<A>(penalty),
                         preset_of(preset),
                         max_gen_len,
                         process_coef,
                         outcome_coef,
                         mask_step_ends};
    const double* given = data<double>(returns);
    const auto take_returns = [&](int64_t i, double* x) { std::copy_n(given + steps.first(i), steps.count(i), x); };
    step_advantages(batch, groups, take_returns, mutable_data<double>(levels), mutable_data<double>(bases),
                    mutable_data<Moments>(stats));
  });
  return {levels, bases, stats};
}

Tensor process_rows(const Tensor& step_rewards, const Tensor& step_ends, const Tensor& cu_seqlens,
                    const Tensor& group_ids, const std::optional<Tensor>& outcome_rewards,
                    const std::optional<Tensor>& has_answer, const std::optional<Tensor>& penalty, int64_t num_tokens,
                    std::string form, double temperature, std::string preset, double max_gen_len, double process_coef,
                    double outcome_coef, bool mask_step_ends) {
  const CuSeqlens cu(cu_seqlens, num_tokens);
  Steps::check(step_ends, num_tokens);
  const Steps steps(step_ends, cu);
  const Groups groups(group_ids);
  Tensor out = fresh_rows(step_rewards, num_tokens);
  const std::unique_ptr<double[]> level(new double[step_rewards.size(0)]);
  std::vector<double> bases(groups.size());
  Moments sets[2];
  dispatch_floating(step_rewards.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* rewards = data<T>(step_rewards);
    const A* rows_of_penalty = data_or_null<A>(penalty);
    const Batch<A> batch{cu,
                         steps,
                         data_or_null<A>(outcome_rewards),
                         data_or_null<bool>(has_answer),
                         rows_of_penalty,
                         preset_of(preset),
                         max_gen_len,
                         process_coef,
                         outcome_coef,
                         mask_step_ends};
    const Form known = form_of(form);
    const auto take_returns = [&](int64_t i, double* x) {
      sequence_returns(rewards + steps.first(i), steps.count(i), known, temperature, x);
    };
    step_advantages(batch, groups, take_returns, level.get(), bases.data(), sets);
    const Whitening whitening = batch.preset == Preset::openrlhf ? whitening_of(sets, "nonzero")
                                : batch.preset == Preset::verl   ? whitening_of(sets, "unbiased")
                                                                 : Whitening{};
    const StepRows<A> rows{cu, steps, level.get(), bases.data(), rows_of_penalty, whitening, mask_step_ends};
    rows.write(num_tokens, mutable_data<A>(out));
  });
  return out;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) {
  m.impl("process_advantages", TORCH_BOX(&qrm_fast::process_advantages));
  m.impl("process_rows", TORCH_BOX(&qrm_fast::process_rows));
}
