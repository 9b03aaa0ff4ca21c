// Rows with holes: moves the unmasked rows side by side (squeeze), and back (spread). AVX-512 has instructions for
// both; other sets permute eight rows at a time, by a table indexed by the bits of their mask.
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

// A few rows and the bits of their mask: bit i is mask[i].
template <typename S, int Bytes>
struct FewRows : Simd<S, 8 * sizeof(S)> {
  using typename Simd<S, 8 * sizeof(S)>::IntVec;
  using typename Simd<S, 8 * sizeof(S)>::Vec;
  static constexpr int kRows = 8;

  QRM_FAST_INLINE static int mask_bits(const bool* mask) {
    uint64_t bytes;
    std::memcpy(&bytes, mask, 8);
    return bytes * 0x0102040810204080 >> 56;
  }
  QRM_FAST_INLINE static int count(int bits) { return kMaskTables.count[bits]; }
  // The rows of the set bits first, then any.
  QRM_FAST_INLINE static Vec squeezed(Vec v, int bits) { return permuted(v, kMaskTables.squeezed[bits]); }
  // Row after row to the set bits, zeros to the others.
  QRM_FAST_INLINE static Vec spread(Vec v, int bits) {
    const IntVec bit = {1, 2, 4, 8, 16, 32, 64, 128};
    return (bit & bits) != 0 ? permuted(v, kMaskTables.spread[bits]) : Vec{};
  }

 private:
  QRM_FAST_INLINE static Vec permuted(Vec v, const uint8_t* order) {
#if defined(__clang__)
    Vec out;
    for (int i = 0; i < 8; ++i) out[i] = v[order[i]];
    return out;
#else
    IntVec wide;
#if defined(__x86_64__)
    if constexpr (Bytes == 32 && sizeof(S) == 4) {  // GCC widens byte after byte
      asm("vpmovzxbd %1, %0" : "=x"(wide) : "m"(*reinterpret_cast<const uint8_t (*)[8]>(order)));
      return __builtin_shuffle(v, wide);
    }
#endif
    typedef uint8_t Eight __attribute__((vector_size(8)));
    Eight bytes;
    std::memcpy(&bytes, order, 8);
    wide = __builtin_convertvector(bytes, IntVec);
    return __builtin_shuffle(v, wide);
#endif
  }
};

#if defined(__x86_64__)
template <typename S>
struct FewRows<S, 64> : Simd<S, 64> {
  using typename Simd<S, 64>::Vec;
  static constexpr int kRows = 64 / sizeof(S);

  QRM_FAST_INLINE static int mask_bits(const bool* mask) {
    if constexpr (kRows == 8) return FewRows<S, 32>::mask_bits(mask);
    typedef int64_t Bools __attribute__((vector_size(16)));
    Bools bools;
    std::memcpy(&bools, mask, 16);
    bools <<= 7;
    int bits;
    asm("vpmovmskb %1, %0" : "=r"(bits) : "x"(bools));
    return bits;
  }
  QRM_FAST_INLINE static int count(int bits) { return __builtin_popcount(bits); }
  QRM_FAST_INLINE static Vec squeezed(Vec v, int bits) {
    Vec out;
    if constexpr (sizeof(S) == 4) {
      asm("kmovw %2, %%k1\n\tvcompressps %1, %0%{%%k1%}%{z%}" : "=v"(out) : "v"(v), "r"(bits) : "k1");
    } else {
      asm("kmovw %2, %%k1\n\tvcompresspd %1, %0%{%%k1%}%{z%}" : "=v"(out) : "v"(v), "r"(bits) : "k1");
    }
    return out;
  }
  QRM_FAST_INLINE static Vec spread(Vec v, int bits) {
    Vec out;
    if constexpr (sizeof(S) == 4) {
      asm("kmovw %2, %%k1\n\tvexpandps %1, %0%{%%k1%}%{z%}" : "=v"(out) : "v"(v), "r"(bits) : "k1");
    } else {
      asm("kmovw %2, %%k1\n\tvexpandpd %1, %0%{%%k1%}%{z%}" : "=v"(out) : "v"(v), "r"(bits) : "k1");
    }
    return out;
  }
};
#endif

// Returns how many rows are unmasked. Like spread, it touches no row beyond num_rows.
template <int Bytes, typename T, typename S>
QRM_FAST_INLINE int64_t squeeze(const T* x, const bool* mask, int64_t num_rows, S* rows) {
  using V = FewRows<S, Bytes>;
  int64_t t = 0, n = 0;
  for (; t + V::kRows <= num_rows; t += V::kRows) {
    const int bits = V::mask_bits(mask + t);
    typename V::Vec few;
    if constexpr (std::is_same_v<T, S>) {
      few = V::load(x + t);
    } else {
      S converted[V::kRows];
      for (int64_t i = 0; i < V::kRows; ++i) converted[i] = x[t + i];
      few = V::load(converted);
    }
    V::store(rows + n, V::squeezed(few, bits));
    n += V::count(bits);
  }
  for (; t < num_rows; ++t) {
    rows[n] = x[t];
    n += mask[t];
  }
  return n;
}

template <int Bytes, typename S>
QRM_FAST_INLINE void spread(const S* rows, const bool* mask, int64_t num_rows, S* x) {
  using V = FewRows<S, Bytes>;
  int64_t t = 0;
  for (; t + V::kRows <= num_rows; t += V::kRows) {
    const int bits = V::mask_bits(mask + t);
    V::store(x + t, V::spread(V::load(rows), bits));
    rows += V::count(bits);
  }
  for (; t < num_rows; ++t) {
    const S row = *rows;
    x[t] = mask[t] ? row : S(0);
    rows += mask[t];
  }
}

}  // namespace qrm_fast
