// What one block of threads computes in a scan over packed sequences. Written for device and host: a test runs it on
// the CPU.
//
// Rows are read once and results written once, both coalesced, through shared memory. Nothing else is written to global
// memory but one map per BLOCK rows. One read and one write per row is the least a scan can move; what is computed in
// between must fit into that time, so a thread reads the rows of its piece from shared memory once and keeps them.
//
// Cuts. A sequence is cut into blocks of BLOCK rows and these into pieces of PIECE rows, both counted from the
// sequence's *end*. The packed rows are cut into units of BLOCK rows, one per thread block. A unit computes the blocks
// whose last row lies in it: whole short sequences, and at most one block of a longer sequence.
//
// Inside a unit. A thread walks a piece row by row, once for its map (maps.h) and once for its results. In between, the
// maps of each RUN pieces are composed by doubling distances; what is behind a run acts on the state run by run. A
// piece reaches only towards the end of its own block, so the order of every product depends on the distance to that
// end alone. A unit of one whole block, as most are inside a long sequence, has no pieces to look for: piece i is
// thread i's, and maps are passed between the lanes of a warp. Sequences of SHORT rows are walked by one thread each.
//
// Between units. A block with rows in front of it publishes its map; every GROUP-th block also publishes the map of its
// group. A block's carry is composed from the groups and then the blocks behind it, in a tree whose shape depends on
// their number alone. So the bits depend neither on the packing nor on timing. A unit waits only for units behind it,
// which take their tickets earlier.
#pragma once
#include <cstdint>
#include <cstring>

#include "../maps.h"

#if defined(__CUDA_ARCH__)
#define QRM_FAST_UNROLL _Pragma("unroll")
#else
#define QRM_FAST_UNROLL
#endif

