// Rows with holes: the unmasked ones side by side, and back. Eight rows at a time, by a table over their mask's bits.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace qrm_fast {

struct MaskTables {
  uint8_t squeezed[256][8] = {};  // the rows of the set bits, in order
  uint8_t spread[256][8] = {};    // how many bits are set before each row
  uint8_t count[256] = {};

  constexpr MaskTables() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int i = 0; i < 8; ++i) {
        spread[bits][i] = count[bits] & 7;
        if (bits >> i & 1) squeezed[bits][count[bits]++] = i;
      }
    }
  }
};
inline constexpr MaskTables kMaskTables;

template <typename S>
struct EightRows : Simd<S, 8 * sizeof(S)> {
  using typename Simd<S, 8 * sizeof(S)>::IntVec;
  using typename Simd<S, 8 * sizeof(S)>::Vec;

  QRM_FAST_INLINE static Vec permuted(Vec v, const uint8_t* order) {
#if defined(__clang__)
    Vec out;
    for (int i = 0; i < 8; ++i) out[i] = v[order[i]];
    return out;
#else
    typedef uint8_t Bytes __attribute__((vector_size(8)));
    Bytes bytes;
    std::memcpy(&bytes, order, 8);
    return __builtin_shuffle(v, __builtin_convertvector(bytes, IntVec));
#endif
  }
  QRM_FAST_INLINE static Vec where(int bits, Vec v) {
    const IntVec bit = {1, 2, 4, 8, 16, 32, 64, 128};
    return (bit & bits) != 0 ? v : Vec{};
  }
};

// Bit i is mask[i].
QRM_FAST_INLINE int mask_bits(const bool* mask) {
  uint64_t bytes;
  std::memcpy(&bytes, mask, 8);
  return bytes * 0x0102040810204080 >> 56;
}

template <typename T, typename S>
QRM_FAST_INLINE int64_t convert(const T* x, int64_t num_rows, S* rows) {
  for (int64_t t = 0; t < num_rows; ++t) rows[t] = x[t];
  return num_rows;
}

// Writes up to 8 rows behind the last; returns how many are unmasked.
template <typename T, typename S>
QRM_FAST_INLINE int64_t squeeze(const T* x, const bool* mask, int64_t num_rows, S* rows) {
  using V = EightRows<S>;
  int64_t t = 0, n = 0;
  for (; t + 8 <= num_rows; t += 8) {
    const int bits = mask_bits(mask + t);
    S eight[8];
    convert(x + t, 8, eight);
    V::store(rows + n, V::permuted(V::load(eight), kMaskTables.squeezed[bits]));
    n += kMaskTables.count[bits];
  }
  for (; t < num_rows; ++t) {
    rows[n] = x[t];
    n += mask[t];
  }
  return n;
}

// Reads up to 8 rows behind the last.
template <typename S>
QRM_FAST_INLINE void spread(const S* rows, const bool* mask, int64_t num_rows, S* x) {
  using V = EightRows<S>;
  int64_t t = 0;
  for (; t + 8 <= num_rows; t += 8) {
    const int bits = mask_bits(mask + t);
    V::store(x + t, V::where(bits, V::permuted(V::load(rows), kMaskTables.spread[bits])));
    rows += kMaskTables.count[bits];
  }
  for (; t < num_rows; ++t) {
    const S row = *rows;
    x[t] = mask[t] ? row : S(0);
    rows += mask[t];
  }
}

}  // namespace qrm_fast
