// What one block of threads computes in a scan over packed sequences. Written for device and host: a test runs it on
// the CPU.
//
// Rows are read once and results written once, both coalesced, through shared memory. Nothing else is written to global
// memory but one map per BLOCK rows. One read and one write per row is the least a scan can move, so memory limits it.
//
// Cuts. A sequence is cut into blocks of BLOCK rows and these into pieces of PIECE rows, both counted from the
// sequence's *end*. The packed rows are cut into units of BLOCK rows, one per thread block. A unit computes the blocks
// whose last row lies in it: whole short sequences, and at most one block of a longer sequence.
//
// Inside a unit. A thread walks a piece row by row, once for its map (maps.h) and once for its results. In between, the
// maps of a block's pieces are composed by doubling distances. A piece reaches only towards the end of its own block,
// so the order of every product depends on the distance to that end alone.
//
// Between units. A block with rows in front of it publishes its map; every GROUP-th block also publishes the map of its
// group. A block's carry is composed from the groups and then the blocks behind it, in a tree whose shape depends on
// their number alone. So the bits depend neither on the packing nor on timing. A unit waits only for units behind it,
// which take their tickets earlier.
#pragma once
#include <cstdint>

#include "../maps.h"

#if defined(__CUDA_ARCH__)
#define QRM_FAST_UNROLL _Pragma("unroll")
#else
#define QRM_FAST_UNROLL
#endif

namespace qrm_fast {

constexpr int THREADS = 128;
constexpr int PIECE = 16;
constexpr int BLOCK = 1024;
constexpr int GROUP = THREADS;
constexpr int ROWS_PER_THREAD = BLOCK / THREADS;
constexpr int MAX_ROWS = 2 * BLOCK;
constexpr int MAX_PIECES = 2 * MAX_ROWS / PIECE;  // of sequences longer than a piece

// Calls f(thread) on every thread, then waits for all.
template <typename F>
QRM_FAST_HOST_DEVICE inline void on_all_threads(F f) {
#if defined(__CUDA_ARCH__)
  f(static_cast<int>(threadIdx.x));
  __syncthreads();
#else
  for (int thread = 0; thread < THREADS; ++thread) f(thread);
#endif
}

QRM_FAST_HOST_DEVICE inline int add_shared(int* x, int value) {
#if defined(__CUDA_ARCH__)
  return atomicAdd(x, value);
#else
  *x += value;
  return *x - value;
#endif
}

QRM_FAST_HOST_DEVICE inline void max_shared(int* x, int value) {
#if defined(__CUDA_ARCH__)
  atomicMax(x, value);
#else
  *x = *x > value ? *x : value;
#endif
}

// A map that one unit publishes and others wait for.
template <typename Map>
struct Published {
  Map map;
  int ready;

  QRM_FAST_HOST_DEVICE void publish(const Map& value) {
    map = value;
#if defined(__CUDA_ARCH__)
    asm volatile("st.release.gpu.s32 [%0], 1;" ::"l"(&ready) : "memory");
#else
    ready = 1;
#endif
  }
  QRM_FAST_HOST_DEVICE Map wait() const {
#if defined(__CUDA_ARCH__)
    for (int published = 0;;) {
      asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(published) : "l"(&ready) : "memory");
      if (published) break;
      __nanosleep(20);
    }
#endif
    return map;
  }
};

// The block of a sequence whose last row lies in [low, high), high - low <= BLOCK: rows [begin, end), none if equal.
struct BlockRows {
  int64_t begin, end;
  int64_t index;  // 0 for the block at the sequence's end

  QRM_FAST_HOST_DEVICE static BlockRows of(int64_t bos, int64_t eos, int64_t high) {
    const int64_t index = eos <= high ? 0 : ceil_div(eos - high, BLOCK);
    const int64_t end = eos - index * BLOCK, begin = end - BLOCK > bos ? end - BLOCK : bos;
    return {begin, end > begin ? end : begin, index};
  }
};

template <typename Rows>
struct UnitMemory {
  using Map = typename Rows::Map;

  struct Piece {
    int64_t sequence;
    int end, num_rows;  // rows [end - num_rows, end) of the unit
    int distance;       // pieces between this one and the end of its block
    bool has_carry;     // its block has a block behind it
  };

  float columns[Rows::kInputs][MAX_ROWS + MAX_ROWS / PIECE];
  bool kept[MAX_ROWS];  // by the mask
  Piece pieces[MAX_PIECES];
  Map maps[2][MAX_PIECES];
  Map gathered[THREADS];
  typename Rows::State carry;
  int num_pieces, most_pieces, end;
  int front;                          // the last piece of the block that has rows in front of it, or -1
  int64_t front_index;                // that block's index
  int64_t back_sequence, back_index;  // of the block that has a block behind it: its sequence, or -1, and index
};

// Found by the setup for each unit: the sequence of its first row, and the first row that it reads.
struct UnitStart {
  int64_t sequence, row;

