// Tiles of products of 16-bit matrices in float32 accumulators, for sm_90a: 128 rows x 256 columns of one product per
// block of threads, or x 192 of each of two.
//
// Two blocks of a cluster have the same columns: each loads half of every tile of the columns' factor, for both, and
// its own rows. In a block one warp loads, two groups of four warps multiply, 64 rows each, and finish their tile in
// registers. STAGES pieces of the depth are in flight between them; a group that finishes its tile leaves the tensor
// cores to the other, for which the second one starts some stages later. Each element is summed over the depth in
// order, 16 steps at a time, whatever tile it is in. Rows, columns and depths past the last are 0.
#pragma once
#include "../indices.h"
#include "hopper.h"

namespace qrm_fast {

constexpr int TILE_ROWS = 128, TILE_COLUMNS = 256, DEPTH = 64, STAGES = 4;
constexpr int GROUPS = 2, GROUP_ROWS = TILE_ROWS / GROUPS, GROUP_THREADS = 128;
constexpr int PRODUCT_THREADS = GROUP_THREADS * (1 + GROUPS);
constexpr int WARP_ROWS = 16, WARPS = GROUPS * GROUP_THREADS / 32;

// Bytes of shared memory: pieces of rows and of columns, boxes that leave, barriers.
constexpr int ROWS_BYTES = TILE_ROWS * DEPTH * 2, COLUMNS_BYTES = TILE_COLUMNS * DEPTH * 2;
constexpr int STAGE_BYTES = ROWS_BYTES + COLUMNS_BYTES;
constexpr int BOX_COLUMNS = 64, BOX_BYTES = WARP_ROWS * BOX_COLUMNS * 2, BOXES = 2;  // of each warp
constexpr int BOXES_AT = STAGES * STAGE_BYTES, BARRIERS_AT = BOXES_AT + WARPS * BOXES * BOX_BYTES;
constexpr int ALIGNMENT = 1024;
constexpr int PRODUCT_BYTES = BARRIERS_AT + 2 * STAGES * 8 + ALIGNMENT;
static_assert(PRODUCT_BYTES <= 227 << 10);

// Of a thread that loads and of one that multiplies; a launch gives 168 to each of 384 threads.
constexpr int LOADING_REGISTERS = 24, MULTIPLYING_REGISTERS = 240;

// How a factor lies in memory: the depth along its rows, [rows, depth] or [columns, depth], or across them.
enum class Depth { Along, Across };
constexpr int SQUARE_BYTES = 64 * DEPTH * 2;  // a box where the depth lies across: 64 x 64

// The stages in shared memory, as one warp goes through them.
class Ring {
 public:
  __device__ explicit Ring(uint32_t memory) : memory_(memory) {}

  __device__ uint32_t rows() const { return memory_ + stage_ * STAGE_BYTES; }
  __device__ uint32_t columns() const { return rows() + ROWS_BYTES; }
  __device__ uint32_t filled() const { return filled(stage_); }
  __device__ uint32_t emptied() const { return filled() + STAGES * 8; }
  __device__ uint32_t filled(int stage) const { return memory_ + BARRIERS_AT + stage * 8; }

  // By one thread, before the cluster's barrier.
  __device__ void init(uint32_t blocks) const {
    for (int stage = 0; stage < STAGES; ++stage) {
      hopper::init_barrier(filled(stage), 1);
      hopper::init_barrier(filled(stage) + STAGES * 8, WARPS * blocks);
    }
    hopper::publish_barriers();
  }
  __device__ void await_filled() const { hopper::await(filled(), turn_); }
  __device__ void await_emptied() const { hopper::await(emptied(), turn_ ^ 1); }
  // Tells the warps that load, in all blocks of the cluster, that this warp has read the stage.
  __device__ void leave(uint32_t blocks) const {
    if (threadIdx.x % 32 < blocks) hopper::arrive_in(threadIdx.x % 32, emptied());
  }
  __device__ void advance() {
    stage_ = (stage_ + 1) % STAGES;
    turn_ ^= stage_ == 0;
  }