namespace qrm_fast {

constexpr int THREADS = 128;
constexpr int PIECE = 8;
constexpr int RUN = 16;  // pieces
constexpr int SHORT = 5 * PIECE;
constexpr int BLOCK = 1024;
constexpr int GROUP = THREADS;
constexpr int ROWS_PER_THREAD = BLOCK / THREADS;
constexpr int FEW_ROWS = ROWS_PER_THREAD / 2;
constexpr int MAX_ROWS = 2 * BLOCK;
constexpr int MAX_BLOCKS = MAX_ROWS / (SHORT + 1) + 1;        // of sequences that are not short
constexpr int MAX_PIECES = MAX_BLOCKS * (SHORT / PIECE + 1);  // theirs

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

// Calls f() on one thread; the others do not wait.
template <typename F>
QRM_FAST_HOST_DEVICE inline void on_first_thread(F f) {
#if defined(__CUDA_ARCH__)
  if (threadIdx.x == 0) f();
#else
  f();
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

// Sets the bit of `row` in words of 32 rows; on the device a warp's threads do so together, for 32 rows in turn.
QRM_FAST_HOST_DEVICE inline void set_bit(uint32_t* words, int row, bool bit) {
#if defined(__CUDA_ARCH__)
  const uint32_t word = __ballot_sync(~0u, bit);
  if (row % 32 == 0) words[row / 32] = word;
#else
  words[row / 32] = (words[row / 32] & ~(1u << row % 32)) | uint32_t(bit) << row % 32;
#endif
}

// What each thread keeps in registers.
template <typename T>
struct PerThread {
#if defined(__CUDA_ARCH__)
  T value;
  __device__ T& operator[](int) { return value; }
#else
  T values[THREADS];
  QRM_FAST_HOST_DEVICE T& operator[](int thread) { return values[thread]; }
#endif
};

#if defined(__CUDA_ARCH__)
// x of the lane that shuffle(word) reads each word of.
template <typename T, typename F>
__device__ inline T shuffled(const T& x, F shuffle) {
  static_assert(sizeof(T) % 4 == 0, "shuffled in words");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &x, sizeof(T));
  for (uint32_t& word : words) word = shuffle(word);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

// x of the lane `distance` below or above, the lane's own where there is none.
template <typename T>
__device__ inline T from_below(const T& x, int distance) {
  return shuffled(x, [=](uint32_t word) { return __shfl_up_sync(~0u, word, distance); });
}
template <typename T>
__device__ inline T from_above(const T& x, int distance) {
  return shuffled(x, [=](uint32_t word) { return __shfl_down_sync(~0u, word, distance); });
}
#endif

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

// The rows of a unit's blocks, which are those of neighbouring sequences. Only the first can have rows in front of its
// block, and only the last rows behind.
struct UnitRows {
  int64_t first, last;  // sequences
  int64_t begin, end;   // rows
  int64_t front, back;  // index of the block with rows in front of it, of the block with rows behind it, or -1

  // Sequences `first` and `last` have the first and the last of the rows [low, high) that the unit is cut from.
  template <typename Cu>
  QRM_FAST_HOST_DEVICE static UnitRows of(const Cu& cu, int64_t first, int64_t last, int64_t high) {
    const int64_t bos = cu[first];
    const BlockRows front = BlockRows::of(bos, cu[first + 1], high), back = BlockRows::of(cu[last], cu[last + 1], high);
    return {first,
            last,
            front.begin,
            back.end,
            front.begin > bos ? front.index : -1,
            back.index > 0 && back.begin < back.end ? back.index : -1};
  }
  // Whether they are one block of BLOCK rows.
  QRM_FAST_HOST_DEVICE bool is_whole() const { return first == last && end - begin == BLOCK; }
};

template <typename Rows>
struct UnitMemory {
  using Map = typename Rows::Map;

  struct Block {
    int sequence;       // counted from the unit's first
    int end, num_rows;  // rows [end - num_rows, end) of the unit
    int first_piece;    // the one at its end
  };

  float columns[Rows::kInputs][MAX_ROWS + MAX_ROWS / 32];
  uint32_t kept[MAX_ROWS / 32 + 1];  // by the mask, a bit per row
  Block blocks[MAX_BLOCKS];
  Map maps[2][MAX_PIECES];
  int partial[MAX_PIECES / 32 + 1];  // of the pieces of a warp, how many are shorter than PIECE
  uint8_t distances[MAX_PIECES];     // of pieces: how many lie between each and the end of its block
  Map gathered[THREADS];
  typename Rows::State carry;
  int listed;       // blocks << 16 | pieces
  int front_piece;  // first of the unit's first block
};

// `Rules` gives the Rows of sequence s as rules(s), `Cu` the boundaries. A `Column` loads rows t, t + THREADS, ... by
// column.load(t, rest, bits), and column.widen(bits) and Column::value make floats of them.
template <typename Rules, bool kMasked, typename Column, typename Cu>
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

  QRM_FAST_HOST_DEVICE State end(const Rows& rows, int64_t s) const {
    return bootstrap != nullptr ? rows.end(bootstrap[s]) : rows.end();
  }

  // Where a row of the unit lies in shared memory. A padding word after each 32 keeps threads that read neighbouring
  // pieces from the same bank. kWhole: the unit is one block of BLOCK rows, which lie from the last one to the first,
  // so that no padding comes among the rows of a piece.
  QRM_FAST_HOST_DEVICE static int skewed(int i) { return i + (i >> 5); }
  template <bool kWhole>
  QRM_FAST_HOST_DEVICE static int place(int row) {
    return skewed(kWhole ? BLOCK - 1 - row : row);
  }
  static constexpr int COLUMN = MAX_ROWS + MAX_ROWS / 32;
  template <bool kWhole>
  static constexpr int STRIDE = (kWhole ? -1 : 1) * (THREADS + THREADS / 32);  // from a row to the one THREADS on

  // Rows [begin, begin + num_rows) to shared memory. A thread asks for many of its rows before it waits for the first.
  QRM_FAST_HOST_DEVICE void stage(Memory& m, int64_t begin, int num_rows, int thread) const {
    int first = thread;
    for (; first - thread + BLOCK <= num_rows; first += BLOCK) {
      stage_rows<false, true, ROWS_PER_THREAD>(m, begin, first, BLOCK);
    }
    if (first - thread + BLOCK / 2 <= num_rows) {
      stage_rows<false, true, FEW_ROWS>(m, begin, first, BLOCK / 2);
      first += BLOCK / 2;
    }
    if (first - thread < num_rows) stage_rows<false, false, FEW_ROWS>(m, begin, first, num_rows - first);
  }

  // Rows first, first + THREADS, ...: kRows if they are all there, else those below first + rest.
  template <bool kWhole, bool kAll, int kRows>
  QRM_FAST_HOST_DEVICE void stage_rows(Memory& m, int64_t begin, int first, int rest) const {
    typename Column::Bits bits[Rows::kInputs][kRows];
    for (int i = 0; i < Rows::kInputs; ++i) in[i].template load<kAll>(begin + first, rest, bits[i]);
    if (kMasked) {
      bool kept[kRows];
      QRM_FAST_UNROLL
      for (int k = 0; k < kRows; ++k) kept[k] = (kAll || k * THREADS < rest) && (mask + begin + first)[k * THREADS];
      QRM_FAST_UNROLL
      for (int k = 0; k < kRows; ++k) set_bit(m.kept, first + k * THREADS, kept[k]);
    }
    for (int i = 0; i < Rows::kInputs; ++i) in[i].widen(bits[i]);
    float* staged = m.columns[0] + place<kWhole>(first);
    QRM_FAST_UNROLL
    for (int k = 0; k < kRows; ++k) {
      if (!kAll && k * THREADS >= rest) continue;
      for (int i = 0; i < Rows::kInputs; ++i) staged[i * COLUMN + k * STRIDE<kWhole>] = Column::value(bits[i][k]);
    }
  }

  QRM_FAST_HOST_DEVICE void unstage(const Memory& m, int64_t begin, int num_rows, int thread) const {
    int first = thread;
    for (; first - thread + BLOCK <= num_rows; first += BLOCK) {
      unstage_rows<false, true, ROWS_PER_THREAD>(m, begin, first, BLOCK);
    }
    if (first - thread + BLOCK / 2 <= num_rows) {
      unstage_rows<false, true, FEW_ROWS>(m, begin, first, BLOCK / 2);
      first += BLOCK / 2;
    }
    if (first < num_rows) unstage_rows<false, false, FEW_ROWS>(m, begin, first, num_rows - first);
  }

  template <bool kWhole, bool kAll, int kRows>
  QRM_FAST_HOST_DEVICE void unstage_rows(const Memory& m, int64_t begin, int first, int rest) const {
    const float* staged = m.columns[0] + place<kWhole>(first);
    QRM_FAST_UNROLL
    for (int i = 0; i < Rows::kOutputs; ++i) {
      float* results = out[i] + begin + first;
      QRM_FAST_UNROLL
      for (int k = 0; k < kRows; ++k) {
        if (kAll || k * THREADS < rest) results[k * THREADS] = staged[i * COLUMN + k * STRIDE<kWhole>];
      }
    }
  }

  // Rows [end - num_rows, end), at most PIECE, in registers: the last one first.
  template <bool kWhole>
  struct Piece {
    int end, num_rows;
    bool all_full;  // it and those of the other threads of its warp, for which no row is asked whether it exists
    uint32_t kept;  // by the mask: the highest bit for the last row
    float values[PIECE][Rows::kInputs];

    QRM_FAST_HOST_DEVICE bool is_kept(int k) const { return (kept & 0x80000000u >> k) != 0; }
    // Calls f(k, row) with where each row lies in the first column.
    template <typename T, typename F>
    QRM_FAST_HOST_DEVICE void each(T* column, F f) const {
      if (kWhole || all_full) {
        each_row<true>(column, f);
      } else {
        each_row<false>(column, f);
      }
    }
    template <bool kAll, typename T, typename F>
    QRM_FAST_HOST_DEVICE void each_row(T* column, F f) const {
      T* row = column + place<kWhole>(end - 1);
      const int padding = ((end - 1) & 31) + 1;
      QRM_FAST_UNROLL
      for (int k = 0; k < PIECE; ++k) {
        if (!kWhole && k == padding) --row;
        if (kAll || k < num_rows) f(k, kWhole ? row + k : row - k);
      }
    }
  };

  template <bool kWhole>
  QRM_FAST_HOST_DEVICE Piece<kWhole> loaded(const Memory& m, int end, int num_rows, bool all_full) const {
    Piece<kWhole> piece;
    piece.all_full = all_full;
    piece.end = end;
    piece.num_rows = num_rows;
    if (kMasked) {
      const int begin = end - num_rows;
      const uint64_t kept = uint64_t(m.kept[begin / 32 + 1]) << 32 | m.kept[begin / 32];
      piece.kept = static_cast<uint32_t>(kept >> begin % 32) << (32 - num_rows);
    }
    piece.each(m.columns[0], [&](int k, const float* row) {
      for (int i = 0; i < Rows::kInputs; ++i) piece.values[k][i] = row[i * COLUMN];
    });
    return piece;
  }

  // Results take the place of the rows; returns the state in front of them.
  template <bool kWhole>
  QRM_FAST_HOST_DEVICE State walk(Memory& m, const Rows& rows, const Piece<kWhole>& piece, State state) const {
    piece.each(m.columns[0], [&](int k, float* row) {
      float results[Rows::kOutputs] = {};
      if (!kMasked || piece.is_kept(k)) state = rows.step(piece.values[k], state, results);
      for (int i = 0; i < Rows::kOutputs; ++i) row[i * COLUMN] = results[i];
    });
    return state;
  }

  template <bool kWhole>
  QRM_FAST_HOST_DEVICE Map folded(const Rows& rows, const Piece<kWhole>& piece) const {
    return rows.folded(kWhole || piece.all_full ? composed<true>(rows, piece) : composed<false>(rows, piece));
  }

  // kAll: all rows of the piece exist.
  template <bool kAll, bool kWhole>
  QRM_FAST_HOST_DEVICE Map composed(const Rows& rows, const Piece<kWhole>& piece) const {
    Map map = Map::identity();
    QRM_FAST_UNROLL
    for (int k = 0; k < PIECE; ++k) {
      if (kMasked ? piece.is_kept(k) : kAll || k < piece.num_rows) map = rows.before(piece.values[k], map);
    }
    return map;
  }

  // Calls f(map) on one thread with the first `count` gathered maps composed, then waits for all. Map k covers the rows
  // behind those of map k + 1. One warp composes them, each lane first four of its own.
  template <typename F>
  QRM_FAST_HOST_DEVICE void with_gathered(Memory& m, int count, F f) const {
#if defined(__CUDA_ARCH__)
    static_assert(THREADS == 4 * 32, "gathered maps of a lane");
    const int lane = threadIdx.x;
    if (lane < 32) {
      Map map = Map::identity();
      if (4 * lane < count) map = m.gathered[4 * lane];
      if (4 * lane + 1 < count) map = m.gathered[4 * lane + 1].after(map);
      if (4 * lane + 2 < count) {
        Map later = m.gathered[4 * lane + 2];
        if (4 * lane + 3 < count) later = m.gathered[4 * lane + 3].after(later);
        map = later.after(map);
      }
      for (int step = 1; 4 * step < count; step *= 2) {
        const Map above = from_above(map, step);
        if (lane % (2 * step) == 0 && 4 * (lane + step) < count) map = above.after(map);
      }
      if (lane == 0) f(map);
    }
    __syncthreads();
#else
    for (int step = 1; step < count; step *= 2) {
      for (int i = 0; i + step < count; i += 2 * step) m.gathered[i] = m.gathered[i + step].after(m.gathered[i]);
    }
    f(m.gathered[0]);
#endif
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
      with_gathered(m, count, [&](const Map& map) { m.carry = map(m.carry); });
    }
  }