  template <typename Cu>
  QRM_FAST_HOST_DEVICE static UnitStart of(const Cu& cu, int64_t u, int64_t num_tokens) {
    const int64_t low = u * BLOCK, high = low + BLOCK < num_tokens ? low + BLOCK : num_tokens;
    const int64_t s = first_ending_after(cu, low);
    return {s, s < cu.num_sequences() ? BlockRows::of(cu[s], cu[s + 1], high).begin : low};
  }
};

// `Rules` gives the Rows of sequence s as rules(s), `Cu` the boundaries. A `Column` loads rows t, t + THREADS, ...
// below t + `rest` by column.load(t, rest, bits), and column.value makes floats of them.
template <typename Rules, typename Column, typename Cu>
struct UnitScan {
  using Rows = typename Rules::Rows;
  using Map = typename Rows::Map;
  using State = typename Rows::State;
  using Memory = UnitMemory<Rows>;

  Column in[Rows::kInputs];
  float* out[Rows::kOutputs];
  const bool* mask;        // [T] or nullptr
  const float* bootstrap;  // [S] or nullptr
  Rules rules;
  Cu cu;
  int64_t num_tokens;
  Published<Map>* blocks;  // [units], the map of the block that has rows in front of it
  Published<Map>* groups;  // [units], of the GROUP blocks up to that one

  // A padding word after each PIECE rows: threads that walk neighbouring pieces have no bank conflicts.
  QRM_FAST_HOST_DEVICE static int skewed(int row) { return row + row / PIECE; }

  QRM_FAST_HOST_DEVICE State end(const Rows& rows, int64_t s) const {
    return bootstrap != nullptr ? rows.end(bootstrap[s]) : rows.end();
  }

  // Rows [begin, begin + num_rows) to shared memory. A thread asks for all of its rows before it waits for the first.
  QRM_FAST_HOST_DEVICE void stage(Memory& m, int64_t begin, int num_rows, int thread) const {
    for (int first = thread; first < num_rows; first += BLOCK) {
      const int rest = num_rows - first;
      typename Column::Bits bits[Rows::kInputs][ROWS_PER_THREAD];
      bool kept[ROWS_PER_THREAD];
      for (int i = 0; i < Rows::kInputs; ++i) in[i].load(begin + first, rest, bits[i]);
      QRM_FAST_UNROLL
      for (int k = 0; k < ROWS_PER_THREAD; ++k) {
        kept[k] = true;
        if (mask != nullptr && k * THREADS < rest) kept[k] = mask[begin + first + k * THREADS];
      }
      QRM_FAST_UNROLL
      for (int k = 0; k < ROWS_PER_THREAD; ++k) {
        const int row = first + k * THREADS;
        if (row >= num_rows) continue;
        for (int i = 0; i < Rows::kInputs; ++i) m.columns[i][skewed(row)] = in[i].value(bits[i][k]);
        m.kept[row] = kept[k];
      }
    }
  }

  // The rows of a piece in registers, the last one first.
  struct PieceRows {
    float values[PIECE][Rows::kInputs];
    bool counts[PIECE];

    QRM_FAST_HOST_DEVICE PieceRows(const Memory& m, int end, int num_rows) {
      QRM_FAST_UNROLL
      for (int k = 0; k < PIECE; ++k) {
        const int row = k < num_rows ? end - 1 - k : end - 1;
        counts[k] = k < num_rows && m.kept[row];
        for (int i = 0; i < Rows::kInputs; ++i) values[k][i] = m.columns[i][skewed(row)];
      }
    }
  };

  QRM_FAST_HOST_DEVICE void walk(Memory& m, const Rows& rows, int end, int num_rows, State state) const {
    const PieceRows piece(m, end, num_rows);
    QRM_FAST_UNROLL
    for (int k = 0; k < PIECE; ++k) {
      float results[Rows::kOutputs] = {};
      if (piece.counts[k]) state = rows.step(piece.values[k], state, results);
      if (k >= num_rows) continue;
      for (int i = 0; i < Rows::kOutputs; ++i) m.columns[i][skewed(end - 1 - k)] = results[i];
    }
  }

  QRM_FAST_HOST_DEVICE Map folded(const Memory& m, const Rows& rows, int end, int num_rows) const {
    const PieceRows piece(m, end, num_rows);
    Map map = Map::identity();
    QRM_FAST_UNROLL
    for (int k = 0; k < PIECE; ++k) {
      if (piece.counts[k]) map = rows.map(piece.values[k]).after(map);
    }
    return map;
  }

  // Composes the first `count` gathered maps into the first one. Map k covers the rows behind those of map k + 1.
  QRM_FAST_HOST_DEVICE void compose_gathered(Memory& m, int count) const {
    for (int step = 1; step < count; step *= 2) {
      on_all_threads([&](int thread) {
        if (thread % (2 * step) == 0 && thread + step < count) {
          m.gathered[thread] = m.gathered[thread + step].after(m.gathered[thread]);
        }
      });
    }
  }