 private:
  uint32_t memory_;
  int stage_ = 0;
  uint32_t turn_ = 0;  // the parity of the phase that fills the stage
};

struct Tile {
  int row, column;  // the first ones
};

// Of rows, counted in clusters, and of pieces of the columns.
struct Place {
  int rows, piece;
};

// Where a cluster stands among those that multiply `num_rows` rows with `pieces` pieces of the columns: 8 with other
// rows go through one piece before the next, so that what they read stays in L2.
class Cluster {
 public:
  __device__ Cluster(int num_rows, int pieces)
      : blocks(hopper::blocks_in_cluster()), index(blockIdx.x / blocks), pieces_(pieces) {
    height_ = ceil_div(num_rows, TILE_ROWS * blocks);
  }
  __device__ int places() const { return height_ * pieces_; }
  __device__ Place operator[](int i) const {
    constexpr int kGroup = 8;
    const int first = i / (kGroup * pieces_) * kGroup, height = min(height_ - first, kGroup);
    const int within = i - first * pieces_;
    return {first + within % height, within / height};
  }
  // The first one of this block.
  __device__ int row(Place place) const {
    return (place.rows * blocks + static_cast<int>(hopper::rank_in_cluster())) * TILE_ROWS;
  }

  const int blocks, index;

 private:
  int pieces_, height_;
};

// All tiles of a product, dealt out to clusters that stay.
class DealtTiles {
 public:
  static constexpr int kWidth = TILE_COLUMNS;

  __device__ DealtTiles(int num_rows, int num_columns)
      : cluster_(num_rows, ceil_div(num_columns, TILE_COLUMNS)), step_(gridDim.x / cluster_.blocks) {
    count = ceil_div(cluster_.places() - cluster_.index, step_);
  }
  __device__ Tile operator[](int i) const {
    const Place place = cluster_[cluster_.index + i * step_];
    return {cluster_.row(place), place.piece * TILE_COLUMNS};
  }

  int count;

 private:
  Cluster cluster_;
  int step_;
};

// What is multiplied.
struct Factors {
  const CUtensorMap &rows, &columns;
  int depth;
};

// One thread loads what a tile of kWidth columns reads, one piece of the depth after another.
template <Depth kRows, Depth kColumns, int kWidth>
__device__ inline void load_tile(Ring& ring, const Factors& factors, Tile tile, uint32_t rank, uint32_t blocks) {
  constexpr int kHalf = kWidth / 2, kHalfBytes = kHalf * DEPTH * 2;
  static_assert(kWidth <= TILE_COLUMNS && (kColumns == Depth::Along || kHalf % 64 == 0));
  const uint16_t everywhere = (1 << blocks) - 1;
  for (int d = 0; d < factors.depth; d += DEPTH) {
    ring.await_emptied();
    const uint32_t filled = ring.filled();
    hopper::arrive_announcing(filled, ROWS_BYTES + 2 * kHalfBytes);
    if constexpr (kRows == Depth::Along) {
      hopper::load_box(factors.rows, tile.row, d, ring.rows(), filled);
    } else {
      for (int i = 0; i < TILE_ROWS / 64; ++i) {
        hopper::load_box(factors.rows, d, tile.row + i * 64, ring.rows() + i * SQUARE_BYTES, filled);
      }
    }
    for (int half = rank; half < 2; half += blocks) {
      const int column = tile.column + half * kHalf;
      const uint32_t to = ring.columns() + half * kHalfBytes;
      if constexpr (kColumns == Depth::Along) {
        hopper::load_box(factors.columns, column, d, to, filled, everywhere);
      } else {
        for (int i = 0; i < kHalf / 64; ++i) {
          hopper::load_box(factors.columns, d, column + i * 64, to + i * SQUARE_BYTES, filled, everywhere);
        }
      }
    }
    ring.advance();
  }
}

// A group's rows of the tile that load_tile loads; added to what z holds where kAdded.
template <typename T, Depth kRows, Depth kColumns, bool kAdded, int kCount>
__device__ inline void multiply_tile(Ring& ring, float (&z)[kCount], int group, int depth, uint32_t blocks) {
  constexpr int kAlong = 16 * 2, kAcross = 16 * 128;  // bytes of 16 steps
  constexpr int kRowsStep = kRows == Depth::Along ? kAlong : kAcross;
  constexpr int kColumnsStep = kColumns == Depth::Along ? kAlong : kAcross;
  static_assert(GROUP_ROWS * DEPTH * 2 == SQUARE_BYTES);
  __syncwarp();
  if constexpr (kAdded) hopper::settle(z);
  Ring behind = ring;
  int d = 0;
  do {
    ring.await_filled();
    const uint64_t a = hopper::described(ring.rows() + group * SQUARE_BYTES, 16);
    const uint64_t b = hopper::described(ring.columns(), kColumns == Depth::Along ? 16 : SQUARE_BYTES);
    hopper::begin_products();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k) {
      hopper::multiply<T, kRows == Depth::Across, kColumns == Depth::Across>(
          z, a + k * kRowsStep / 16, b + k * kColumnsStep / 16, kAdded || d + k > 0);
    }
    hopper::commit_products();
    if (d > 0) {
      hopper::await_products<1>();
      behind.leave(blocks);
      behind.advance();
    }
    ring.advance();
    d += DEPTH;
  } while (d < depth);
  hopper::await_products<0>();
  hopper::settle(z);
  behind.leave(blocks);
}