  QRM_FAST_HOST_DEVICE void list(Memory& m, int sequence, int end, int num_rows) const {
    const int count = (num_rows + PIECE - 1) / PIECE, listed = add_shared(&m.listed, 1 << 16 | count);
    m.blocks[listed >> 16] = {sequence, end, num_rows, listed & 0xffff};
    if (num_rows % PIECE > 0) add_shared(m.partial + ((listed & 0xffff) + count - 1) / 32, 1);
    if (sequence == 0) m.front_piece = listed & 0xffff;
  }

  QRM_FAST_HOST_DEVICE const typename Memory::Block& block_of(const Memory& m, int piece) const {
    int i = 0;
    for (int num = m.listed >> 16; num > 1;) {
      const int half = num / 2;
      const bool later = m.blocks[i + half].first_piece <= piece;
      i += later ? half : 0;
      num = later ? num - half : half;
    }
    return m.blocks[i];
  }

  // What a thread works on: piece i of the unit.
  struct Taken {
    int64_t sequence;
    unsigned distance;  // of pieces, to the end of its block
    Rows rows;
    Piece<false> piece;
    Map map;
  };

  QRM_FAST_HOST_DEVICE Taken taken(const Memory& m, const UnitRows& unit, int i) const {
    const auto& block = block_of(m, i);
    const int64_t s = unit.first + block.sequence;
    const int distance = i - block.first_piece, rest = block.num_rows - distance * PIECE;
    const Rows rows = rules(s);
    const Piece<false> piece =
        loaded<false>(m, block.end - distance * PIECE, rest < PIECE ? rest : PIECE, m.partial[i / 32] == 0);
    return {s, static_cast<unsigned>(distance), rows, piece, folded(rows, piece)};
  }

