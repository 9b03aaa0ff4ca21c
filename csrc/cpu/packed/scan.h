// Reverse scans over packed sequences at the speed of memory.
//
// Rows are read once and results written once. A sequence is cut into blocks of BLOCK rows from its *end*, so that
// neither the packing nor the number of threads moves a cut. In a block, rows are taken a vector at a time: log2(lanes)
// shifts compose the maps of a vector's rows, and one multiply-add per vector, not per row, waits for the rows after
// it. What a block hands on is its map of what it was handed, never its last result: whether the two are computed in
// one pass or two cannot be seen. Arithmetic is in double and every result is rounded once: beside memory it is free.
//
// Threads take spans of whole multiples of BLOCK packed rows from the end of the batch. A span serves the blocks that
// end in it. Where its first sequence goes on in front, that sequence's blocks are folded to their maps first, which
// needs no other span; then what the rows after the span hand on is taken from the slot behind it and given to its own
// before any result is computed. A thread waits only for spans that were taken before its own. Spans are as long as
// enough of them for every thread allows: threads that work next to each other fetch each other's lines.
//
// All of it walks from the last row to the first and asks for rows some lines ahead, across sequences: the processor's
// own prefetching ends with a page of 4 KiB. (Rows that pass through a buffer are read in their order.)
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <thread>
#include <vector>

#include "../../maps.h"
#include "../ceil_div.h"
#include "../dtypes.h"
#include "../simd/double_lanes.h"
#include "../simd/masked_rows.h"
#include "../simd/simd.h"
#include "cu_seqlens.h"

namespace qrm_fast {

constexpr int64_t BLOCK = 8192;
constexpr int kMaxSpanBlocks = 16, kMinSpansPerThread = 4;
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
struct Lanes : DoubleLanes<Bytes> {
  using Base = DoubleLanes<Bytes>;
  using Base::kLanes;
  using typename Base::IntVec;
  using typename Base::Vec;

  // The last `count` lanes, 0 < count < kLanes, to p[0..count).
  template <typename S>
  QRM_FAST_INLINE static void store_last(S* p, int64_t count, Vec v) {
    S lanes[kLanes];
    Base::store(lanes, v);
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
  int64_t first_readable;  // rows from here on may be read, though nothing depends on them
};

template <typename Rule, typename S, int Bytes>
class RowScan {
  using L = Lanes<Bytes>;
  using Vec = typename L::Vec;
  using Vectors = typename Rule::template Vectors<Bytes>;
  using Map = typename Rule::Map;

 public:
  QRM_FAST_INLINE explicit RowScan(const Rule& rule) : rule_(rule), vectors_(rule) {}

  // Rows [begin, end) from the last to the first: their results, their map, or both in one pass, to the same bits.
  template <bool kResults, bool kMap>
  QRM_FAST_INLINE Map walk(const Columns<Rule, S>& c, int64_t begin, int64_t end, Handed handed) const {
    Map map = Map::identity();
    Vec in[Rule::kInputs], out[Rule::kOutputs], sums = {};
    Vec nexts = L::broadcast(handed.next), later = L::broadcast(handed.x);
    const auto step = [&](int64_t lane) __attribute__((always_inline)) {
      const Vec own = vectors_.next(in), after = L::template later<1>(own, nexts);
      nexts = own;
      if constexpr (kMap && Rule::kSameFactor) {
        if (lane == 0) sums = vectors_.terms(in, after) + rule_.decay[L::kLanes] * sums;
      }
      const auto maps = vectors_.composed(in, after);
      if constexpr (kMap) {
        if (!Rule::kSameFactor || lane > 0) map = vectors_.map(maps, lane).after(map);
      }
      if constexpr (kResults) {
        const Vec x = vectors_.apply(maps, later[0]);
        vectors_.results(in, after, x, L::template later<1>(x, later), out);
        later = x;
      }
    };
    int64_t t = end;
    for (; t - begin >= L::kLanes; t -= L::kLanes) {
      load(c, t - L::kLanes, in);
      step(0);
      if constexpr (kResults) {
        for (int i = 0; i < Rule::kOutputs; ++i) L::store(c.out[i] + t - L::kLanes, out[i]);
      }
    }
    if constexpr (kMap && Rule::kSameFactor) {  // lane by lane, joined once at the end
      map = {decay_power(rule_.decay[1], end - t), L::composed(sums, rule_.decay)[0]};
    }
    if (t > begin) {
      load_first(c, begin, t, in);
      step(L::kLanes - (t - begin));
      if constexpr (kResults) {
        for (int i = 0; i < Rule::kOutputs; ++i) L::store_last(c.out[i] + begin, t - begin, out[i]);
      }
    }
    return map;
  }