// What a block does: the tiles tiles[0] to tiles[tiles.count - 1], one after the other, each of all the products.
// Finish(p, map, warp_row, boxes), with the first row of its warp within a tile and the warp's boxes in shared memory,
// makes what it will of each: begin(z, tile) leaves in z what a single product is added to, if Finish::kAdded;
// end(z, tile), or end(z, z2, tile), has the results.
template <typename T, Depth kRows, Depth kColumns, typename Finish, int kProducts, typename Tiles>
__device__ inline void multiply_tiles(const Factors (&factors)[kProducts], const CUtensorMap& out, const Tiles& tiles,
                                      const typename Finish::Parameters& p) {
  static_assert(kProducts == 1 || (kProducts == 2 && !Finish::kAdded));
  extern __shared__ uint8_t shared[];
  const uint32_t memory =
      (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  const uint32_t rank = hopper::rank_in_cluster(), blocks = hopper::blocks_in_cluster();
  Ring ring(memory);
  if (threadIdx.x == 0) {
#pragma unroll
    for (const Factors& f : factors) {
      hopper::fetch_map(f.rows);
      hopper::fetch_map(f.columns);
    }
    ring.init(blocks);
  }
  hopper::cluster_barrier();
  if (threadIdx.x < GROUP_THREADS) {
    hopper::give_up_registers<LOADING_REGISTERS>();
    if (threadIdx.x == 0) {
      for (int i = 0; i < tiles.count; ++i) {
#pragma unroll
        for (const Factors& f : factors) load_tile<kRows, kColumns, Tiles::kWidth>(ring, f, tiles[i], rank, blocks);
      }
    }
  } else {
    hopper::take_registers<MULTIPLYING_REGISTERS>();
    const int warp = threadIdx.x / 32 - GROUP_THREADS / 32, group = warp / 4;
    Finish finish(p, out, warp * WARP_ROWS, memory + BOXES_AT + warp * BOXES * BOX_BYTES);
    if (group > 0) {
      int64_t pieces = 0;
#pragma unroll
      for (const Factors& f : factors) pieces += tiles.count * ceil_div(f.depth, DEPTH);
      hopper::await(ring.filled(static_cast<int>(min(pieces, static_cast<int64_t>(STAGES))) - 1), 0);
    }
    // not one array of both, which would stay in memory where a finish has lambdas
    float z[Tiles::kWidth / 2];
    [[maybe_unused]] float z2[Tiles::kWidth / 2];
    for (int i = 0; i < tiles.count; ++i) {
      const Tile tile = tiles[i];
      finish.begin(z, tile);
      multiply_tile<T, kRows, kColumns, Finish::kAdded>(ring, z, group, factors[0].depth, blocks);
      if constexpr (kProducts == 1) {
        finish.end(z, tile);
      } else {
        multiply_tile<T, kRows, kColumns, Finish::kAdded>(ring, z2, group, factors[1].depth, blocks);
        finish.end(z, z2, tile);
      }
    }
    hopper::await_stores<0>();
  }
  // a block that ended could no longer be arrived at by the other one
  __syncwarp();
  hopper::cluster_barrier();
}

}  // namespace qrm_fast
