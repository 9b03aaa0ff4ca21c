// The CUDA scans' block logic on the CPU: every estimator over packed sequences against its recurrence in double.
// Units run in the order of their tickets, threads one after the other. Exits with 1 where a row is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "../csrc/cuda/scan_rules.h"
#include "../csrc/cuda/scan_unit.h"

using namespace qrm_fast;

namespace {

int failures = 0;

struct Boundaries {
  const int64_t* data;
  int64_t size;
  int64_t operator[](int64_t i) const { return data[i]; }
  int64_t num_sequences() const { return size - 1; }
};

struct FloatRows {
  using Bits = float;
  const float* data;
  template <bool kAll, int kRows>
  void load(int64_t t, int rest, Bits (&bits)[kRows]) const {
    for (int k = 0; k < kRows; ++k) bits[k] = kAll || k * THREADS < rest ? data[t + k * THREADS] : 0;
  }
  template <int kRows>
  void widen(Bits (&)[kRows]) const {}
  static float value(Bits bits) { return bits; }
};

template <typename R>
struct Same {
  using Rows = R;
  Rows rows;
  const Rows& operator()(int64_t) const { return rows; }
};

struct Random {
  uint32_t state = 1;
  float operator()() {
    state = state * 1664525 + 1013904223;
    return (state >> 8) / float(1 << 24);
  }
};

using Results = std::vector<std::vector<float>>;

template <bool kMasked, typename R>
Results scan_as(const R& rows, const std::vector<std::vector<float>>& in, const std::vector<int64_t>& cu,
                const bool* mask, const float* bootstrap) {
  const int64_t num_tokens = cu.back(), num_units = (num_tokens + BLOCK - 1) / BLOCK;
  Results out(R::kOutputs, std::vector<float>(num_tokens, 7e7f));
  std::vector<Published<typename R::Map>> blocks(num_units), groups(num_units);
  UnitScan<Same<R>, kMasked, FloatRows, Boundaries> unit{
      {}, {}, mask, bootstrap, {rows}, {cu.data(), int64_t(cu.size())}, num_tokens, blocks.data(), groups.data()};
  for (int i = 0; i < R::kInputs; ++i) unit.in[i] = {in[i].data()};
  for (int i = 0; i < R::kOutputs; ++i) unit.out[i] = out[i].data();
  auto memory = std::make_unique<UnitMemory<R>>();
  for (int64_t u = num_units - 1; u >= 0; --u) {
    const int64_t low = u * BLOCK, high = std::min(low + BLOCK, num_tokens);
    const int64_t first = first_ending_after(unit.cu, low), last = first_ending_after(unit.cu, high - 1);
    unit.run(*memory, u, UnitRows::of(unit.cu, first, last, high));
  }
  return out;
}

template <typename R>
Results scan(const R& rows, const std::vector<std::vector<float>>& in, const std::vector<int64_t>& cu, const bool* mask,
             const float* bootstrap) {
  return mask ? scan_as<true>(rows, in, cu, mask, bootstrap) : scan_as<false>(rows, in, cu, mask, bootstrap);
}

double smaller(double a, double b) { return a < b || a != a ? a : b; }

// The recurrences over one sequence, as the public functions state them.
struct State {
  double x, next, target;
};
State row(const GaeRows& rule, const float* in, State s, double* out) {
  const double a = in[0] + rule.gamma * s.next - in[1] + rule.decay * s.x;
  out[0] = a, out[1] = a + in[1];
  return {a, in[1], 0};
}
State row(const ReturnRows& rule, const float* in, State s, double* out) {
  return {out[0] = in[0] + rule.gamma * s.next, out[0], 0};
}
State row(const MinRows& rule, const float* in, State s, double* out) {
  const double q = smaller(in[0], s.next);
  out[0] = q - in[1], out[1] = q;
  return {0, (1.0 - rule.lam) * in[1] + (rule.lam == 0 ? 0 : rule.lam * q), 0};
}
State row(const VtraceRows& rule, const float* in, State s, double* out) {
  const double rho = smaller(in[2], rule.rho_bar), c = smaller(in[2], rule.c_bar);
  const double x = rho * (in[0] + rule.gamma * s.next - in[1]) + rule.decay * c * s.x;
  out[0] = in[1] + x, out[1] = rho * (in[0] + rule.gamma * s.target - in[1]);
  return {x, in[1], out[0]};
}

template <typename R>
void check(const char* name, const R& rows, double no_bootstrap, const std::vector<int64_t>& lengths, double scale) {
  std::vector<int64_t> cu = {0};
  for (int64_t n : lengths) cu.push_back(cu.back() + n);
  const int64_t num_tokens = cu.back();
  Random random;
  std::vector<std::vector<float>> in(3, std::vector<float>(num_tokens));
  std::unique_ptr<bool[]> mask(new bool[num_tokens]);
  std::vector<float> bootstrap(lengths.size());
  for (int64_t t = 0; t < num_tokens; ++t) {
    in[0][t] = 2 * random() - 1, in[1][t] = 2 * random() - 1, in[2][t] = 2 * random();
    if (std::is_same_v<R, MinRows> && random() < 0.6f) in[0][t] = INFINITY;
    mask[t] = random() < 0.6f;
  }
  for (float& b : bootstrap) b = 2 * random() - 1;
  for (bool masked : {false, true}) {
    for (bool boot : {false, true}) {
      const bool* m = masked ? mask.get() : nullptr;
      const Results got = scan(rows, in, cu, m, boot ? bootstrap.data() : nullptr);
      for (size_t s = 0; s < lengths.size(); ++s) {
        const double b = boot ? bootstrap[s] : no_bootstrap;
        State state = {0, b, b};
        for (int64_t t = cu[s + 1] - 1; t >= cu[s]; --t) {
          double want[2] = {0, 0};
          const float row_in[3] = {in[0][t], in[1][t], in[2][t]};
          if (!masked || mask[t]) state = row(rows, row_in, state, want);
          for (int i = 0; i < R::kOutputs; ++i) {
            const double error = std::abs(got[i][t] - want[i]);
            if (got[i][t] != want[i] && !(error <= 4e-6 * scale) && ++failures < 20) {
              std::printf("%s row %ld of sequence %zu, result %d: got %.9g, want %.9g\n", name, long(t - cu[s]), s, i,
                          got[i][t], want[i]);
            }
          }
        }
        // alone in its batch a sequence has the same bits
        if (lengths[s] == 0 || s % 7 != 0) continue;
        std::vector<std::vector<float>> own;
        for (const auto& column : in) own.emplace_back(column.begin() + cu[s], column.begin() + cu[s + 1]);
        const Results alone =
            scan(rows, own, {0, lengths[s]}, masked ? m + cu[s] : nullptr, boot ? bootstrap.data() + s : nullptr);
        for (int i = 0; i < R::kOutputs; ++i) {
          if (std::memcmp(alone[i].data(), got[i].data() + cu[s], lengths[s] * 4) != 0 && ++failures < 20) {
            std::printf("%s: sequence %zu has other bits alone\n", name, s);
          }
        }
      }
    }
  }
}

void check_index_functions() {
  const int64_t far = (int64_t(1) << 33) + 5, cu[] = {3, 7, far, far + 10 * BLOCK + 1};
  const Boundaries boundaries{cu, 4};
  if (first_ending_after(boundaries, far - 1) != 1 || first_ending_after(boundaries, far) != 2) ++failures;
  const BlockRows last = BlockRows::of(cu[2], cu[3], cu[3]);
  if (last.index != 0 || last.end != cu[3] || last.begin != cu[3] - BLOCK) ++failures;
  const BlockRows third = BlockRows::of(cu[2], cu[3], cu[3] - 2 * BLOCK);
  if (third.index != 2 || third.end != cu[3] - 2 * BLOCK) ++failures;
  const BlockRows first = BlockRows::of(cu[2], cu[3], far + 1);
  if (first.index != 10 || first.begin != far || first.end != far + 1) ++failures;
  const BlockRows none = BlockRows::of(far, far + 1, far);
  if (none.begin != none.end) ++failures;
  if (failures) std::printf("index functions\n");
}

}  // namespace

