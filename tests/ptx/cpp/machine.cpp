#include "machine.h"

#include <algorithm>
#include <numeric>

namespace ptx {

constexpr uint64_t HUNG = 5'000'000;  // steps in which all warps together only compute and read

void unknown(const Instruction& i) { throw Fault("unknown instruction: " + i.text); }

void decode(Instruction& i) {
  for (const Decoders* decoders : {&arithmetic(), &control(), &transfers(), &messages(), &matrices()}) {
    const auto found = decoders->find(i.name);
    if (found == decoders->end()) continue;
    i.execute = found->second.choose(i);
    i.convergent = found->second.convergent;
    i.outputs = 0;
    for (int k = 0; k < found->second.outputs; ++k) i.outputs += i.count(k);
    return;
  }
  unknown(i);
}

void GroupQueue::wait(size_t pending) {
  while (groups.size() > pending) {
    for (auto& operation : groups.front()) {
      if (!operation.performed) operation.perform();
      operation.finish();
    }
    groups.pop_front();
  }
}

bool GroupQueue::all_performed() const {
  const auto done = [](const auto& group) {
    return std::all_of(group.begin(), group.end(), [](const auto& operation) { return operation.performed; });
  };
  return done(open) && std::all_of(groups.begin(), groups.end(), done);
}

void GroupQueue::perform_some(std::mt19937_64& random) {
  for (auto& group : groups) {
    for (auto& operation : group) {
      if (operation.performed) continue;
      if (random() % 4 == 0) return;
      operation.perform();
      operation.performed = true;
    }
  }
}

Machine::Machine(const Kernel& kernel, const uint8_t* parameters, const int (&grid)[3], int threads, int shared_bytes,
                 Options options)
    : kernel(kernel),
      parameters(parameters, parameters + kernel.parameter_bytes),
      random(options.seed),
      grid_{grid[0], grid[1], grid[2]},
      threads_(threads),
      shared_bytes_(shared_bytes + kernel.shared_bytes),
      options_(options),
      order_(static_cast<size_t>(grid[0]) * grid[1] * grid[2] / options.cluster) {
  if (grid[0] % options.cluster) throw Fault("a grid that is no multiple of its clusters");
  if (threads % LANES) throw Fault("a block of " + std::to_string(threads) + " threads has a partial warp");
  timing = static_cast<Timing>(random() % 3);
  resident_ = 1 + random() % options.most_blocks;
  std::iota(order_.begin(), order_.end(), 0);  // no order of blocks is promised
  if (random() % 2) std::shuffle(order_.begin(), order_.end(), random);
  initial_registers_.assign(static_cast<size_t>(kernel.num_slots) * LANES, 0xdeadbeefdeadbeef);
  for (const auto& [value, slot] : kernel.constants) std::fill_n(&initial_registers_[slot * LANES], LANES, value);
}

void Machine::start_cluster() {
  const auto cluster = std::make_shared<Cluster>();
  const uint32_t first = order_[next_block_++] * options_.cluster;
  for (int rank = 0; rank < options_.cluster; ++rank) {
    auto block = new_block(first + rank);
    cluster->blocks.push_back(block.get());
    block->cluster = cluster;
    blocks_.push_back(std::move(block));
  }
}

std::unique_ptr<Block> Machine::new_block(uint32_t id) {
  auto block = std::make_unique<Block>(id, shared_bytes_);
  block->rank = id % options_.cluster;
  block->x = id % grid_[0];
  block->y = id / grid_[0] % grid_[1];
  block->z = id / grid_[0] / grid_[1];
  block->warps.resize(threads_ / LANES);
  for (uint32_t w = 0; w < block->warps.size(); ++w) {
    Warp& warp = block->warps[w];
    warp.id = w;
    warp.registers = initial_registers_;
    warp.known.own.assign(block->warps.size(), 0);
    warp.known.own[w] = 1;
    warp.written_later.assign(kernel.num_slots, 0);
    for (const auto& [special, slot] : kernel.specials) {
      const int values[] = {0,        threads_, block->x, block->y, block->z, grid_[0],         grid_[1],
                            grid_[2], 0,        int(w),   0,        1,        int(block->rank), options_.cluster};
      for (int lane = 0; lane < LANES; ++lane) {
        uint64_t value = values[static_cast<int>(special)];
        if (special == Special::Thread) value = w * LANES + lane;
        if (special == Special::Lane) value = lane;
        warp.registers[slot * LANES + lane] = value;
      }
    }
  }
  return block;
}

void Machine::run() {
  while (next_block_ < order_.size() || !blocks_.empty()) {
    const auto fits = [&] { return blocks_.empty() || blocks_.size() + options_.cluster <= resident_; };
    while (fits() && next_block_ < order_.size()) start_cluster();
    const size_t place = random() % blocks_.size();
    Block& block = *blocks_[place];
    if (timing == Timing::Mixed) {
      if (!block.bulk_copies.empty() && random() % 4 == 0) {
        std::swap(block.bulk_copies[random() % block.bulk_copies.size()], block.bulk_copies.back());
        const auto copy = std::move(block.bulk_copies.back());
        block.bulk_copies.pop_back();
        copy();
      }
      for (auto& warp : block.warps) {
        for (GroupQueue* queue : {&warp.copies, &warp.products, &warp.stores}) {
          if (!queue->groups.empty() && random() % 8 == 0) queue->perform_some(random);
        }
      }
    }
    uint32_t ready[LANES], num_ready = 0;
    bool living = false;
    for (const auto& warp : block.warps) {
      living |= warp.alive != 0;
      if (warp.alive & ~warp.blocked) ready[num_ready++] = warp.id;
    }
    if (!living) {
      retire(place);
      continue;
    }
    if (num_ready == 0) {
      const auto can_go_on = [](const Block* other) {
        return other && std::any_of(other->warps.begin(), other->warps.end(),
                                    [](const Warp& warp) { return (warp.alive & ~warp.blocked) != 0; });
      };
      const auto& others = block.cluster->blocks;
      if (std::any_of(others.begin(), others.end(), can_go_on)) continue;
      throw Fault("deadlock: threads wait at a barrier that the others of their block do not reach");
    }
    Warp& warp = block.warps[ready[random() % num_ready]];
    for (int burst = 1 + random() % 40; burst > 0 && (warp.alive & ~warp.blocked) && step(block, warp); --burst) {
    }
  }
}

void Machine::retire(size_t place) {
  Block& block = *blocks_[place];
  if (!block.bulk_copies.empty()) throw Fault("a block ends before a copy into its memory does");
  Knowledge known;
  for (auto& warp : block.warps) {
    if (!warp.products.groups.empty()) throw Fault("a warp ends before its products do");
    if (!warp.stores.groups.empty()) throw Fault("a warp ends before its stores have read their boxes");
    known.join(warp.known);
  }
  for (const auto& [other, times] : block.visits) {
    for (uint32_t w = 0; w < times.size(); ++w) {
      if (!Accessor{block.id, 0, &known}.knows_drained(other, w, times[w])) {
        throw Fault("race: a block ends while another one may arrive at its barriers");
      }
    }
  }
  check_registers(block);
  block.cluster->blocks[block.rank] = nullptr;
  blocks_.erase(blocks_.begin() + place);
  quiet = 0;
}

// What warps ask for comes from what the launch gave to the block, as many as it could.
void Machine::check_registers(const Block& block) const {
  const int given = 65536 / threads_ / 8 * 8;
  int asked = 0;
  for (const auto& warp : block.warps) {
    const Warp& leader = block.warps[warp.id / 4 * 4];
    if (warp.most_registers != leader.most_registers) {
      throw Fault("warps of a group of four ask for different numbers of registers");
    }
    asked += LANES * (warp.most_registers ? warp.most_registers : given);
  }
  if (asked > given * threads_) throw Fault("deadlock: warps wait for registers that nobody gives up");
}

uint32_t Machine::chosen_lanes(Warp& warp, int& counter) {
  if (warp.uniform) {
    counter = warp.common;
    return warp.alive;
  }
  uint32_t left = warp.alive & ~warp.blocked;
  const bool any_order = random() % 16 == 0;
  while (left) {
    int first = -1;
    for (uint32_t rest = left; rest; rest &= rest - 1) {
      const int at = warp.counters[__builtin_ctz(rest)];
      if (first < 0 || (any_order ? random() % 4 == 0 : at < first)) first = at;
    }
    uint32_t lanes = 0;
    for (uint32_t rest = left; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      if (warp.counters[lane] == first) lanes |= 1u << lane;
    }
    if (lanes == warp.alive) {
      warp.uniform = true;
      warp.common = first;
    } else if (kernel.code[first].convergent) {
      left &= ~lanes;  // until the others come
      continue;
    }
    counter = first;
    return lanes;
  }
  throw Fault("deadlock: lanes of a warp wait for each other at different instructions");
}

bool Machine::step(Block& block, Warp& warp) {
  int counter;
  const uint32_t at = chosen_lanes(warp, counter);
  const Instruction& i = kernel.code[counter];
  ++steps;
  if (options_.most_steps && steps > options_.most_steps) throw Fault("more steps than were allowed");
  if (++quiet > HUNG) throw Fault("hang: all warps compute and read, none writes, arrives or ends");
  uint32_t lanes = at;
  if (i.guard >= 0) {
    const uint64_t* guard = &warp.registers[static_cast<size_t>(i.guard) * LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      if ((guard[lane] & 1) == i.guard_inverted) lanes &= ~(1u << lane);
    }
  }
  const auto place = [&](uint32_t which, int to) {
    if (warp.uniform && which == warp.alive) {
      warp.common = to;
      return;
    }
    if (warp.uniform) std::fill_n(warp.counters, LANES, warp.common);
    warp.uniform = false;
    for (uint32_t left = which; left; left &= left - 1) warp.counters[__builtin_ctz(left)] = to;
  };
  place(at, counter + 1);
  if (!lanes) return true;
  try {
    if (i.target >= 0) {
      place(lanes, i.target);
      return i.target > counter;  // a warp in a loop lets others on
    }
    if (i.convergent && lanes != ALL_LANES) throw Fault("not all lanes of a warp execute it");
    if (!warp.products.groups.empty() && i.shapes.empty()) {
      for (const int slot : i.slots) {
        if (warp.written_later[slot]) throw Fault("touches an accumulator before its product is waited for");
      }
    }
    if ((warp.arrived & lanes) && i.name != "barrier.cluster.wait.acquire") {
      throw Fault("work between a cluster barrier's arrival and its wait is not known");
    }
    Step s{*this, block, warp, i, lanes};
    i.execute(s);
    return !s.yields;
  } catch (const Fault& fault) {
    throw Fault(std::string(fault.what()) + "; " + kernel.name + ", block " + std::to_string(block.id) + ", warp " +
                std::to_string(warp.id) + ", source line " + std::to_string(i.line) + ": " + i.text);
  }
}

void Machine::issue(GroupQueue& queue, Asynchronous operation) {
  if (queue.all_performed() && (timing == Timing::Eager || (timing == Timing::Mixed && random() % 2))) {
    operation.perform();
    operation.performed = true;
  }
  queue.open.push_back(std::move(operation));
}

void Machine::arrive(Step& s) {
  if (s.block.barrier && s.block.barrier->name != s.i.name) throw Fault("threads meet at different barriers");
  s.block.barrier = &s.i;
  if (s.warp.uniform) {
    std::fill_n(s.warp.counters, LANES, s.warp.common);
    s.warp.uniform = false;
  }
  s.warp.blocked |= s.lanes;
  s.yields = true;
  release_barrier(s.block);
}

void Machine::await_cluster(Step& s) {
  if (s.lanes & ~s.warp.arrived) throw Fault("waits at the cluster's barrier without having arrived");
  if (s.warp.uniform) {
    std::fill_n(s.warp.counters, LANES, s.warp.common);
    s.warp.uniform = false;
  }
  s.warp.blocked |= s.lanes;
  s.warp.awaiting |= s.lanes;
  s.yields = true;
  release_cluster(*s.block.cluster);
}

void Machine::exit(Block& block, Warp& warp, uint32_t lanes) {
  if (warp.uniform) std::fill_n(warp.counters, LANES, warp.common);
  warp.uniform = false;
  warp.alive &= ~lanes;
  quiet = 0;
  release_barrier(block);
  release_cluster(*block.cluster);
}

void Machine::release_cluster(const Cluster& cluster) {
  bool waiting = false;
  Knowledge all;
  for (const Block* block : cluster.blocks) {
    if (!block) continue;
    for (const auto& warp : block->warps) {
      if (warp.alive & ~warp.awaiting) return;
      waiting |= warp.awaiting != 0;
      all.join(warp.known.told(block->id));
    }
  }
  if (!waiting) return;
  for (Block* block : cluster.blocks) {
    if (!block) continue;
    Knowledge known = all;
    known.own = all.foreign[block->id];
    known.foreign.erase(block->id);
    const uint32_t now = *std::max_element(known.own.begin(), known.own.end()) + 1;
    for (auto& warp : block->warps) {
      warp.known = known;
      warp.known.own[warp.id] = now;
      warp.blocked = warp.awaiting = warp.arrived = 0;
    }
    ++block->epoch;
  }
  quiet = 0;
}

void Machine::release_barrier(Block& block) {
  bool waiting = false;
  for (const auto& warp : block.warps) {
    if ((warp.alive & ~warp.blocked) || warp.awaiting) return;
    waiting |= warp.blocked != 0;
  }
  if (!waiting) return;
  Knowledge all;
  for (const auto& warp : block.warps) all.join(warp.known);
  const uint32_t now = *std::max_element(all.own.begin(), all.own.end()) + 1;
  for (auto& warp : block.warps) {
    if (block.barrier->outputs) {  // the reduced predicate
      std::fill_n(&warp.registers[static_cast<size_t>(block.barrier->slots[0]) * LANES], LANES, block.any);
    }
    warp.known = all;
    warp.known.own[warp.id] = now;
    warp.blocked = 0;
  }
  block.any = false;
  block.barrier = nullptr;
  ++block.epoch;
  quiet = 0;
}

void Machine::acquire(Block& block, Warp& warp, uint64_t address) {
  const Knowledge* released = global.released(address);
  if (!released) return;
  for (const auto& [other, times] : released->foreign) {
    Knowledge part;
    if (other == block.id)
      part.own = times;
    else
      part.foreign[other] = times;
    const uint32_t now = warp.known.own[warp.id];
    warp.known.join(part);
    warp.known.own[warp.id] = now;
  }
}

void Machine::release(Block& block, Warp& warp, uint64_t address, bool adds) {
  global.release(address, {block.id, warp.id, &warp.known}, adds);
  ++warp.known.own[warp.id];
}

// Branches, barriers and what else steers a warp.

namespace {

void barrier(Step& s) {
  if (s.uniform(0) != 0) throw Fault("a named barrier is not known");
  s.machine.arrive(s);
}

void barrier_any(Step& s) {
  if (s.uniform(1) != 0) throw Fault("a named barrier is not known");
  const uint64_t* predicate = s.slot(2);
  s.each([&](int lane) { s.block.any |= predicate[lane] & 1; });
  s.machine.arrive(s);
}

void leave(Step& s) {
  s.machine.exit(s.block, s.warp, s.lanes);
  s.yields = true;
}

template <char KIND>
void shuffle(Step& s) {
  uint64_t* out = s.nth(0);
  const bool flagged = s.i.count(0) == 2;
  uint64_t from[LANES];
  std::copy_n(s.slot(1), LANES, from);
  if (s.uniform(4) << 32 >> 32 != ALL_LANES) throw Fault("a shuffle of some lanes is not known");
  for (int lane = 0; lane < LANES; ++lane) {
    const int b = s.slot(2)[lane] & 31, clamp = s.slot(3)[lane] & 31, segment = s.slot(3)[lane] >> 8 & 31;
    const int most = (lane & segment) | (clamp & ~segment);
    int source = lane;
    if (KIND == 'u') source = lane - b;
    if (KIND == 'd') source = lane + b;
    if (KIND == 'x') source = lane ^ b;
    if (KIND == 'i') source = (lane & segment) | (b & ~segment);
    const bool inside = KIND == 'u' ? source >= most : source <= most;
    out[lane] = from[inside ? source : lane] & 0xffffffff;
    if (flagged) s.nth(1)[lane] = inside;
  }
}

template <char KIND>
void reduce(Step& s) {
  if (s.uniform(2) << 32 >> 32 != ALL_LANES) throw Fault("a reduction over some lanes is not known");
  int64_t result = value_of<int32_t>(s.slot(1)[0]);
  for (int lane = 1; lane < LANES; ++lane) {
    const int64_t x = value_of<int32_t>(s.slot(1)[lane]);
    result = KIND == '+' ? result + x : KIND == '>' ? std::max(result, x) : std::min(result, x);
  }
  std::fill_n(s.slot(0), LANES, static_cast<uint32_t>(result));
}

void ballot(Step& s) {
  if (s.uniform(2) << 32 >> 32 != ALL_LANES) throw Fault("a ballot of some lanes is not known");
  uint64_t word = 0;
  for (int lane = 0; lane < LANES; ++lane) word |= (s.slot(1)[lane] & 1) << lane;
  std::fill_n(s.slot(0), LANES, word);
}

void elect(Step& s) {
  if (s.uniform(1) << 32 >> 32 != ALL_LANES) throw Fault("an election among some lanes is not known");
  for (int lane = 0; lane < LANES; ++lane) {
    s.nth(0)[lane] = 0;
    s.nth(1)[lane] = lane == 0;
  }
}

void arrive_in_cluster(Step& s) {
  if (s.warp.arrived & s.lanes) throw Fault("arrives at the cluster's barrier a second time");
  s.warp.arrived |= s.lanes;
}

void await_cluster(Step& s) { s.machine.await_cluster(s); }

void ask_for_registers(Step& s) {
  const int count = s.uniform(0);
  if (count < 24 || count > 256 || count % 8) throw Fault("a number of registers that is not known");
  s.warp.most_registers = count;
}

void warp_barrier(Step& s) {
  if (s.uniform(0) << 32 >> 32 != ALL_LANES) throw Fault("a barrier of some lanes is not known");
}

void sleep(Step& s) { s.yields = true; }

void nothing(Step&) {}

template <Handler H>
Handler always(const Instruction&) {
  return H;
}

template <Handler H>
Handler signed_words(const Instruction& i) {
  if (!(i.type() == Type{Kind::Signed, 4})) unknown(i);
  return H;
}

}  // namespace

const Decoders& control() {
  static const Decoders table = {
      {"bra", {0, always<nothing>}},
      {"bra.uni", {0, always<nothing>}},
      {"ret", {0, always<leave>}},
      {"exit", {0, always<leave>}},
      {"bar.sync", {0, always<barrier>}},
      {"bar.red.or", {1, always<barrier_any>}},
      {"bar.warp.sync", {0, always<warp_barrier>, true}},
      {"barrier.cluster.arrive.release", {0, always<arrive_in_cluster>}},
      {"barrier.cluster.wait.acquire", {0, always<await_cluster>}},
      {"setmaxnreg.inc.sync.aligned", {0, always<ask_for_registers>, true}},
      {"setmaxnreg.dec.sync.aligned", {0, always<ask_for_registers>, true}},
      {"nanosleep", {0, always<sleep>}},
      {"shfl.sync.up", {1, always<shuffle<'u'>>, true}},
      {"shfl.sync.down", {1, always<shuffle<'d'>>, true}},
      {"shfl.sync.bfly", {1, always<shuffle<'x'>>, true}},
      {"shfl.sync.idx", {1, always<shuffle<'i'>>, true}},
      {"redux.sync.add", {1, signed_words<reduce<'+'>>, true}},
      {"redux.sync.max", {1, signed_words<reduce<'>'>>, true}},
      {"redux.sync.min", {1, signed_words<reduce<'<'>>, true}},
      {"vote.sync.ballot", {1, always<ballot>, true}},
      {"elect.sync", {1, always<elect>, true}},
  };
  return table;
}

}  // namespace ptx
