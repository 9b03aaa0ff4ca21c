// Every instruction set's head kernels against plain loops in double: the extension itself only runs the best of them.
// Prints a line per set that this CPU has; exits with 1 where one is wrong.
#include "../csrc/cpu/head_tiles.h"

#include <cstdio>
#include <vector>

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
  const int64_t depth = 37;
  const auto a = values<S>(depth * kernels.gemm.mr, 1), b = values<S>(depth * kernels.gemm.nr, 2);
  std::vector<S> c(kernels.gemm.mr * kernels.gemm.nr, S(0.5));
  for (bool accumulate : {true, false}) {
    kernels.gemm.tile(depth, a.data(), b.data(), c.data(), kernels.gemm.nr, accumulate);
    for (int64_t i = 0; i < kernels.gemm.mr; ++i) {
      for (int64_t j = 0; j < kernels.gemm.nr; ++j) {
        double want = accumulate ? 0.5 : 0;
        for (int64_t k = 0; k < depth; ++k) want += double(a[k * kernels.gemm.mr + i]) * b[k * kernels.gemm.nr + j];
        expect(set, "tile", c[i * kernels.gemm.nr + j], want, 40 * eps);
      }
    }
  }
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

}  // namespace

int main() {
  check("portable", PortableHead<float>::kernels());
  check("portable", PortableHead<double>::kernels());
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    check("avx2", Avx2Head<float>::kernels());
    check("avx2", Avx2Head<double>::kernels());
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    check("avx512", Avx512Head<float>::kernels());
    check("avx512", Avx512Head<double>::kernels());
  }
#endif
  return failures > 0;
}
