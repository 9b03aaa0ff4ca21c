// How a kernel is compiled for several instruction sets, and chosen at run time.
//
// Plain loops: a named function with QRM_FAST_CLONES is compiled once per set, and the loader picks. The compiler
// vectorises it to that set's registers and fused multiply-adds. The attribute does not reach lambdas.
//
// Vectors of a given width (simd.h): a function template over their Bytes, always inlined, is compiled by
// Compiled<Bytes, f>::run for the set that has such registers. `widest` picks the Bytes of this processor:
//   static const auto kernel = widest([](auto bytes) { return Compiled<bytes, f<bytes, float>>::run; });
#pragma once
#include <type_traits>

#define QRM_FAST_INLINE [[gnu::always_inline]] inline

// The levels, unlike "avx512f" and "avx2", include all of the set and the fused multiply-add.
#define QRM_FAST_AVX512 "arch=x86-64-v4"
#define QRM_FAST_AVX2 "arch=x86-64-v3"

#if defined(__x86_64__) && !defined(__clang__)
#define QRM_FAST_CLONES [[gnu::target_clones(QRM_FAST_AVX512, QRM_FAST_AVX2, "default")]]
#else
#define QRM_FAST_CLONES
#endif

namespace qrm_fast {

template <int Bytes, auto F>
struct Compiled;

template <typename R, typename... Args, R (*F)(Args...)>
struct Compiled<16, F> {
  static R run(Args... args) { return F(args...); }
};

#if defined(__x86_64__)
template <typename R, typename... Args, R (*F)(Args...)>
struct Compiled<32, F> {
  [[gnu::target(QRM_FAST_AVX2)]] static R run(Args... args) { return F(args...); }
};

template <typename R, typename... Args, R (*F)(Args...)>
struct Compiled<64, F> {
  [[gnu::target(QRM_FAST_AVX512)]] static R run(Args... args) { return F(args...); }
  // With the products of pairs of bfloat16, which not all of these processors have.
  [[gnu::target(QRM_FAST_AVX512 ",avx512bf16")]] static R run_bf16(Args... args) { return F(args...); }
};
#endif

// f(Bytes), a constant as an argument, with the widest vectors of this processor.
template <typename F>
auto widest(F f) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) return f(std::integral_constant<int, 64>{});
  if (__builtin_cpu_supports("x86-64-v3")) return f(std::integral_constant<int, 32>{});
#endif
  return f(std::integral_constant<int, 16>{});
}

}  // namespace qrm_fast
