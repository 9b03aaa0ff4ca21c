// mbarriers, and how blocks of a cluster arrive at each other's.
//
// An mbarrier orders what was read asynchronously before an arrival and is copied over behind the wait, in any block of
// the cluster, as kernels rely on; other accesses of another block it does not order, for that takes the scope .cluster
// with its fences of the whole memory, which is not known here.
#include "machine.h"

namespace ptx {

// An address in another block of the cluster has that block's rank and 1 above these bits.
constexpr int RANK_SHIFT = 24;

Block& block_of(const Step& s, uint32_t rank) {
  if (rank >= s.block.cluster->blocks.size()) throw Fault("a rank that the cluster does not have");
  Block* block = s.block.cluster->blocks[rank];
  if (!block) throw Fault("touches the memory of a block that has ended");
  return *block;
}

namespace {

MessageBarrier& live_barrier(Block& block, uint32_t address) {
  check_alignment(address, 8);
  block.shared.data(address, 8);
  const auto found = block.message_barriers.find(address);
  if (found == block.message_barriers.end()) throw Fault("an mbarrier that is not initialised");
  return found->second;
}

MessageBarrier& live_barrier(const Step& s, int operand, int lane) {
  return live_barrier(s.block, address_of(s, operand, 0, lane));
}

}  // namespace

void check_published(const Step& s, Block& block, uint32_t address) {
  const MessageBarrier& barrier = live_barrier(block, address);
  if (block.id == s.block.id) return;
  if (!barrier.published) throw Fault("an mbarrier that was not published to the cluster");
  if (!s.accessor().knows(block.id, barrier.warp, barrier.time)) {
    throw Fault("race: an mbarrier of another block may not be initialised yet");
  }
}

namespace {

void initialise(Step& s) {
  s.each([&](int lane) {
    const uint32_t address = address_of(s, 0, 0, lane);
    check_alignment(address, 8);
    s.block.shared.data(address, 8);
    const int count = s.slot(1)[lane];
    MessageBarrier barrier{count, count, s.warp.id, s.accessor().time()};
    if (!s.block.message_barriers.insert({address, barrier}).second) throw Fault("an mbarrier is initialised twice");
  });
}

void publish(Step& s) {
  for (auto& [address, barrier] : s.block.message_barriers) barrier.published |= barrier.warp == s.warp.id;
}

void invalidate(Step& s) {
  s.each([&](int lane) {
    if (live_barrier(s, 0, lane).bytes) throw Fault("an mbarrier is invalidated with copies in flight");
    s.block.message_barriers.erase(address_of(s, 0, 0, lane));
  });
}

void arrive(Step& s, Block& block, MessageBarrier& barrier) {
  if (barrier.pending == 0) throw Fault("more arrivals at an mbarrier than it expects");
  barrier.gathered.join(s.warp.known.told(s.block.id));
  if (block.id != s.block.id) {
    auto& times = block.visits[s.block.id];
    times.resize(s.block.warps.size());
    times[s.warp.id] = s.accessor().time();
  }
  ++s.warp.known.own[s.warp.id];
  --barrier.pending;
  barrier.complete_if_done();
}

void arrive_expecting(Step& s) {
  s.each([&](int lane) {
    MessageBarrier& barrier = live_barrier(s, 1, lane);
    barrier.bytes += s.slot(2)[lane];
    arrive(s, s.block, barrier);
  });
  s.machine.quiet = 0;
}

void arrive_in_cluster(Step& s) {
  s.each([&](int lane) {
    const uint32_t address = address_of(s, 1, 0, lane), rank = address >> RANK_SHIFT;
    Block& block = rank ? block_of(s, rank - 1) : s.block;
    const uint32_t local = address & ((1u << RANK_SHIFT) - 1);
    check_published(s, block, local);
    arrive(s, block, live_barrier(block, local));
  });
  s.machine.quiet = 0;
}

void map_to_rank(Step& s) {
  s.each([&](int lane) {
    const uint64_t local = s.slot(1)[lane], rank = s.slot(2)[lane];
    if (local >> RANK_SHIFT) throw Fault("a shared address that is not the block's own is not known");
    block_of(s, rank);
    s.slot(0)[lane] = local | (rank + 1) << RANK_SHIFT;
  });
}

void learn(Step& s, const MessageBarrier& barrier, uint64_t key) {
  Knowledge& known = s.warp.known;
  const uint32_t now = known.own[s.warp.id];
  Knowledge part{{}, {}, barrier.known.drained, barrier.known.ended};
  for (const auto& [block, times] : barrier.known.foreign) {
    if (block == s.block.id)
      part.own = times;
    else
      part.drained[block] = times;
  }
  known.join(part);
  known.own[s.warp.id] = now;
  known.ended[key] = barrier.phases;
}

void test_wait(Step& s) {
  bool waits = false;
  const MessageBarrier* learned = nullptr;
  s.each([&](int lane) {
    const MessageBarrier& barrier = live_barrier(s, 1, lane);
    const bool done = (barrier.phases & 1) != (s.slot(2)[lane] & 1);
    s.slot(0)[lane] = done;
    waits |= !done;
    if (done && learned != &barrier) learn(s, barrier, s.block.key(address_of(s, 1, 0, lane)));
    if (done) learned = &barrier;
  });
  if (!waits) return;
  s.yields = true;
  auto& copies = s.block.bulk_copies;  // somebody waits for one of them: carry out any
  if (copies.empty()) return;
  std::swap(copies[s.machine.random() % copies.size()], copies.back());
  const auto perform = std::move(copies.back());
  copies.pop_back();
  perform();
}

template <Handler H>
Handler untyped(const Instruction& i) {
  if (!i.types.empty() && !(i.types[0] == Type{Kind::Bits, 8})) unknown(i);
  return H;
}

Handler maps(const Instruction& i) {
  if (!(i.type() == Type{Kind::Unsigned, 4})) unknown(i);
  return map_to_rank;
}

}  // namespace

const Decoders& messages() {
  static const Decoders table = {
      {"mbarrier.init.shared::cta", {0, untyped<initialise>}},
      {"mbarrier.inval.shared::cta", {0, untyped<invalidate>}},
      {"mbarrier.arrive.expect_tx.shared", {1, untyped<arrive_expecting>}},
      {"mbarrier.arrive.expect_tx.shared::cta", {1, untyped<arrive_expecting>}},
      {"mbarrier.arrive.shared::cluster", {1, untyped<arrive_in_cluster>}},
      {"mbarrier.try_wait.parity.shared", {1, untyped<test_wait>}},
      {"mbarrier.try_wait.parity.shared::cta", {1, untyped<test_wait>}},
      {"fence.mbarrier_init.release.cluster", {0, untyped<publish>}},
      {"mapa.shared::cluster", {1, maps}},
  };
  return table;
}

}  // namespace ptx