  // Applies the maps [first, last) of a sequence's blocks or groups to the carry. `behind(i)` is where map i is
  // published.
  template <typename Behind>
  QRM_FAST_HOST_DEVICE void apply_published(Memory& m, int64_t first, int64_t last, Behind behind) const {
    for (int64_t i = first; i < last; i += THREADS) {
      const int count = last - i < THREADS ? static_cast<int>(last - i) : THREADS;
      on_all_threads([&](int thread) {
        if (thread < count) m.gathered[thread] = behind(i + thread)->wait();
      });
      compose_gathered(m, count);
      on_all_threads([&](int thread) {
        if (thread == 0) m.carry = m.gathered[0](m.carry);
      });
    }
  }

  QRM_FAST_HOST_DEVICE void run(Memory& m, int64_t u, UnitStart start) const {
    const int64_t high = (u + 1) * BLOCK < num_tokens ? (u + 1) * BLOCK : num_tokens;
    const int64_t first = start.sequence, begin = start.row;

    on_all_threads([&](int thread) {
      stage(m, begin, static_cast<int>(high - begin), thread);
      if (thread == 0) {
        m.num_pieces = m.most_pieces = m.end = 0;
        m.front = m.back_sequence = -1;
      }
    });

    // Sequences of one piece are finished here. The pieces of the others are listed; the order of sequences is
    // arbitrary.
    on_all_threads([&](int thread) {
      for (int64_t s = first + thread; s < cu.num_sequences() && cu[s] < high; s += THREADS) {
        const int64_t bos = cu[s], eos = cu[s + 1];
        const BlockRows block = BlockRows::of(bos, eos, high);
        const int num_rows = static_cast<int>(block.end - block.begin), end = static_cast<int>(block.end - begin);
        if (num_rows == 0) continue;
        max_shared(&m.end, end);
        const bool has_front = block.begin > bos, has_carry = block.index > 0;
        if (num_rows <= PIECE && !has_carry) {
          const Rows rows = rules(s);
          walk(m, rows, end, num_rows, this->end(rows, s));
          continue;
        }
        const int count = static_cast<int>(ceil_div(num_rows, PIECE)), base = add_shared(&m.num_pieces, count);
        max_shared(&m.most_pieces, count);
        for (int k = 0; k < count; ++k) {
          const int rest = num_rows - k * PIECE;
          m.pieces[base + k] = {s, end - k * PIECE, rest < PIECE ? rest : PIECE, k, has_carry};
        }
        if (has_front) {
          m.front = base + count - 1;
          m.front_index = block.index;
        }
        if (has_carry) {
          m.back_sequence = s;
          m.back_index = block.index;
        }
      }
    });

    if (m.num_pieces > 0) {
      on_all_threads([&](int thread) {
        for (int i = thread; i < m.num_pieces; i += THREADS) {
          const auto& piece = m.pieces[i];
          m.maps[0][i] = folded(m, rules(piece.sequence), piece.end, piece.num_rows);
        }
      });
      int now = 0;
      for (int step = 1; step < m.most_pieces; step *= 2, now = 1 - now) {
        on_all_threads([&](int thread) {
          for (int i = thread; i < m.num_pieces; i += THREADS) {
            const Map& map = m.maps[now][i];
            m.maps[1 - now][i] = m.pieces[i].distance < step ? map : map.after(m.maps[now][i - step]);
          }
        });
      }
      if (m.front >= 0) publish(m, u, m.maps[now][m.front]);
      if (m.back_sequence >= 0) {
        const int64_t j = m.back_index;
        on_all_threads([&](int thread) {
          if (thread == 0) m.carry = end(rules(m.back_sequence), m.back_sequence);
        });
        apply_published(m, 0, j / GROUP, [&](int64_t g) { return groups + u + j - (g * GROUP + GROUP - 1); });
        apply_published(m, j / GROUP * GROUP, j, [&](int64_t i) { return blocks + u + j - i; });
      }
      on_all_threads([&](int thread) {
        for (int i = thread; i < m.num_pieces; i += THREADS) {
          const auto& piece = m.pieces[i];
          const Rows rows = rules(piece.sequence);
          State state = piece.has_carry ? m.carry : end(rows, piece.sequence);
          if (piece.distance > 0) state = m.maps[now][i - 1](state);
          walk(m, rows, piece.end, piece.num_rows, state);
        }
      });
    }

    on_all_threads([&](int thread) {
      for (int row = thread; row < m.end; row += THREADS) {
        for (int i = 0; i < Rows::kOutputs; ++i) out[i][begin + row] = m.columns[i][skewed(row)];
      }
    });
  }

  // Publishes the block's map and, if it is the last block of a group, the group's.
  QRM_FAST_HOST_DEVICE void publish(Memory& m, int64_t u, const Map& map) const {
    const bool completes = m.front_index % GROUP == GROUP - 1;
    on_all_threads([&](int thread) {
      if (thread == 0) blocks[u].publish(map);
      if (completes) m.gathered[thread] = thread == GROUP - 1 ? map : blocks[u + GROUP - 1 - thread].wait();
    });
    if (!completes) return;
    compose_gathered(m, GROUP);
    on_all_threads([&](int thread) {
      if (thread == 0) groups[u].publish(m.gathered[0]);
    });
  }
};

}  // namespace qrm_fast
