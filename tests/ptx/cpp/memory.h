// Global and shared memory of a launch, with what races need to be seen: who touched what, and what is known of it.
//
// Warps are the threads of the race detector. A warp's time advances at each barrier and each release; what a warp
// knows of another one is the time up to which all that one did came before. Barriers join what the warps of a block
// know, an acquire joins what the release it reads from knew. An access that conflicts with one that is not known
// races. In shared memory the barriers of the whole block are the only order between warps, so a count of them serves;
// asynchronous copies and reads are ordered by mbarriers as well, also between blocks of a cluster.
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptx.h"

namespace ptx {

using Times = std::map<uint32_t, std::vector<uint32_t>>;  // by block and warp

struct Knowledge {
  std::vector<uint32_t> own;           // time, by warp of the block
  Times foreign;                       // likewise, of other blocks
  Times drained;                       // of which only what was read asynchronously came before
  std::map<uint64_t, uint64_t> ended;  // how many phases of mbarriers, by block and address

  void join(const Knowledge& other);
  void join_foreign(const Times& other);
  // What others have to learn, of whom this block is a foreign one.
  Knowledge told(uint32_t block) const;
};

// Who accesses memory.
struct Accessor {
  uint32_t block, warp;
  const Knowledge* known;

  uint32_t time() const { return known->own[warp]; }
  bool knows(uint32_t block, uint32_t warp, uint32_t time) const;
  bool knows_drained(uint32_t block, uint32_t warp, uint32_t time) const;
};

enum class Access { Plain, Atomic };

class GlobalMemory {
 public:
  // Whether races between blocks are none: for sequences that overlap, against an op's contract.
  bool blocks_may_race = false;

  // `granule`: the element size, at which accesses are told apart.
  void add(uint64_t begin, uint64_t end, uint32_t granule);

  void read(const Accessor& who, uint64_t address, int bytes, void* to, Access access = Access::Plain);
  void write(const Accessor& who, uint64_t address, int bytes, const void* from, Access access = Access::Plain);

  // What the release that an acquire at this address reads from knew; a release adds to it where it is part of a
  // read-modify-write.
  Knowledge* released(uint64_t address);
  void release(uint64_t address, const Accessor& who, bool adds);
  void forget_release(uint64_t address) { releases_.erase(address); }

 private:
  struct Cell {
    uint32_t writer, write_time;
    uint32_t reader, read_time, readers;  // the last block that read, its time then, and which warps
    uint32_t other, other_time;           // the last one before that
    uint8_t writer_warp, other_warp;
    bool atomic;
  };
  struct Region {
    uint64_t begin, end;
    uint32_t granule;
    std::vector<Cell> cells;
  };
  Region& region(uint64_t address, int bytes);

  std::vector<Region> regions_;
  size_t last_ = 0;
  std::unordered_map<uint64_t, std::pair<uint32_t, Knowledge>> releases_;
};

class SharedMemory {
 public:
  SharedMemory(uint32_t block, int bytes) : block_(block), data_(bytes, 0xcd), shadow_(bytes) {}

  int size() const { return data_.size(); }
  uint8_t* data(uint32_t address, int bytes);  // without detection

  void read(uint32_t warp, uint32_t epoch, uint32_t address, int bytes, void* to);
  // `fences`: how many fences to the asynchronous proxy the warp has executed.
  void write(uint32_t warp, uint32_t epoch, uint32_t fences, uint32_t address, int bytes, const void* from);

  // An atomic change of the bytes by f. Atomics do not race with each other, only with plain accesses.
  template <typename F>
  void exchange(uint32_t warp, uint32_t epoch, uint32_t address, int bytes, F f) {
    f(data(address, bytes));
    mark_atomic(warp, epoch, address, bytes);
  }

  // Asynchronous copies into memory: nobody touches the bytes between `begin_copy` and `end_copy`. Products may read
  // them behind a barrier without a fence, which Triton and CUTLASS rely on and PTX's manual leaves open.
  void begin_copy(uint32_t address, int bytes);
  void end_copy(uint32_t warp, uint32_t epoch, uint32_t address, int bytes);
  // As these, of a copy engine whose end is seen at an mbarrier, the phase of which has this number; it was begun in
  // epoch `since` by `who`, perhaps in another block, who must know that earlier asynchronous reads are over.
  void begin_bulk_copy(const Accessor& who, uint32_t address, int bytes);
  void end_bulk_copy(uint32_t since, uint64_t barrier, uint64_t phase, uint32_t address, int bytes);

  // Asynchronous reads: nobody writes the bytes until they are done. What was written needs a fence to the asynchronous
  // proxy, of the writer behind its write (`fences`: of each warp) or of the reader behind the barrier between them
  // (`fence_epoch`: of its last one).
  void begin_async_read(const Accessor& who, uint64_t id, const std::vector<uint32_t>& fences, uint32_t fence_epoch,
                        uint32_t address, int bytes);
  void end_async_read(const Accessor& who, uint64_t id);

 private:
  struct Shadow {
    uint32_t write_epoch, read_epoch, readers;
    uint16_t fence;
    uint8_t writer;
    bool in_flight, atomic;
  };
  struct Range {
    uint64_t id;  // of a read; of the mbarrier that tells of a copy
    uint32_t begin, end;
    uint32_t warp = 0, time = 0;  // of a reader, when it was over
    uint64_t phase = 0;           // of the mbarrier

    bool overlaps(uint32_t address, int bytes) const { return address < end && address + bytes > begin; }
  };
  void forget(std::vector<Range>& ranges, uint32_t address, int bytes);
  void mark_atomic(uint32_t warp, uint32_t epoch, uint32_t address, int bytes);
  void check_async_reads(uint32_t address, int bytes) const;

  uint32_t block_;
  std::vector<uint8_t> data_;
  std::vector<Shadow> shadow_;
  std::vector<Range> reads_, over_, landed_;  // asynchronous reads in flight and past, bulk copies that have come
};

}  // namespace ptx