 private:
  QRM_FAST_INLINE static void load(const Columns<Rule, S>& c, int64_t t, Vec* in) {
    for (int i = 0; i < Rule::kInputs; ++i) {
      const S* p = c.in[i] + t;
      in[i] = L::load(p);
      // In front of the column it is only a hint.
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) - kAheadBytes));
    }
  }
  // Rows [begin, end), less than a vector, to the last lanes.
  QRM_FAST_INLINE static void load_first(const Columns<Rule, S>& c, int64_t begin, int64_t end, Vec* in) {
    if (end - L::kLanes >= c.first_readable) return load(c, end - L::kLanes, in);
    for (int i = 0; i < Rule::kInputs; ++i) {
      S rows[L::kLanes] = {};
      for (int64_t t = begin; t < end; ++t) rows[L::kLanes - end + t] = c.in[i][t];
      in[i] = L::load(rows);
    }
  }

  const Rule& rule_;
  const Vectors vectors_;
};

// What a span hands on to the span in front of it.
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
class PackedScan {
 public:
  using Rule = typename Rules::Rule;
  using S = acc_t<T>;
  using Inputs = std::array<const T*, Rule::kInputs>;
  using Outputs = std::array<S*, Rule::kOutputs>;

  // mask [T] or nullptr; bootstrap [S] or nullptr; rules(s, own): the Rule of sequence s, perhaps made in `own`.
  PackedScan(const CuSeqlens& cu, int64_t num_tokens, Inputs in, Outputs out, const bool* mask, const S* bootstrap,
             Rules rules)
      : cu_(cu), num_tokens_(num_tokens), in_(in), out_(out), mask_(mask), bootstrap_(bootstrap), rules_(rules) {}

  void run() {
    const int64_t num_blocks = ceil_div(num_tokens_, BLOCK);
    const int64_t share = num_blocks / (kMinSpansPerThread * torch::stable::get_num_threads());
    span_ = std::clamp<int64_t>(share, 1, kMaxSpanBlocks) * BLOCK;
    const int64_t num_spans = ceil_div(num_tokens_, span_);
    slots_ = std::vector<Slot>(num_spans + 1);
    first_sequences_ = std::vector<int64_t>(num_spans + 1, cu_.num_sequences() - 1);
    for (int64_t i = 0; i < num_spans; ++i) first_sequences_[i] = cu_.first_ending_after(i * span_);
    std::atomic<int64_t> num_taken{0};
    torch::stable::parallel_for(0, num_spans, 1, [&](int64_t, int64_t) {
      for (int64_t i; (i = num_taken.fetch_add(1)) < num_spans;) span(num_spans - 1 - i);
    });
  }

 private:
  void span(int64_t i) {
#if defined(__x86_64__)
    static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx512) return span_avx512(i);
    if (avx2) return span_avx2(i);
#endif
    span_of<16>(i);
  }
#if defined(__x86_64__)
  QRM_FAST_TARGET_AVX512 void span_avx512(int64_t i) { span_of<64>(i); }
  QRM_FAST_TARGET_AVX2 void span_avx2(int64_t i) { span_of<32>(i); }
