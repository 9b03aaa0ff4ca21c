// Reverse scans over packed sequences at the speed of memory.
//
// Rows are read once and results written once. A sequence is cut into blocks of BLOCK rows from its *end*, so that
// neither the packing nor the number of threads moves a cut. In a block, rows are taken a vector at a time: log2(lanes)
// shifts compose the maps of a vector's rows, and one multiply-add per vector, not per row, waits for the rows after
// it. Arithmetic is in double and every result is rounded once: beside memory it is free.
//
// Threads take units of BLOCK packed rows from the end of the batch. A unit serves the blocks that end in it: whole
// short sequences, and of a longer one exactly one block. That block is folded to its map first, which needs no other
// block; then what the rows after it hand on arrives through the unit's slot and goes on to the next slot before the
// block's results are computed, from cache. A thread waits only for units that were taken before its own.
//
// All of it walks from the last row to the first and asks for rows some lines ahead, across sequences and units: the
// processor's own prefetching ends with a page of 4 KiB. (Rows that pass through a buffer are read in their order.)
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "../scan.h"
#include "cu_seqlens.h"
#include "dtypes.h"
#include "masked_rows.h"
#include "simd.h"

namespace qrm_fast {

constexpr int64_t BLOCK = 8192;
constexpr int kMaxLanes = 8;
constexpr int64_t kAheadBytes = 1536;  // of a column, asked for before they are read

// What the rows after a row hand on: the recurrence, and what a row reads of its successor.
struct Handed {
  double x, next;
};

// c^8, ..., c^1 and the constants of the log-step shifts, from the end of a vector of any width.
struct DecayPowers {
  double powers[kMaxLanes];

  DecayPowers() = default;
  explicit DecayPowers(double c) {
    powers[kMaxLanes - 1] = c;
    for (int i = kMaxLanes - 2; i >= 0; --i) powers[i] = decay_product(powers[i + 1], c);
  }
  double operator[](int exponent) const { return powers[kMaxLanes - exponent]; }
};

template <int Bytes>
struct Lanes : Simd<double, Bytes> {
  using Base = Simd<double, Bytes>;
  using typename Base::IntVec;
  using typename Base::Vec;
  static constexpr int kLanes = Base::kLanes;
  typedef float FloatVec __attribute__((vector_size(Bytes / 2)));

  QRM_FAST_INLINE static Vec broadcast(double x) {
#if defined(__x86_64__)
    if constexpr (Bytes > 16) {  // GCC writes lane after lane
      Vec v;
      asm("vbroadcastsd %1, %0" : "=v"(v) : "v"(x));
      return v;
    }
#endif
    return Base::broadcast(x);
  }
  QRM_FAST_INLINE static Vec load(const double* p) { return Base::load(p); }
  QRM_FAST_INLINE static Vec load(const float* p) {
#if defined(__x86_64__)
    if constexpr (Bytes == 64) {  // __builtin_convertvector takes four instructions where there is one
      Vec v;
      asm("vcvtps2pd %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const float (*)[kLanes]>(p)));
      return v;
    }
#endif
    FloatVec v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Vec);
  }
  QRM_FAST_INLINE static void store(double* p, Vec v) { Base::store(p, v); }
  QRM_FAST_INLINE static void store(float* p, Vec v) {
    const FloatVec narrow = __builtin_convertvector(v, FloatVec);
    std::memcpy(p, &narrow, sizeof narrow);
  }

  // The last `count` lanes, 0 < count < kLanes, to p[0..count).
  template <typename S>
  QRM_FAST_INLINE static void store_last(S* p, int64_t count, Vec v) {
    S lanes[kLanes];
    store(lanes, v);
    const S* from = lanes + kLanes - count;
    // Two overlapping copies of a fixed size instead of one of a variable size.
    if (count >= 4) {
      copy_ends<4>(p, from, count);
    } else if (count >= 2) {
      copy_ends<2>(p, from, count);
    } else {
      *p = *from;
    }
  }
  template <int Size, typename S>
  QRM_FAST_INLINE static void copy_ends(S* p, const S* from, int64_t count) {
    S head[Size], tail[Size];
    std::memcpy(head, from, sizeof head);
    std::memcpy(tail, from + count - Size, sizeof tail);
    std::memcpy(p, head, sizeof head);
    std::memcpy(p + count - Size, tail, sizeof tail);
  }

