// The machine: blocks in flight, their warps stepped in an order drawn from a seed.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "memory.h"
#include "ptx.h"

namespace ptx {

constexpr uint32_t ALL_LANES = 0xffffffff;

// An operation that is carried out at some time between its issue and the end of the wait for it.
struct Asynchronous {
  std::function<void()> perform, finish;
  bool performed = false;
};

// Asynchronous operations of a warp, waited for by groups, carried out in their order.
struct GroupQueue {
  std::vector<Asynchronous> open;
  std::deque<std::vector<Asynchronous>> groups;

  void commit() {
    groups.push_back(std::move(open));
    open.clear();
  }
  bool all_performed() const;
  void wait(size_t pending);
  void perform_some(std::mt19937_64& random);
};

struct Warp {
  uint32_t id = 0;
  std::vector<uint64_t> registers;  // [slots, LANES]
  int common = 0;                   // the program counter of all lanes, where `uniform`
  bool uniform = true;
  int counters[LANES] = {};
  uint32_t alive = ALL_LANES, blocked = 0;
  uint32_t arrived = 0, awaiting = 0;    // lanes at the barrier of the cluster; those that wait are blocked, too
  uint32_t fences = 0, fence_epoch = 0;  // to the asynchronous proxy: how many, and when the last one was
  Knowledge known;
  GroupQueue copies, products, stores;
  std::vector<uint8_t> written_later;  // by slot, where products are pending: accumulators
  bool registers_fenced = false;       // since products were last waited for
  int most_registers = 0;              // that each thread asked for
};

struct MessageBarrier {
  int expected = 0, pending = 0;
  uint32_t warp = 0, time = 0;  // that initialised it, and when
  bool published = false;       // to other blocks
  int64_t bytes = 0;
  uint64_t phases = 0;        // that have ended
  Knowledge gathered, known;  // of those that arrived in this phase; in the phases that have ended

  void complete_if_done() {
    if (pending == 0 && bytes == 0) {
      ++phases;
      pending = expected;
      known.join(gathered);
      gathered = {};
    }
  }
};

struct Block;

// Blocks that run at the same time, in the order of their ranks; null once they have ended.
struct Cluster {
  std::vector<Block*> blocks;
};

struct Block {
  uint32_t id;
  uint32_t rank = 0;
  std::shared_ptr<Cluster> cluster;
  Times visits;  // of warps of other blocks: when they last arrived at a barrier here
  int x, y, z;
  SharedMemory shared;
  std::vector<Warp> warps;
  uint32_t epoch = 1;
  const Instruction* barrier = nullptr;  // where lanes wait
  bool any = false;                      // of the predicates at a reducing barrier
  std::map<uint32_t, MessageBarrier> message_barriers;
  std::vector<std::function<void()>> bulk_copies;

  Block(uint32_t id, int bytes) : id(id), shared(id, bytes) {}
  // Of an mbarrier, among those of all blocks.
  uint64_t key(uint32_t address) const { return uint64_t(id) << 32 | address; }
};

// A tensor map as the launcher packs it into the parameters.
struct TensorMap {
  uint64_t base;
  int64_t columns, rows, stride_bytes;
  int32_t box_columns, box_rows, element_bytes, swizzle;  // swizzle: 1, 2, 3 for rows of 32, 64, 128 bytes
};

enum class Timing { Eager, Lazy, Mixed };  // of asynchronous operations

struct Options {
  uint64_t seed = 0;
  int most_blocks = 4;  // in flight
  uint64_t most_steps = 0;
  int cluster = 1;  // blocks of one
};

class Machine {
 public:
  Machine(const Kernel& kernel, const uint8_t* parameters, const int (&grid)[3], int threads, int shared_bytes,
          Options options);
  void run();

  const Kernel& kernel;
  std::vector<uint8_t> parameters;
  GlobalMemory global;
  Timing timing;
  std::mt19937_64 random;
  uint64_t steps = 0, next_id = 1;
  uint64_t quiet = 0;  // steps since anything was written, arrived at or left

  // Carries out an operation now or leaves it for later.
  void issue(GroupQueue& queue, Asynchronous operation);
  // Lanes wait for the rest of their block.
  void arrive(Step& s);
  void await_cluster(Step& s);
  void exit(Block& block, Warp& warp, uint32_t lanes);
  void acquire(Block& block, Warp& warp, uint64_t address);
  void release(Block& block, Warp& warp, uint64_t address, bool adds);

 private:
  void start_cluster();
  std::unique_ptr<Block> new_block(uint32_t id);
  void retire(size_t place);
  void check_registers(const Block& block) const;
  void release_barrier(Block& block);
  void release_cluster(const Cluster& cluster);
  // Lanes that stand at the same instruction and may execute it.
  uint32_t chosen_lanes(Warp& warp, int& counter);
  bool step(Block& block, Warp& warp);  // whether the warp may go on at once

  int grid_[3], threads_, shared_bytes_;
  Options options_;
  std::vector<uint32_t> order_;
  size_t next_block_ = 0, resident_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<uint64_t> initial_registers_;
};

// One instruction of one warp.
struct Step {
  Machine& machine;
  Block& block;
  Warp& warp;
  const Instruction& i;
  uint32_t lanes;       // that execute it
  bool yields = false;  // another warp's turn

  uint64_t* slot(int operand) const { return &warp.registers[static_cast<size_t>(i.slot(operand)) * LANES]; }
  uint64_t* nth(int k) const { return &warp.registers[static_cast<size_t>(i.slots[k]) * LANES]; }
  uint64_t uniform(int operand) const { return slot(operand)[__builtin_ctz(lanes)]; }
  Accessor accessor() const { return {block.id, warp.id, &warp.known}; }

  template <typename F>
  void each(F f) const {
    if (lanes == ALL_LANES) {
      for (int lane = 0; lane < LANES; ++lane) f(lane);
    } else {
      for (uint32_t left = lanes; left; left &= left - 1) f(__builtin_ctz(left));
    }
  }
};

// By instruction name: which handler it gets, how many of its operands are written, whether its warp converges.
struct Decoder {
  int outputs;
  Handler (*choose)(const Instruction&);
  bool convergent = false;
};
using Decoders = std::map<std::string, Decoder>;
const Decoders& arithmetic();
const Decoders& control();
const Decoders& transfers();
const Decoders& messages();
const Decoders& matrices();

[[noreturn]] void unknown(const Instruction& i);

uint64_t address_of(const Step& s, int operand, int nth, int lane);
void check_alignment(uint64_t address, int bytes);

// Of the cluster, by its rank; it has not ended.
Block& block_of(const Step& s, uint32_t rank);
// An mbarrier there may be told of copies and arrivals by this thread.
void check_published(const Step& s, Block& block, uint32_t barrier);

// Bits of a register as a value, and back.
template <typename T>
T value_of(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <typename T>
uint64_t bits_of(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

}  // namespace ptx