#endif

  template <int Bytes>
  QRM_FAST_INLINE void span_of(int64_t i) {
    const CuSeqlens cu = cu_;
    const int64_t low = i * span_, high = std::min(low + span_, num_tokens_);
    const int64_t first = first_sequences_[i], last = first_sequences_[i + 1];
    const bool goes_on = last_cut(cu[first + 1], low) > cu[first];
    Handed handed[kMaxSpanBlocks];
    if (goes_on) hand_on<Bytes>(i, first, low, high, handed);
    const bool in_place = std::is_same_v<T, S> && !has_holes(low, high);
    const Columns<Rule, S> rows = packed_rows();
    for (int64_t s = last, eos = cu[last + 1], bos; s >= first; --s, eos = bos) {
      bos = cu[s];
      if (in_place && bos >= low && eos <= high && eos - bos <= BLOCK) {
        Rule own;
        const Rule& rule = rules_(s, own);
        RowScan<Rule, S, Bytes>(rule).template walk<true, false>(rows, bos, eos, at_end(s, rule));
      } else {
        blocks<Bytes>(i, s, bos, eos, low, high, goes_on && s == first ? handed : nullptr);
      }
    }
  }

  // The results of the blocks of sequence s that end in the span; what each is `handed`, where that is known.
  template <int Bytes>
  QRM_FAST_INLINE void blocks(int64_t i, int64_t s, int64_t bos, int64_t eos, int64_t low, int64_t high,
                              const Handed* handed) {
    int64_t end = last_cut(eos, high);
    if (end <= bos) return;
    Rule own;
    const Rule& rule = rules_(s, own);
    const RowScan<Rule, S, Bytes> rows(rule);
    Handed after = handed != nullptr ? *handed : Handed{arriving(i, s, rule, end, eos), next_of(s, rule, end, eos)};
    for (; end - BLOCK > std::max(bos, low); end -= BLOCK) {
      if (handed != nullptr) {
        block<true, false>(rows, end - BLOCK, end, after);
        after = *++handed;
      } else {
        const double x = block<true, true>(rows, end - BLOCK, end, after)(after.x);
        after = {x, next_among(rule, end - BLOCK, end, after.next)};
      }
    }
    block<true, false>(rows, std::max(bos, end - BLOCK), end, after);
  }

  // Gives what the first sequence of a span hands on to the span in front, and notes what its blocks are handed: their
  // maps need no other span.
  template <int Bytes>
  QRM_FAST_INLINE void hand_on(int64_t i, int64_t s, int64_t low, int64_t high, Handed* handed) {
    Rule own;
    const Rule& rule = rules_(s, own);
    const RowScan<Rule, S, Bytes> rows(rule);
    const int64_t eos = cu_[s + 1], last = last_cut(eos, high);
    typename Rule::Map maps[kMaxSpanBlocks];
    double next = next_of(s, rule, last, eos);
    int num_blocks = 0;
    for (int64_t end = last; end > low; end -= BLOCK) {
      handed[num_blocks].next = next;
      maps[num_blocks++] = block<false, true>(rows, end - BLOCK, end, {0, next});
      next = next_among(rule, end - BLOCK, end, next);
    }
    double x = arriving(i, s, rule, last, eos);
    for (int b = 0; b < num_blocks; ++b) {
      handed[b].x = x;
      x = maps[b](x);
    }
    slots_[i].give(x);
  }

  // What the rows from `end` on, the last cut in span i, hand on.
  double arriving(int64_t i, int64_t s, const Rule& rule, int64_t end, int64_t eos) const {
    return end < eos ? slots_[i + 1].take() : at_end(s, rule).x;
  }

  template <bool kResults, bool kMap, int Bytes>
  QRM_FAST_INLINE typename Rule::Map block(const RowScan<Rule, S, Bytes>& rows, int64_t begin, int64_t end,
                                           Handed handed) {
    const bool holes = has_holes(begin, end);
    if (!holes && std::is_same_v<T, S>) return rows.template walk<kResults, kMap>(packed_rows(), begin, end, handed);
    // Through buffers that stay in cache: rows of 16 bits, or with holes.
    S in_buffer[Rule::kInputs][kMaxLanes + BLOCK], out_buffer[Rule::kOutputs][BLOCK];
    Columns<Rule, S> columns;
    columns.first_readable = -kMaxLanes;
    int64_t num_rows = 0;
    for (int i = 0; i < Rule::kInputs; ++i) {
      S* staged = in_buffer[i] + kMaxLanes;
      columns.in[i] = staged;
      num_rows = holes ? squeeze<Bytes>(in_[i] + begin, mask_ + begin, end - begin, staged)
                       : convert(in_[i] + begin, end - begin, staged);
    }
    for (int i = 0; i < Rule::kOutputs; ++i) columns.out[i] = holes ? out_buffer[i] : out_[i] + begin;
    const auto map = rows.template walk<kResults, kMap>(columns, 0, num_rows, handed);
    if (kResults && holes) {
      for (int i = 0; i < Rule::kOutputs; ++i)
        spread<Bytes>(out_buffer[i], mask_ + begin, end - begin, out_[i] + begin);
    }
    return map;
  }

  // The last cut between blocks of a sequence at or before `row`; its end where that is.
  static int64_t last_cut(int64_t eos, int64_t row) {
    return eos <= row ? eos : eos - ceil_div(eos - row, BLOCK) * BLOCK;
  }
  bool has_holes(int64_t begin, int64_t end) const {
    return mask_ != nullptr && std::memchr(mask_ + begin, 0, end - begin) != nullptr;
  }
  QRM_FAST_INLINE Columns<Rule, S> packed_rows() const {
    Columns<Rule, S> rows;
    for (int i = 0; i < Rule::kInputs; ++i) rows.in[i] = reinterpret_cast<const S*>(in_[i]);
    for (int i = 0; i < Rule::kOutputs; ++i) rows.out[i] = out_[i];
    rows.first_readable = 0;
    return rows;
  }
  QRM_FAST_INLINE Handed at_end(int64_t s, const Rule& rule) const {
    return rule.end(bootstrap_ != nullptr ? bootstrap_[s] : Rule::kNoBootstrap);
  }
  // What the last unmasked row before `end` reads of its successor.
  double next_of(int64_t s, const Rule& rule, int64_t end, int64_t eos) const {
    return next_among(rule, end, eos, at_end(s, rule).next);
  }
  // The same where its successor lies in [begin, end), or else reads `beyond`.
  double next_among(const Rule& rule, int64_t begin, int64_t end, double beyond) const {
    if constexpr (Rule::kNext >= 0) {
      if (begin == end) return beyond;
      const void* row = mask_ == nullptr ? nullptr : std::memchr(mask_ + begin, 1, end - begin);
      if (mask_ != nullptr && row == nullptr) return beyond;
      const int64_t t = mask_ == nullptr ? begin : static_cast<const bool*>(row) - mask_;
      return rule.next(static_cast<S>(in_[Rule::kNext][t]));
    }
    return beyond;
  }

  const CuSeqlens cu_;
  const int64_t num_tokens_;
  const Inputs in_;
  const Outputs out_;
  const bool* const mask_;
  const S* const bootstrap_;
  const Rules rules_;
  int64_t span_ = 0;
  std::vector<Slot> slots_;
  std::vector<int64_t> first_sequences_;  // of each span: the first with a row at or after its low end
};

}  // namespace qrm_fast
