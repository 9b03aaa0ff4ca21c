#include "memory.h"

#include <algorithm>

namespace ptx {
namespace {

void join_times(std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  if (a.size() < b.size()) a.resize(b.size());
  for (size_t i = 0; i < b.size(); ++i) a[i] = std::max(a[i], b[i]);
}

}  // namespace

void Knowledge::join(const Knowledge& other) {
  join_times(own, other.own);
  join_foreign(other.foreign);
  for (const auto& [block, times] : other.drained) join_times(drained[block], times);
  for (const auto& [barrier, phases] : other.ended) ended[barrier] = std::max(ended[barrier], phases);
}

void Knowledge::join_foreign(const Times& other) {
  for (const auto& [block, times] : other) join_times(foreign[block], times);
}

Knowledge Knowledge::told(uint32_t block) const {
  Knowledge result{{}, foreign, drained, ended};
  join_times(result.foreign[block], own);
  return result;
}

bool Accessor::knows(uint32_t other_block, uint32_t other_warp, uint32_t time) const {
  if (other_block == block) return other_warp == warp || known->own[other_warp] >= time;
  const auto found = known->foreign.find(other_block);
  return found != known->foreign.end() && found->second[other_warp] >= time;
}

bool Accessor::knows_drained(uint32_t other_block, uint32_t other_warp, uint32_t time) const {
  const auto found = known->drained.find(other_block);
  return knows(other_block, other_warp, time) || (found != known->drained.end() && found->second[other_warp] >= time);
}

void GlobalMemory::add(uint64_t begin, uint64_t end, uint32_t granule) {
  regions_.push_back({begin, end, granule, std::vector<Cell>((end - begin + granule - 1) / granule)});
}

GlobalMemory::Region& GlobalMemory::region(uint64_t address, int bytes) {
  const auto inside = [&](const Region& r) { return address >= r.begin && address + bytes <= r.end; };
  if (last_ < regions_.size() && inside(regions_[last_])) return regions_[last_];
  for (last_ = 0; last_ < regions_.size(); ++last_) {
    if (inside(regions_[last_])) return regions_[last_];
  }
  throw Fault("global access outside every tensor");
}

void GlobalMemory::read(const Accessor& who, uint64_t address, int bytes, void* to, Access access) {
  Region& r = region(address, bytes);
  std::memcpy(to, reinterpret_cast<void*>(address), bytes);
  const uint32_t time = who.time();
  const auto tolerated = [&](uint32_t block) { return blocks_may_race && block != who.block; };
  for (uint64_t k = (address - r.begin) / r.granule; k <= (address + bytes - 1 - r.begin) / r.granule; ++k) {
    Cell& cell = r.cells[k];
    const bool both_atomic = cell.atomic && access == Access::Atomic;
    if (cell.write_time && !both_atomic && !tolerated(cell.writer) &&
        !who.knows(cell.writer, cell.writer_warp, cell.write_time)) {
      throw Fault(cell.writer == who.block ? "race in global memory: read of what another warp of the block wrote"
                                           : "race in global memory: read of what another block wrote");
    }
    if (access == Access::Atomic) continue;
    if (cell.reader != who.block && cell.read_time) {
      cell.other = cell.reader;
      cell.other_time = cell.read_time;
      cell.other_warp = __builtin_ctz(cell.readers);
    }
    if (cell.reader != who.block || cell.read_time != time) cell.readers = 0;
    cell.reader = who.block;
    cell.read_time = time;
    cell.readers |= 1u << who.warp;
  }
}

void GlobalMemory::write(const Accessor& who, uint64_t address, int bytes, const void* from, Access access) {
  Region& r = region(address, bytes);
  const auto tolerated = [&](uint32_t block) { return blocks_may_race && block != who.block; };
  // Threads of a block that hold the same element store it several times over: no race where nothing changes.
  const bool same = std::memcmp(reinterpret_cast<void*>(address), from, bytes) == 0;
  for (uint64_t k = (address - r.begin) / r.granule; k <= (address + bytes - 1 - r.begin) / r.granule; ++k) {
    Cell& cell = r.cells[k];
    const bool both_atomic = cell.atomic && access == Access::Atomic;
    if (cell.write_time && !both_atomic && !(same && cell.writer == who.block) && !tolerated(cell.writer) &&
        !who.knows(cell.writer, cell.writer_warp, cell.write_time)) {
      throw Fault(cell.writer == who.block ? "race in global memory: two warps of a block write"
                                           : "race in global memory: two blocks write");
    }
    if (cell.read_time && !(same && cell.reader == who.block) && !tolerated(cell.reader)) {
      for (uint32_t left = cell.readers; left; left &= left - 1) {
        if (!who.knows(cell.reader, __builtin_ctz(left), cell.read_time)) {
          throw Fault(cell.reader == who.block ? "race in global memory: write of what another warp of the block reads"
                                               : "race in global memory: write of what another block reads");
        }
      }
    }
    if (cell.other_time && !(same && cell.other == who.block) && !tolerated(cell.other) &&
        !who.knows(cell.other, cell.other_warp, cell.other_time)) {
      throw Fault("race in global memory: write of what another block reads");
    }
    cell.writer = who.block;
    cell.write_time = who.time();
    cell.writer_warp = who.warp;
    cell.atomic = access == Access::Atomic;
  }
  std::memcpy(reinterpret_cast<void*>(address), from, bytes);
}

Knowledge* GlobalMemory::released(uint64_t address) {
  const auto found = releases_.find(address);
  return found == releases_.end() ? nullptr : &found->second.second;
}

void GlobalMemory::release(uint64_t address, const Accessor& who, bool adds) {
  // in what is kept, every block is a foreign one: the acquirer moves its own back
  Knowledge kept = who.known->told(who.block);
  if (adds) {
    if (const Knowledge* before = released(address)) kept.join_foreign(before->foreign);
  }
  releases_[address] = {who.block, kept};
}

uint8_t* SharedMemory::data(uint32_t address, int bytes) {
  if (static_cast<uint64_t>(address) + bytes > data_.size()) throw Fault("shared access outside the block's memory");
  return &data_[address];
}

void SharedMemory::read(uint32_t warp, uint32_t epoch, uint32_t address, int bytes, void* to) {
  std::memcpy(to, data(address, bytes), bytes);
  for (uint32_t a = address; a < address + bytes; ++a) {
    Shadow& s = shadow_[a];
    if (s.in_flight) throw Fault("read of shared memory that a copy in flight writes");
    if (s.write_epoch == epoch && s.writer != warp)
      throw Fault("race in shared memory: read of what another warp wrote");
    if (s.read_epoch != epoch) s.readers = 0;
    s.read_epoch = epoch;
    s.readers |= 1u << warp;
  }
}

void SharedMemory::check_async_reads(uint32_t address, int bytes) const {
  for (const Range& r : reads_) {
    if (r.overlaps(address, bytes)) throw Fault("write of shared memory that is still being read");
  }
}

void SharedMemory::forget(std::vector<Range>& ranges, uint32_t address, int bytes) {
  const auto gone = [&](const Range& r) { return r.overlaps(address, bytes); };
  ranges.erase(std::remove_if(ranges.begin(), ranges.end(), gone), ranges.end());
}

void SharedMemory::write(uint32_t warp, uint32_t epoch, uint32_t fences, uint32_t address, int bytes,
                         const void* from) {
  uint8_t* to = data(address, bytes);
  check_async_reads(address, bytes);
  for (int k = 0; k < bytes; ++k) {
    Shadow& s = shadow_[address + k];
    const bool same = to[k] == static_cast<const uint8_t*>(from)[k];
    if (s.in_flight) throw Fault("write of shared memory that a copy in flight writes");
    if (!same && s.write_epoch == epoch && s.writer != warp) throw Fault("race in shared memory: two warps write");
    if (!same && s.read_epoch == epoch && (s.readers & ~(1u << warp))) {
      throw Fault("race in shared memory: write of what another warp reads");
    }
    s.write_epoch = epoch;
    s.writer = warp;
    s.atomic = false;
    s.fence = fences + 1;
  }
  std::memcpy(to, from, bytes);
}

void SharedMemory::mark_atomic(uint32_t warp, uint32_t epoch, uint32_t address, int bytes) {
  check_async_reads(address, bytes);
  for (uint32_t a = address; a < address + bytes; ++a) {
    Shadow& s = shadow_[a];
    const bool others_read = s.read_epoch == epoch && (s.readers & ~(1u << warp));
    const bool another_wrote = s.write_epoch == epoch && s.writer != warp && !s.atomic;
    if (s.in_flight || others_read || another_wrote) throw Fault("race in shared memory: atomic and plain accesses");
    s.write_epoch = epoch;
    s.writer = warp;
    s.atomic = true;
  }
}

void SharedMemory::begin_copy(uint32_t address, int bytes) {
  data(address, bytes);
  check_async_reads(address, bytes);
  for (uint32_t a = address; a < address + bytes; ++a) {
    if (shadow_[a].in_flight) throw Fault("two copies in flight into the same shared memory");
    shadow_[a].in_flight = true;
  }
}

void SharedMemory::end_copy(uint32_t warp, uint32_t epoch, uint32_t address, int bytes) {
  for (uint32_t a = address; a < address + bytes; ++a) {
    Shadow& s = shadow_[a];
    if (s.read_epoch == epoch && (s.readers & ~(1u << warp))) {
      throw Fault("race in shared memory: a copy writes what another warp reads");
    }
    s.in_flight = false;
    s.write_epoch = epoch;
    s.writer = warp;
    s.atomic = false;
    s.fence = 0;
  }
}

void SharedMemory::begin_bulk_copy(const Accessor& who, uint32_t address, int bytes) {
  begin_copy(address, bytes);
  for (const Range& r : over_) {
    if (r.overlaps(address, bytes) && !who.knows_drained(block_, r.warp, r.time)) {
      throw Fault("race in shared memory: a bulk copy may come before an asynchronous read is over");
    }
  }
  forget(over_, address, bytes);
}

void SharedMemory::end_bulk_copy(uint32_t since, uint64_t barrier, uint64_t phase, uint32_t address, int bytes) {
  forget(landed_, address, bytes);
  landed_.push_back({barrier, address, address + bytes, 0, 0, phase});
  for (uint32_t a = address; a < address + bytes; ++a) {
    Shadow& s = shadow_[a];
    if (s.read_epoch >= since && s.readers) throw Fault("race in shared memory: a bulk copy writes what a warp reads");
    s = {};
  }
}

void SharedMemory::begin_async_read(const Accessor& who, uint64_t id, const std::vector<uint32_t>& fences,
                                    uint32_t fence_epoch, uint32_t address, int bytes) {
  data(address, bytes);
  for (const Range& r : landed_) {
    if (!r.overlaps(address, bytes)) continue;
    const auto ended = who.known->ended.find(r.id);
    if (ended == who.known->ended.end() || ended->second <= r.phase) {
      throw Fault("race in shared memory: asynchronous read of a bulk copy that was not waited for");
    }
  }
  for (uint32_t a = address; a < address + bytes; ++a) {
    const Shadow& s = shadow_[a];
    if (s.in_flight) throw Fault("asynchronous read of shared memory that a copy in flight writes");
    if (s.write_epoch >= fence_epoch && fences[s.writer] < s.fence) {
      throw Fault("asynchronous read of shared memory without a fence after the write");
    }
  }
  reads_.push_back({id, address, address + bytes});
}

void SharedMemory::end_async_read(const Accessor& who, uint64_t id) {
  for (const Range& r : reads_) {
    if (r.id != id) continue;
    const auto again = [&](const Range& o) { return o.warp == who.warp && o.begin == r.begin && o.end == r.end; };
    const auto found = std::find_if(over_.begin(), over_.end(), again);
    const Range over{0, r.begin, r.end, who.warp, who.time()};
    if (found == over_.end())
      over_.push_back(over);
    else
      *found = over;
  }
  reads_.erase(std::remove_if(reads_.begin(), reads_.end(), [&](const Range& r) { return r.id == id; }), reads_.end());
}

}  // namespace ptx
