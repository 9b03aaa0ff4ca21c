// Reverse scans over packed sequences. The recurrence of an op is fused with its inputs and outputs: rows are read once
// and results written once, and only carries, a few numbers per block, are kept beside them. Arithmetic is in double
// and every result is rounded once; a scan is bound by memory, so this costs nothing.
//
// Blocks. A sequence is cut into blocks of BLOCK rows, counted from its *end*. The cuts depend on the sequence alone,
// so its bits do not depend on the packing or on the number of threads.
//
// Vectors. A block is walked from its last row to its first, one vector of rows at a time. Within a vector, log2(lanes)
// shifts compose the rows' maps (maps.h); one multiply-add per vector then depends on the carry of the rows behind it.
//
// Carries. What a block hands to the block in front is its map, applied to the carry that it received. It is never the
// block's last result, which rounds differently. So a block's map may be computed before its carry is known, or in the
// same pass as its results, with the same bits.
//
// Threads. The packed rows are cut into spans of a few BLOCKs; a thread takes the last span not yet taken. A span
// computes the blocks that end in it. If the first sequence of a span began in an earlier span, the thread
//   1. computes the maps of that sequence's blocks in this span, which needs no carry,
//   2. waits for the carry of the span behind, if the sequence reaches into it, and publishes its own carry,
//   3. computes the results.
// So a thread waits only for spans that were taken before its own, and for step 1 of these at most. Spans are as long
// as enough of them for every thread allows: threads that work close together fetch each other's cache lines.
//
// Rows are prefetched some lines ahead, across sequences: the hardware prefetcher stops at the end of a 4 KiB page.
// Rows with holes (masked rows between them) are first moved together in a buffer, and rows of 16 bits converted there.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../dtypes.h"
#include "../../indices.h"
#include "../../maps.h"
#include "../memory.h"
#include "../simd/lanes.h"
#include "../simd/masked_rows.h"
#include "cu_seqlens.h"

namespace qrm_fast {

constexpr int64_t BLOCK = 8192;
constexpr int kMaxSpanBlocks = 16, kMinSpansPerThread = 4;
constexpr int kMaxLanes = 8;
constexpr int64_t kAheadBytes = 1536;  // of a column, prefetched

// What a row receives from the rows after it: the state of the recurrence, and a value read of the next row alone.
struct Carry {
  double x, next;
};

// Powers of one factor c, for maps x -> b + c x.
struct DecayPowers {
  double powers[kMaxLanes];  // c^8, ..., c^1: the last lanes of a vector of any width

  DecayPowers() = default;
  explicit DecayPowers(double c) {
    powers[kMaxLanes - 1] = c;
    for (int i = kMaxLanes - 2; i >= 0; --i) powers[i] = decay_product(powers[i + 1], c);
  }
  double operator[](int exponent) const { return powers[kMaxLanes - exponent]; }
};

// The maps from each row of a vector to the vector's end, if all rows have the factor c: b composed, and c^(rows to the
// end).
template <int Bytes>
struct SameFactor {
  using L = Lanes<Bytes>;
  using Vec = typename L::Vec;
  const DecayPowers& c;