  // Lane i of the result is lane i + K of v, continued by the first lanes of `after`.
  template <int K>
  QRM_FAST_INLINE static Vec later(Vec v, Vec after) {
#if defined(__clang__)
    if constexpr (kLanes == 8) {
      return __builtin_shufflevector(v, after, K, K + 1, K + 2, K + 3, K + 4, K + 5, K + 6, K + 7);
    } else if constexpr (kLanes == 4) {
      return __builtin_shufflevector(v, after, K, K + 1, K + 2, K + 3);
    } else {
      return __builtin_shufflevector(v, after, K, K + 1);
    }
#else
    IntVec order;
    for (int i = 0; i < kLanes; ++i) order[i] = i + K;
    return __builtin_shuffle(v, after, order);
#endif
  }

  // x -> b + c^(rows to the end of the vector) x, given each row's b and one factor c.
  QRM_FAST_INLINE static Vec composed(Vec b, const DecayPowers& c) {
    if constexpr (kLanes > 1) b += c[1] * later<1>(b, Vec{});
    if constexpr (kLanes > 2) b += c[2] * later<2>(b, Vec{});
    if constexpr (kLanes > 4) b += c[4] * later<4>(b, Vec{});
    return b;
  }
  QRM_FAST_INLINE static Vec powers(const DecayPowers& c) { return Base::load(c.powers + kMaxLanes - kLanes); }

  // NaN wins. GCC takes comparisons of vectors apart before it knows the instruction set of the caller.
  QRM_FAST_INLINE static Vec minimum(Vec a, Vec b) {
#if defined(__x86_64__)
    Vec least;  // vminpd gives a where one is NaN
    if constexpr (Bytes == 64) {
      asm("vminpd %1, %2, %0\n\tvcmpunordpd %2, %2, %%k1\n\tvmovapd %2, %0%{%%k1%}"
          : "=&v"(least)
          : "v"(a), "v"(b)
          : "k1");
      return least;
    } else if constexpr (Bytes == 32) {
      Vec unordered;
      asm("vminpd %2, %3, %0\n\tvcmpunordpd %3, %3, %1\n\tvblendvpd %1, %3, %0, %0"
          : "=&x"(least), "=&x"(unordered)
          : "x"(a), "x"(b));
      return least;
    }
#endif
    Vec out;
    for (int i = 0; i < kLanes; ++i) out[i] = qrm_fast::minimum(a[i], b[i]);
    return out;
  }
};

// An estimator is a Rule: the constants of one sequence and
//   Map, kInputs, kOutputs, kNext  the map of a run of rows; columns read and written; the column of which a row reads
//                                  its successor's value, or -1
//   kNoBootstrap, end(bootstrap)   what the end of the sequence hands on
//   next(value)                    what a row reads of its successor, given that column
//   kSameFactor                    whether x enters every row's map by one factor, decay[1]: Vectors then has
//                                  terms(in, after), what the rows add to it
//   Vectors<Bytes>                 the same for a vector of rows, after[i] being lane i's successor:
//     next(in)                     the values that the rows before read
//     composed(in, after)          the maps from each row to the end of the vector
//     map(maps, lane), apply(maps, x)
//     results(in, after, x, later, out)  from what each row, and the row after it, hands on

template <typename Rule, typename S>
struct Columns {
  const S* in[Rule::kInputs];
  S* out[Rule::kOutputs];
  int64_t num_rows;
  int64_t num_readable;  // rows in front of the first that may be read, though nothing depends on them
};

template <typename Rule, typename S, int Bytes>
struct RowScan {
  using L = Lanes<Bytes>;
  using Vec = typename L::Vec;
  using Vectors = typename Rule::template Vectors<Bytes>;
  using Map = typename Rule::Map;