  QRM_FAST_HOST_DEVICE void run(Memory& m, int64_t u, const UnitRows& unit) const {
    if (unit.is_whole()) {
      run_whole(m, u, unit);
    } else {
      run_blocks(m, u, unit);
    }
  }

  // Piece i is thread i's.
  QRM_FAST_HOST_DEVICE void run_whole(Memory& m, int64_t u, const UnitRows& unit) const {
    const Rows rows = rules(unit.first);
    PerThread<Piece<true>> pieces;
    PerThread<Map> maps;  // of each piece, then of those behind it in its run
    on_all_threads([&](int thread) { stage_rows<true, true, ROWS_PER_THREAD>(m, unit.begin, thread, BLOCK); });
    on_all_threads([&](int thread) {
      pieces[thread] = loaded<true>(m, BLOCK - thread * PIECE, PIECE, true);
      maps[thread] = folded(rows, pieces[thread]);
    });
    scan_runs(m, maps);
    if (unit.front >= 0) publish(m, u, unit.front, m.maps[1], 1);
    if (unit.back >= 0) find_carry(m, u, unit);
    on_all_threads([&](int thread) {
      State state = unit.back >= 0 ? m.carry : end(rows, unit.last);
      for (int run = 0; run < thread / RUN; ++run) state = m.maps[1][run](state);
      if (thread % RUN > 0) state = maps[thread](state);
      walk(m, rows, pieces[thread], state);
    });
    on_all_threads([&](int thread) { unstage_rows<true, true, ROWS_PER_THREAD>(m, unit.begin, thread, BLOCK); });
  }