  QRM_FAST_INLINE Vec powers() const { return L::load(c.powers + kMaxLanes - L::kLanes); }
  QRM_FAST_INLINE Vec compose(Vec b) const {
    b += c[1] * L::template later<1>(b, Vec{});
    if constexpr (L::kLanes > 2) b += c[2] * L::template later<2>(b, Vec{});
    if constexpr (L::kLanes > 4) b += c[4] * L::template later<4>(b, Vec{});
    return b;
  }
  QRM_FAST_INLINE Affine<double> map(Vec b, int64_t lane) const { return {powers()[lane], b[lane]}; }
  QRM_FAST_INLINE Vec apply(Vec b, double x) const { return b + powers() * x; }
};

// An op describes its recurrence as a Rule, which holds the constants of one sequence:
//   Map                  the map of a run of rows
//   kInputs, kOutputs    columns read and written
//   kNext                the column of which a row reads its successor's value, or -1
//   kNoBootstrap         the bootstrap where none is given
//   end(bootstrap)       the carry at the end of the sequence
//   next(value)          what a row reads of its successor, given that column's value
//   kSameFactor          true if every row multiplies x by the same factor, `decay[1]`
//   Vectors<Bytes>       the same for a vector of rows; after[i] is what lane i reads of its successor:
//     next(in)                             what the rows before read of these
//     composed(in, after)                  the maps from each row to the end of the vector
//     map(maps, lane), apply(maps, x)      one lane's map; all maps applied to x
//     results(in, after, x, later, out)    from each row's x and its successor's
//     terms(in, after), compose(terms)     if kSameFactor: what each row adds to x, and `composed` of that

template <typename Rule, typename S>
struct Columns {
  const S* in[Rule::kInputs];
  S* out[Rule::kOutputs];
  int64_t first_readable;  // rows from here on may be read, even if nothing depends on them
};

template <typename Rule, typename S, int Bytes>
class RowScan {
  using L = Lanes<Bytes>;
  using Vec = typename L::Vec;
  using Vectors = typename Rule::template Vectors<Bytes>;
  using Map = typename Rule::Map;

 public:
  QRM_FAST_INLINE explicit RowScan(const Rule& rule) : rule_(rule), vectors_(rule) {}

  // Rows [begin, end) from the last to the first: their results, their map, or both in one pass, with the same bits.
  template <bool kResults, bool kMap>
  QRM_FAST_INLINE Map walk(const Columns<Rule, S>& c, int64_t begin, int64_t end, Carry carry) const {
    Map map = Map::identity();
    Vec in[Rule::kInputs], out[Rule::kOutputs], sums = {};
    Vec nexts = L::broadcast(carry.next), later = L::broadcast(carry.x);
    // Lanes from `lane` on hold rows.
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
    if constexpr (kMap && Rule::kSameFactor) {  // each lane summed its own rows; joined once, here
      map = {decay_power(rule_.decay[1], end - t), vectors_.compose(sums)[0]};
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
      // An address in front of the column is harmless: a prefetch does not fault.
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) - kAheadBytes));
    }
  }
  // Rows [begin, end), fewer than a vector, to the last lanes.
  QRM_FAST_INLINE static void load_first(const Columns<Rule, S>& c, int64_t begin, int64_t end, Vec* in) {
    const int64_t first = end - L::kLanes;
    if (first >= c.first_readable) return load(c, first, in);
    for (int i = 0; i < Rule::kInputs; ++i) {
      S rows[L::kLanes];
      for (int lane = 0; lane < L::kLanes; ++lane) rows[lane] = first + lane < begin ? S(0) : c.in[i][first + lane];
      in[i] = L::load(rows);
    }
  }

  const Rule& rule_;
  const Vectors vectors_;
};

// The carry from a span to the span in front of it.
class CarrySlot {
 public:
  void publish(double x) {
    x_ = x;
    published_.store(true, std::memory_order_release);
  }
  double wait() const {
    for (int spins = 0; !published_.load(std::memory_order_acquire); ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
    return x_;
  }

 private:
  alignas(64) std::atomic<bool> published_{false};
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
    static const auto run_span = widest([](auto bytes) { return Compiled<bytes, span<bytes>>::run; });
    const int64_t num_blocks = ceil_div(num_tokens_, BLOCK);
    const int64_t share = num_blocks / (kMinSpansPerThread * torch::stable::get_num_threads());
    span_ = std::clamp<int64_t>(share, 1, kMaxSpanBlocks) * BLOCK;
    const int64_t num_spans = ceil_div(num_tokens_, span_);
    slots_ = std::vector<CarrySlot>(num_spans + 1);
    first_sequences_ = std::vector<int64_t>(num_spans + 1, cu_.num_sequences() - 1);
    for (int64_t i = 0; i < num_spans; ++i) first_sequences_[i] = first_ending_after(cu_, i * span_);
    std::atomic<int64_t> num_taken{0};
    torch::stable::parallel_for(0, num_spans, 1, [&](int64_t, int64_t) {
      for (int64_t i; (i = num_taken.fetch_add(1)) < num_spans;) run_span(*this, num_spans - 1 - i);
    });
  }