int main() {
  check_index_functions();
  std::vector<int64_t> many;
  for (int i = 0; i < 500; ++i) many.push_back(i * 37 % 61);
  const std::vector<std::vector<int64_t>> batches = {{},
                                                     {0},
                                                     {1},
                                                     {16, 17, 0, 15, 1, 33},
                                                     many,
                                                     {BLOCK, 1, BLOCK - 1, BLOCK + 1, 3 * BLOCK, 5},
                                                     {5000, 3, 2000, 1, 1, 70},
                                                     {3, GROUP * BLOCK * 2 + 777, 9}};
  for (const auto& lengths : batches) {
    check("gae", GaeRows{0.99f, 0.99f * 0.95f}, 0, lengths, 10);
    check("gae, one step", GaeRows{1, 0}, 0, lengths, 10);
    check("gae, undiscounted", GaeRows{1, 1}, 0, lengths, 300);
    check("gae, long memory", GaeRows{1, 0.99999f}, 0, lengths, 4000);
    check("discounted_returns", ReturnRows{0.9f}, 0, lengths, 10);
    check("vtrace", VtraceRows{0.99f, 0.99f, 1, 1}, 0, lengths, 30);
    check("vtrace, bars apart", VtraceRows{0.99f, 0.9f, 1.5f, 0.8f}, 0, lengths, 30);
    check("min_gae", MinRows{0.95f, 0.05f}, INFINITY, lengths, 2);
    check("min_gae, one step", MinRows{0, 1}, INFINITY, lengths, 2);
    check("min_gae, strict", MinRows{1, 0}, INFINITY, lengths, 2);
  }
  return failures > 0;
}
