// Tiles of hidden @ weight.T in float32 accumulators, 128 rows x 256 columns per block of threads, for sm_90a.
//
// Two blocks of a cluster have the same columns: each loads half of every weight tile, for both, and its own rows. In a
// block one warp loads, two groups of four warps multiply, 64 rows each, and finish their tile in registers. STAGES
// pieces of the depth are in flight between them; a group that finishes its tile leaves the tensor cores to the other,
// for which the second one starts some stages later. Each logit is summed over the depth in order, 16 steps at a time,
// whatever tile it is in. Rows, columns and depths past the last are 0.
#pragma once
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

// One thread loads what tiles of rows from `row` and columns from `column` on read, one piece of the depth after
// another.
__device__ inline void load_tile(Ring& ring, const CUtensorMap& hidden, const CUtensorMap& weight, int row, int column,
                                 int dim, uint32_t rank, uint32_t blocks) {
  constexpr int kHalf = TILE_COLUMNS / 2;
  for (int depth = 0; depth < dim; depth += DEPTH) {
    ring.await_emptied();
    hopper::arrive_announcing(ring.filled(), STAGE_BYTES);
    hopper::load_box(hidden, row, depth, ring.rows(), ring.filled());
    for (int half = rank; half < 2; half += blocks) {
      hopper::load_box(weight, column + half * kHalf, depth, ring.columns() + half * COLUMNS_BYTES / 2, ring.filled(),
                       (1 << blocks) - 1);
    }
    ring.advance();
  }
}

// A group's rows of the tile that load_tile loads.
template <typename T>
__device__ inline void multiply_tile(Ring& ring, float (&z)[128], int group, int dim, uint32_t blocks) {
  __syncwarp();
  Ring behind = ring;
  for (int depth = 0; depth < dim; depth += DEPTH) {
    ring.await_filled();
    const uint64_t a = hopper::described(ring.rows() + group * GROUP_ROWS * DEPTH * 2);
    const uint64_t b = hopper::described(ring.columns());
    hopper::begin_products();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k) hopper::multiply<T>(z, a + 2 * k, b + 2 * k, depth + k > 0);
    hopper::commit_products();
    if (depth > 0) {
      hopper::await_products<1>();
      behind.leave(blocks);
      behind.advance();
    }
    ring.advance();
  }
  hopper::await_products<0>();
  hopper::settle(z);
  behind.leave(blocks);
}

}  // namespace qrm_fast