 private:
  template <int Bytes>
  QRM_FAST_INLINE static void span(PackedScan& scan, int64_t i) {
    scan.template span_of<Bytes>(i);
  }

  template <int Bytes>
  QRM_FAST_INLINE void span_of(int64_t i) {
    const CuSeqlens cu = cu_;
    const int64_t low = i * span_, high = std::min(low + span_, num_tokens_);
    const int64_t first = first_sequences_[i], last = first_sequences_[i + 1];
    const bool began_before = last_cut(cu[first + 1], low) > cu[first];
    Carry carries[kMaxSpanBlocks];
    if (began_before) pass_carry<Bytes>(i, first, low, high, carries);
    const bool in_place = std::is_same_v<T, S> && !has_holes(low, high);
    const Columns<Rule, S> rows = packed_rows();
    for (int64_t s = last, eos = cu[last + 1], bos; s >= first; --s, eos = bos) {
      bos = cu[s];
      if (in_place && bos >= low && eos <= high && eos - bos <= BLOCK) {
        Rule own;
        const Rule& rule = rules_(s, own);
        RowScan<Rule, S, Bytes>(rule).template walk<true, false>(rows, bos, eos, carry_at_end(s, rule));
      } else {
        blocks<Bytes>(i, s, bos, eos, low, high, began_before && s == first ? carries : nullptr);
      }
    }
  }

  // The results of the blocks of sequence s that end in span i. `carries`: those the blocks receive, or null if they
  // are not known yet.
  template <int Bytes>
  QRM_FAST_INLINE void blocks(int64_t i, int64_t s, int64_t bos, int64_t eos, int64_t low, int64_t high,
                              const Carry* carries) {
    int64_t end = last_cut(eos, high);
    if (end <= bos) return;
    Rule own;
    const Rule& rule = rules_(s, own);
    const RowScan<Rule, S, Bytes> rows(rule);
    Carry carry = carries != nullptr ? *carries : Carry{carry_into(i, s, rule, end, eos), next_of(s, rule, end, eos)};
    for (; end - BLOCK > std::max(bos, low); end -= BLOCK) {
      if (carries != nullptr) {
        block<true, false>(rows, end - BLOCK, end, carry);
        carry = *++carries;
      } else {
        const double x = block<true, true>(rows, end - BLOCK, end, carry)(carry.x);
        carry = {x, next_among(rule, end - BLOCK, end, carry.next)};
      }
    }
    block<true, false>(rows, std::max(bos, end - BLOCK), end, carry);
  }

  // Publishes the carry from sequence s, the first of span i, to the span in front, and keeps the carry that each of
  // its blocks receives.
  template <int Bytes>
  QRM_FAST_INLINE void pass_carry(int64_t i, int64_t s, int64_t low, int64_t high, Carry* carries) {
    Rule own;
    const Rule& rule = rules_(s, own);
    const RowScan<Rule, S, Bytes> rows(rule);
    const int64_t eos = cu_[s + 1], last = last_cut(eos, high);
    typename Rule::Map maps[kMaxSpanBlocks];
    double next = next_of(s, rule, last, eos);
    int num_blocks = 0;
    for (int64_t end = last; end > low; end -= BLOCK) {
      carries[num_blocks].next = next;
      maps[num_blocks++] = block<false, true>(rows, end - BLOCK, end, {0, next});
      next = next_among(rule, end - BLOCK, end, next);
    }
    double x = carry_into(i, s, rule, last, eos);
    for (int b = 0; b < num_blocks; ++b) {
      carries[b].x = x;
      x = maps[b](x);
    }
    slots_[i].publish(x);
  }

