// Every instruction set's head kernels against plain loops in double: the extension itself only runs the best of them.
// Prints a line per set that this CPU has; exits with 1 where one is wrong.
#include "../csrc/cpu/head/tiles.h"

#include <cstdio>
#include <vector>

#include "../csrc/cpu/head/panels.h"

using namespace qrm_fast;

namespace {

int failures = 0;

void expect(const char* set, const char* what, double got, double want, double tolerance) {
  if (!(std::abs(got - want) <= tolerance) && !(std::isnan(got) && std::isnan(want))) {
    std::printf("%s %s: got %.9g, want %.9g\n", set, what, got, want);
    ++failures;
  }
}

template <typename S>
std::vector<S> values(int64_t count, double scale) {
  std::vector<S> x(count);
  uint32_t state = 12345;
  for (S& v : x) {
    state = state * 1664525 + 1013904223;
    v = static_cast<S>((state >> 8) / double(1 << 24) * 2 * scale - scale);
  }
  return x;
}

template <typename S>
void check(const char* set, const HeadKernels<S>& kernels) {
  const double eps = sizeof(S) == 4 ? 2e-6 : 1e-13;
  for (int64_t n : {1, 7, 16, 63, 250}) {
    for (double softcap : {0.0, 3.0}) {
      const auto bias = values<S>(n, 1);
      auto z = values<S>(n, 20);
      std::vector<double> want(n);
      double max = -1e300, sum = 0, weighted = 0;
      const LogitTransform<S> transform{bias.data(), S(softcap), S(0.7)};
      for (int64_t i = 0; i < n; ++i) {
        want[i] = double(z[i]) + bias[i];
        if (softcap != 0) want[i] = softcap * std::tanh(want[i] / softcap);
        want[i] /= double(S(0.7));
        max = std::max(max, want[i]);
      }
      for (double w : want) {
        sum += std::exp(w - max);
        weighted += (w - max) * std::exp(w - max);
      }
      kernels.finish(z.data(), n, transform);
      for (int64_t i = 0; i < n; ++i) expect(set, "finish", z[i], want[i], 30 * eps);
      const SoftmaxStats<S> stats = kernels.fold(z.data(), n);
      expect(set, "max", stats.max, max, 30 * eps);
      expect(set, "sum", stats.sum, sum, 30 * eps * sum);
      expect(set, "weighted", stats.weighted, weighted, 60 * eps * sum);
      const double lse = max + std::log(sum), h = std::log(sum) - weighted / sum;
      const S rounded = S(lse);
      kernels.gradient(z.data(), n, transform, {S(0.8), S(-0.3), rounded, S(lse - rounded), S(h)});
      for (int64_t i = 0; i < n; ++i) {
        const double p = std::exp(want[i] - lse), y = softcap == 0 ? 0 : want[i] * double(S(0.7)) / softcap;
        const double d = -p * (0.8 - 0.3 * (want[i] - lse + h)) / 0.7 * (1 - y * y);
        expect(set, "gradient", z[i], d, 30 * eps);
      }
    }
  }
  const S inf = std::numeric_limits<S>::infinity();
  std::vector<S> masked(20, -inf);
  expect(set, "all masked", kernels.fold(masked.data(), 20).sum, 0, 0);
  masked[18] = S(NAN);
  expect(set, "NaN among masked", kernels.fold(masked.data(), 20).sum, NAN, 0);
  masked[18] = S(-1000);
  expect(set, "one unmasked", kernels.fold(masked.data(), 20).sum, 1, 0);
  std::printf("%s %s\n", set, sizeof(S) == 4 ? "float" : "double");
}

// A tile over a depth beyond two panels: A by rows, by columns, and in panels of nr.
template <typename S>
void check_tile(const char* set, const GemmKernel<S>& gemm) {
  const double eps = sizeof(S) == 4 ? 2e-6 : 1e-13;
  const int64_t mr = gemm.mr, nr = gemm.nr, depth = 2 * nr + 5;
  const auto a = values<S>(3 * nr * mr, 1), b = values<S>(depth * nr, 2);
  struct Layout {
    int64_t row, step, jump;
  };
  for (const Layout& l : {Layout{3 * nr, 1, 0}, Layout{1, mr, 0}, Layout{nr, 1, mr * nr - nr}}) {
    for (bool accumulate : {true, false}) {
      std::vector<S> c(mr * nr, S(0.5));
      gemm.tile({depth, a.data(), l.row, l.step, l.jump, b.data(), c.data(), nr, accumulate, a.data(), 0});
      for (int64_t i = 0; i < mr; ++i) {
        for (int64_t j = 0; j < nr; ++j) {
          double want = accumulate ? 0.5 : 0;
          for (int64_t k = 0; k < depth; ++k) {
            want += double(a[i * l.row + k * l.step + k / nr * l.jump]) * b[k * nr + j];
          }
          expect(set, "tile", c[i * nr + j], want, 40 * eps);
        }
      }
    }
  }
}

#if defined(__x86_64__)
// The tile whose elements are pairs of bfloat16, over a depth beyond two panels.
void check_pair_tile(const PanelKernels<float>& kernels) {
  const int64_t mr = kernels.gemm.mr, nr = kernels.gemm.nr, depth = 2 * nr + 5;
  const auto halves = [](int64_t count, double scale) {  // truncated to bfloat16
    std::vector<float> x = values<float>(count, scale);
    for (float& v : x) {
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      bits &= 0xffff0000;
      std::memcpy(&v, &bits, 4);
    }
    return x;
  };
  const auto words = [](const std::vector<float>& low, const std::vector<float>& high) {
    std::vector<float> out(low.size());
    for (size_t i = 0; i < out.size(); ++i) {
      uint32_t a, b;
      std::memcpy(&a, &low[i], 4);
      std::memcpy(&b, &high[i], 4);
      a = a >> 16 | b;
      std::memcpy(&out[i], &a, 4);
    }
    return out;
  };
  const std::vector<float> a[] = {halves(mr * depth, 1), halves(mr * depth, 3)};
  const std::vector<float> b[] = {halves(depth * nr, 2), halves(depth * nr, 0.5)};
  const std::vector<float> left = words(a[0], a[1]), right = words(b[0], b[1]);
  for (bool accumulate : {true, false}) {
    std::vector<float> c(mr * nr, 0.5f);
    kernels.pair_tile(
        {depth, left.data(), depth, 1, 0, right.data(), c.data(), nr, accumulate, left.data(), 0, right.data()});
    for (int64_t i = 0; i < mr; ++i) {
      for (int64_t j = 0; j < nr; ++j) {
        double want = accumulate ? 0.5 : 0;
        for (int64_t k = 0; k < depth; ++k) {
          for (int h : {0, 1}) want += double(a[h][i * depth + k]) * b[h][k * nr + j];
        }
        expect("avx512bf16", "pair tile", c[i * nr + j], want, 40 * 2e-6);
      }
    }
  }
  std::printf("avx512bf16 pairs\n");
}
#endif

template <typename S>
void check_panels(const char* set, const PanelKernels<S>& kernels) {
  check_tile(set, kernels.gemm);
  const double eps = sizeof(S) == 4 ? 2e-6 : 1e-13;
  const int64_t nr = kernels.gemm.nr;
  const S inf = std::numeric_limits<S>::infinity();
  for (int64_t n : {1, 9, 50}) {
    for (double softcap : {0.0, 3.0}) {
      const auto bias = values<S>(n, 1);
      auto z = values<S>(n * nr, 20), temperature = values<S>(nr, 0.3);
      for (S& t : temperature) t += S(1);
      const auto product = z;
      kernels.finish(z.data(), n, {bias.data(), S(softcap), temperature.data()});
      std::vector<S> stats(3 * nr, S(0)), more(3 * nr, S(0)), fields[5];
      std::fill_n(stats.begin(), nr, -inf);
      std::fill_n(more.begin(), nr, -inf);
      kernels.fold(z.data(), n / 2, stats.data());
      kernels.fold(z.data() + n / 2 * nr, n - n / 2, more.data());
      kernels.merge(stats.data(), more.data());
      for (auto& f : fields) f.resize(nr);
      std::vector<double> want(n * nr);
      for (int64_t j = 0; j < nr; ++j) {
        double max = -1e300, sum = 0, weighted = 0;
        for (int64_t i = 0; i < n; ++i) {
          double x = double(product[i * nr + j]) + bias[i];
          if (softcap != 0) x = softcap * std::tanh(x / softcap);
          want[i * nr + j] = x / temperature[j];
          expect(set, "panel finish", z[i * nr + j], want[i * nr + j], 30 * eps);
          max = std::max(max, want[i * nr + j]);
        }
        for (int64_t i = 0; i < n; ++i) {
          const double shifted = want[i * nr + j] - max;
          sum += std::exp(shifted);
          weighted += shifted * std::exp(shifted);
        }
        expect(set, "panel max", stats[j], max, 30 * eps);
        expect(set, "panel sum", stats[nr + j], sum, 30 * eps * sum);
        expect(set, "panel weighted", stats[2 * nr + j], weighted, 60 * eps * sum);
        const double lse = max + std::log(sum);
        fields[0][j] = S(0.8) / temperature[j];
        fields[1][j] = S(-0.3) / temperature[j];
        fields[2][j] = S(lse);
        fields[3][j] = S(lse - fields[2][j]);
        fields[4][j] = S(std::log(sum) - weighted / sum);
      }
      kernels.gradient(z.data(), n,
                       {fields[0].data(), fields[1].data(), fields[2].data(), fields[3].data(), fields[4].data(),
                        temperature.data(), S(softcap)});
      for (int64_t i = 0; i < n * nr; ++i) {
        const int64_t j = i % nr;
        const double logp = want[i] - fields[2][j] - fields[3][j];
        const double y = softcap == 0 ? 0 : want[i] * temperature[j] / softcap;
        const double d = -std::exp(logp) * (0.8 - 0.3 * (logp + fields[4][j])) / temperature[j] * (1 - y * y);
        expect(set, "panel gradient", z[i], d, 30 * eps);
      }
    }
  }
  std::vector<S> z(20 * nr, -inf), stats(3 * nr, S(0));
  std::fill_n(stats.begin(), nr, -inf);
  kernels.fold(z.data(), 20, stats.data());
  expect(set, "panel all masked", stats[nr], 0, 0);
  z[18 * nr] = S(NAN);
  z[18 * nr + 1] = S(-1000);
  kernels.fold(z.data(), 20, stats.data());
  expect(set, "panel NaN among masked", stats[nr], NAN, 0);
  expect(set, "panel one unmasked", stats[nr + 1], 1, 0);
  expect(set, "panel one unmasked, weighted", stats[2 * nr + 1], 0, 0);
}

template <int Bytes, typename S>
void check_set_of(const char* set) {
  check(set, HeadKernels<S>::template compiled<Bytes>());
  check_panels(set, PanelKernels<S>::template compiled<Bytes>());
  check_panels(set, PanelKernels<S>::template compiled<Bytes, 2>());
  check_panels(set, PanelKernels<S>::template compiled<Bytes, 4>());
}

template <int Bytes>
void check_set(const char* set) {
  check_set_of<Bytes, float>(set);
  check_set_of<Bytes, double>(set);
}

}  // namespace

int main() {
  check_set<16>("portable");
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v3")) check_set<32>("avx2");
  if (__builtin_cpu_supports("x86-64-v4")) check_set<64>("avx512");
  for (int64_t rows : {1, 32, 64}) {
    const auto& kernels = panel_kernels<float>(rows);
    if (kernels.pair_tile != nullptr) check_pair_tile(kernels);
  }
#endif
  return failures > 0;
}