  // Of each run of RUN threads: composes each map with those of the threads before it; then m.maps[1] has the runs'
  // own, and each thread the one of the thread before it.
  QRM_FAST_HOST_DEVICE static void scan_runs(Memory& m, PerThread<Map>& maps) {
#if defined(__CUDA_ARCH__)
    static_assert(32 % RUN == 0, "the threads of a warp");
    const int place = threadIdx.x % RUN;
    Map map = maps[threadIdx.x];
    QRM_FAST_UNROLL
    for (int step = 1; step < RUN; step *= 2) {
      const Map behind = from_below(map, step);
      if (place >= step) map = map.after(behind);
    }
    if (place == RUN - 1) m.maps[1][threadIdx.x / RUN] = map;
    maps[threadIdx.x] = from_below(map, 1);
    __syncthreads();
#else
    for (int step = 1; step < RUN; step *= 2) {
      for (int thread = THREADS - 1; thread >= 0; --thread) {
        if (thread % RUN >= step) maps[thread] = maps[thread].after(maps[thread - step]);
      }
    }
    for (int thread = THREADS - 1; thread >= 0; --thread) {
      if (thread % RUN == RUN - 1) m.maps[1][thread / RUN] = maps[thread];
      if (thread % RUN > 0) maps[thread] = maps[thread - 1];
    }
#endif
  }