  QRM_FAST_INLINE static void load(const Columns<Rule, S>& c, int64_t t, Vec* in, int64_t ahead_bytes = kAheadBytes) {
    for (int i = 0; i < Rule::kInputs; ++i) {
      const S* p = c.in[i] + t;
      in[i] = L::load(p);
      // In front of the column it is only a hint.
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) - ahead_bytes));
    }
  }
  // The first `count` rows to the last lanes.
  QRM_FAST_INLINE static void load_first(const Columns<Rule, S>& c, int64_t count, Vec* in) {
    if (c.num_readable >= L::kLanes - count) return load(c, count - L::kLanes, in);
    for (int i = 0; i < Rule::kInputs; ++i) {
      S rows[L::kLanes] = {};
      for (int64_t k = 0; k < count; ++k) rows[L::kLanes - count + k] = c.in[i][k];
      in[i] = L::load(rows);
    }
  }

  // The map of all rows.
  QRM_FAST_INLINE static Map fold(const Rule& rule, const Columns<Rule, S>& c, double next) {
    const Vectors vectors(rule);
    Map map = Map::identity();
    Vec in[Rule::kInputs], nexts = L::broadcast(next);
    const auto after = [&]() __attribute__((always_inline)) {
      const Vec own = vectors.next(in), theirs = L::template later<1>(own, nexts);
      nexts = own;
      return theirs;
    };
    const auto add = [&](int lane) __attribute__((always_inline)) {
      map = vectors.map(vectors.composed(in, after()), lane).after(map);
    };
    int64_t t = c.num_rows;
    if constexpr (Rule::kSameFactor) {  // lane by lane, joined once at the end
      Vec sums = {};
      const double factor = rule.decay[L::kLanes];
      for (; t >= L::kLanes; t -= L::kLanes) {
        load(c, t - L::kLanes, in);
        sums = vectors.terms(in, after()) + factor * sums;
      }
      map = {decay_power(rule.decay[1], c.num_rows - t), L::composed(sums, rule.decay)[0]};
    }
    for (; t >= L::kLanes; t -= L::kLanes) {
      load(c, t - L::kLanes, in);
      add(0);
    }
    if (t > 0) {
      load_first(c, t, in);
      add(L::kLanes - t);
    }
    return map;
  }

  QRM_FAST_INLINE static void scan(const Rule& rule, const Columns<Rule, S>& c, Handed handed,
                                   int64_t ahead_bytes = kAheadBytes) {
    const Vectors vectors(rule);
    Vec in[Rule::kInputs], out[Rule::kOutputs], nexts = L::broadcast(handed.next), later = L::broadcast(handed.x);
    const auto step = [&]() __attribute__((always_inline)) {
      const Vec own = vectors.next(in), after = L::template later<1>(own, nexts);
      const Vec x = vectors.apply(vectors.composed(in, after), later[0]);
      vectors.results(in, after, x, L::template later<1>(x, later), out);
      nexts = own;
      later = x;
    };
    int64_t t = c.num_rows;
    for (; t >= L::kLanes; t -= L::kLanes) {
      load(c, t - L::kLanes, in, ahead_bytes);
      step();
      for (int i = 0; i < Rule::kOutputs; ++i) L::store(c.out[i] + t - L::kLanes, out[i]);
    }
    if (t > 0) {
      load_first(c, t, in);
      step();
      for (int i = 0; i < Rule::kOutputs; ++i) L::store_last(c.out[i], t, out[i]);
    }
  }
};

// What the block of a unit hands on to the unit before it.
class Slot {
 public:
  void give(double x) {
    x_ = x;
    given_.store(true, std::memory_order_release);
  }
  double take() const {
    for (int spins = 0; !given_.load(std::memory_order_acquire); ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
    return x_;
  }

 private:
  alignas(64) std::atomic<bool> given_{false};
  double x_;
};

// All sequences follow one rule.
template <typename R>
struct SameRule {
  using Rule = R;
  Rule rule;
  const Rule& operator()(int64_t, Rule&) const { return rule; }
};

template <typename Rules, typename T>
struct PackedScan {
  using Rule = typename Rules::Rule;
  using S = acc_t<T>;

  const T* in[Rule::kInputs];
  S* out[Rule::kOutputs];
  const bool* mask;    // [T] or nullptr
  const S* bootstrap;  // [S] or nullptr
  Rules rules;         // rules(s, own): the Rule of sequence s, perhaps made in `own`
  std::vector<Slot> slots = {};

  void run(const CuSeqlens& cu, int64_t num_tokens) {
    const int64_t num_units = (num_tokens + BLOCK - 1) / BLOCK;
    slots = std::vector<Slot>(num_units + 1);
    std::atomic<int64_t> num_taken{0};
    torch::stable::parallel_for(0, num_units, 1, [&](int64_t, int64_t) {
      for (int64_t i; (i = num_taken.fetch_add(1)) < num_units;) {
        unit(cu, num_tokens, num_units - 1 - i);
      }
    });
  }

  void unit(const CuSeqlens& cu, int64_t num_tokens, int64_t u) {
#if defined(__x86_64__)
    static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx512) return unit_avx512(cu, num_tokens, u);
    if (avx2) return unit_avx2(cu, num_tokens, u);
#endif
    unit_of<16>(cu, num_tokens, u);
  }
#if defined(__x86_64__)
  QRM_FAST_TARGET_AVX512 void unit_avx512(const CuSeqlens& cu, int64_t n, int64_t u) { unit_of<64>(cu, n, u); }
  QRM_FAST_TARGET_AVX2 void unit_avx2(const CuSeqlens& cu, int64_t n, int64_t u) { unit_of<32>(cu, n, u); }
#endif