  // The state that the rows before `end`, the last cut in span i, receive.
  double carry_into(int64_t i, int64_t s, const Rule& rule, int64_t end, int64_t eos) const {
    return end < eos ? slots_[i + 1].wait() : carry_at_end(s, rule).x;
  }

  template <bool kResults, bool kMap, int Bytes>
  QRM_FAST_INLINE typename Rule::Map block(const RowScan<Rule, S, Bytes>& rows, int64_t begin, int64_t end,
                                           Carry carry) {
    const bool holes = has_holes(begin, end);
    if (!holes && std::is_same_v<T, S>) return rows.template walk<kResults, kMap>(packed_rows(), begin, end, carry);
    // Buffers that stay in cache.
    S in_buffer[Rule::kInputs][kMaxLanes + BLOCK], out_buffer[Rule::kOutputs][BLOCK];
    Columns<Rule, S> columns;
    columns.first_readable = -kMaxLanes;
    int64_t num_rows = end - begin;
    for (int i = 0; i < Rule::kInputs; ++i) {
      S* staged = in_buffer[i] + kMaxLanes;
      columns.in[i] = staged;
      if (holes) {
        num_rows = squeeze<Bytes>(in_[i] + begin, mask_ + begin, end - begin, staged);
      } else {
        for (int64_t t = 0; t < num_rows; ++t) staged[t] = in_[i][begin + t];
      }
    }
    for (int i = 0; i < Rule::kOutputs; ++i) columns.out[i] = holes ? out_buffer[i] : out_[i] + begin;
    const auto map = rows.template walk<kResults, kMap>(columns, 0, num_rows, carry);
    if (kResults && holes) {
      for (int i = 0; i < Rule::kOutputs; ++i) {
        spread<Bytes>(out_buffer[i], mask_ + begin, end - begin, out_[i] + begin);
      }
    }
    return map;
  }

  // The last cut between blocks of a sequence at or before `row`; its end if that is not after `row`.
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
  QRM_FAST_INLINE Carry carry_at_end(int64_t s, const Rule& rule) const {
    return rule.end(bootstrap_ != nullptr ? bootstrap_[s] : Rule::kNoBootstrap);
  }
  // What the last unmasked row before `end` reads of its successor.
  double next_of(int64_t s, const Rule& rule, int64_t end, int64_t eos) const {
    return next_among(rule, end, eos, carry_at_end(s, rule).next);
  }
  // The same if its successor lies in [begin, end); `beyond` if not.
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
  int64_t span_ = 0;  // rows of a span
  std::vector<CarrySlot> slots_;
  std::vector<int64_t> first_sequences_;  // of each span: the first with a row at or after its low end
};

// The results of the op whose sequences follow `rules(S{})`, S being what is accumulated. All columns are [T].
template <size_t kOutputs, size_t kInputs, typename MakeRules>
std::array<Tensor, kOutputs> scan_packed(const Tensor (&in)[kInputs], const Tensor& cu_seqlens,
                                         const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask,
                                         MakeRules rules) {
  const int64_t num_tokens = in[0].size(0);
  const CuSeqlens cu(cu_seqlens, num_tokens);
  std::array<Tensor, kOutputs> out;
  for (Tensor& x : out) x = fresh_rows(in[0], num_tokens);
  dispatch_floating(in[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using Scan = PackedScan<decltype(rules(acc_t<T>{})), T>;
    typename Scan::Inputs read;
    typename Scan::Outputs written;
    for (size_t i = 0; i < kInputs; ++i) read[i] = data<T>(in[i]);
    for (size_t i = 0; i < kOutputs; ++i) written[i] = mutable_data<acc_t<T>>(out[i]);
    Scan(cu, num_tokens, read, written, data_or_null<bool>(mask), data_or_null<acc_t<T>>(bootstrap), rules(acc_t<T>{}))
        .run();
  });
  return out;
}

}  // namespace qrm_fast