  QRM_FAST_HOST_DEVICE void run_blocks(Memory& m, int64_t u, const UnitRows& unit) const {
    const int num_rows = static_cast<int>(unit.end - unit.begin);
    const int last = static_cast<int>(unit.last - unit.first);

    on_all_threads([&](int thread) {
      stage(m, unit.begin, num_rows, thread);
      if (thread == 0) m.listed = 0;
      if (thread <= MAX_PIECES / 32) m.partial[thread] = 0;
    });

    // Short sequences are finished here. The blocks of the others are listed; their order is arbitrary.
    on_all_threads([&](int thread) {
      for (int i = thread; i <= last; i += THREADS) {
        const int64_t s = unit.first + i, bos = cu[s], eos = cu[s + 1];
        const int begin = static_cast<int>((bos > unit.begin ? bos : unit.begin) - unit.begin);
        const int end = static_cast<int>((eos < unit.end ? eos : unit.end) - unit.begin);
        if (end - begin > SHORT || (i == last && unit.back >= 0)) {
          list(m, i, end, end - begin);
        } else if (end > begin) {
          const Rows rows = rules(s);
          State state = this->end(rows, s);
          for (int row = end; row > begin; row -= PIECE) {
            state = walk(m, rows, loaded<false>(m, row, row - begin < PIECE ? row - begin : PIECE, false), state);
          }
        }
      }
    });

    const int num_pieces = m.listed & 0xffff;
    if (num_pieces > 0) {
      // A thread keeps its first piece in registers. Those beyond THREADS, which few units have, it takes twice.
      PerThread<Taken> own;
      on_all_threads([&](int thread) {
        if (thread < num_pieces) {
          own[thread] = taken(m, unit, thread);
          m.maps[0][thread] = own[thread].map;
        }
        for (int i = thread + THREADS; i < num_pieces; i += THREADS) {
          const Taken x = taken(m, unit, i);
          m.maps[0][i] = x.map;
          m.distances[i] = static_cast<uint8_t>(x.distance);
        }
      });
      int now = 0;
      QRM_FAST_UNROLL
      for (unsigned step = 1; step < RUN; step *= 2, now = 1 - now) {
        const auto join = [&](int i, unsigned distance, Map& map) {
          if (distance % RUN >= step) map = map.after(m.maps[now][i - step]);
          m.maps[1 - now][i] = map;
        };
        on_all_threads([&](int thread) {
          if (thread < num_pieces) join(thread, own[thread].distance, own[thread].map);
          for (int i = thread + THREADS; i < num_pieces; i += THREADS) {
            Map map = m.maps[now][i];
            join(i, m.distances[i], map);
          }
        });
      }
      const Map* maps = m.maps[now];  // of each piece and those behind it in its run
      if (unit.front >= 0) publish(m, u, unit.front, maps + m.front_piece + RUN - 1, RUN);
      if (unit.back >= 0) find_carry(m, u, unit);
      const auto finish = [&](int i, const Taken& x) {
        State state = x.sequence == unit.last && unit.back >= 0 ? m.carry : end(x.rows, x.sequence);
        for (int next = i - x.distance + RUN; next <= i; next += RUN) state = maps[next - 1](state);
        if (x.distance % RUN > 0) state = maps[i - 1](state);
        walk(m, x.rows, x.piece, state);
      };
      on_all_threads([&](int thread) {
        if (thread < num_pieces) finish(thread, own[thread]);
        for (int i = thread + THREADS; i < num_pieces; i += THREADS) finish(i, taken(m, unit, i));
      });
    }

    on_all_threads([&](int thread) { unstage(m, unit.begin, num_rows, thread); });
  }

  // The state behind the unit's last block, from the maps of all blocks behind it.
  QRM_FAST_HOST_DEVICE void find_carry(Memory& m, int64_t u, const UnitRows& unit) const {
    const int64_t j = unit.back;
    on_first_thread([&] { m.carry = end(rules(unit.last), unit.last); });  // which also reads it, in with_gathered
    apply_published(m, 0, j / GROUP, [&](int64_t g) { return groups + u + j - (g * GROUP + GROUP - 1); });
    apply_published(m, j / GROUP * GROUP, j, [&](int64_t i) { return blocks + u + j - i; });
  }

  // Publishes the map of the unit's first block, whose runs have these, and, if it is the last block of a group, the
  // group's.
  QRM_FAST_HOST_DEVICE void publish(Memory& m, int64_t u, int64_t index, const Map* runs, int stride) const {
    const bool completes = index % GROUP == GROUP - 1;
    on_all_threads([&](int thread) {
      if (thread == GROUP - 1) {
        Map map = runs[0];
        for (int run = 1; run < BLOCK / PIECE / RUN; ++run) map = runs[run * stride].after(map);
        blocks[u].publish(map);
        m.gathered[thread] = map;
      } else if (completes) {
        m.gathered[thread] = blocks[u + GROUP - 1 - thread].wait();
      }
    });
    if (!completes) return;
    with_gathered(m, GROUP, [&](const Map& map) { groups[u].publish(map); });
  }
};

}  // namespace qrm_fast