  // Every block whose last row lies in [u * BLOCK, (u + 1) * BLOCK).
  template <int Bytes>
  QRM_FAST_INLINE void unit_of(const CuSeqlens& cu, int64_t num_tokens, int64_t u) {
    const int64_t low = u * BLOCK, high = std::min(low + BLOCK, num_tokens);
    const int64_t first = cu.first_ending_after(low), last = cu.first_ending_after(high - 1);
    const auto serve = [&](int64_t s) __attribute__((always_inline)) {
      const int64_t bos = cu[s], eos = cu[s + 1];
      const int64_t end = eos <= high ? eos : eos - (eos - high + BLOCK - 1) / BLOCK * BLOCK;
      if (end > bos) block<Bytes>(s, u, bos, std::max(bos, end - BLOCK), end, eos);
    };
    // Another unit waits for the first sequence's block where more of it lies in front.
    const bool awaited = first < last && cu[first + 1] - cu[first] > BLOCK;
    if (awaited) serve(first);
    for (int64_t s = last; s >= first + awaited; --s) serve(s);
  }

  template <int Bytes>
  QRM_FAST_INLINE void block(int64_t s, int64_t u, int64_t bos, int64_t begin, int64_t end, int64_t eos) {
    const bool holes = mask != nullptr && std::memchr(mask + begin, 0, end - begin) != nullptr;
    if (!holes && std::is_same_v<T, S>) {
      Columns<Rule, S> columns;
      for (int i = 0; i < Rule::kInputs; ++i) columns.in[i] = reinterpret_cast<const S*>(in[i]) + begin;
      for (int i = 0; i < Rule::kOutputs; ++i) columns.out[i] = out[i] + begin;
      columns.num_rows = end - begin;
      columns.num_readable = begin;
      dense_block<Bytes>(s, u, begin > bos, end, eos, columns, true);
    } else {
      staged_block<Bytes>(s, u, begin > bos, begin, end, eos, holes);
    }
  }

  // Through buffers that stay in cache: rows of 16 bits, or with holes.
  template <int Bytes>
  QRM_FAST_INLINE void staged_block(int64_t s, int64_t u, bool goes_on, int64_t begin, int64_t end, int64_t eos,
                                    bool holes) {
    S in_buffer[Rule::kInputs][BLOCK + 2 * kMaxLanes], out_buffer[Rule::kOutputs][BLOCK + kMaxLanes];
    Columns<Rule, S> columns;
    columns.num_readable = kMaxLanes;
    for (int i = 0; i < Rule::kInputs; ++i) {
      S* rows = in_buffer[i] + kMaxLanes;
      columns.in[i] = rows;
      columns.num_rows =
          holes ? squeeze(in[i] + begin, mask + begin, end - begin, rows) : convert(in[i] + begin, end - begin, rows);
    }
    for (int i = 0; i < Rule::kOutputs; ++i) columns.out[i] = holes ? out_buffer[i] : out[i] + begin;
    dense_block<Bytes>(s, u, goes_on, end, eos, columns, false);
    if (holes) {
      for (int i = 0; i < Rule::kOutputs; ++i) spread(out_buffer[i], mask + begin, end - begin, out[i] + begin);
    }
  }

  // `goes_on`: the sequence has rows in front of this block, which wait for what it hands on. `in_place`: the columns
  // are the packed rows themselves.
  template <int Bytes>
  QRM_FAST_INLINE void dense_block(int64_t s, int64_t u, bool goes_on, int64_t end, int64_t eos,
                                   const Columns<Rule, S>& columns, bool in_place) {
    using Scan = RowScan<Rule, S, Bytes>;
    Rule own;
    const Rule& rule = rules(s, own);
    Handed handed = rule.end(bootstrap != nullptr ? bootstrap[s] : Rule::kNoBootstrap);
    if (end == eos && !goes_on) return Scan::scan(rule, columns, handed);
    if constexpr (Rule::kNext >= 0) {
      int64_t t = end;
      while (t < eos && mask != nullptr && !mask[t]) ++t;
      if (t < eos) handed.next = rule.next(static_cast<S>(in[Rule::kNext][t]));
    }
    if (goes_on) {
      const auto map = Scan::fold(rule, columns, handed.next);
      if (end < eos) handed.x = slots[u + 1].take();
      slots[u].give(map(handed.x));
    } else {
      handed.x = slots[u + 1].take();
    }
    // A block that was folded is in cache: memory brings the one that this thread is likely to take next.
    Scan::scan(rule, columns, handed, in_place ? torch::stable::get_num_threads() * BLOCK * sizeof(S) : kAheadBytes);
  }
};

}  // namespace qrm_fast
