// Loads, stores, atomics and asynchronous copies.
#include <algorithm>
#include <memory>

#include "machine.h"

namespace ptx {

uint64_t address_of(const Step& s, int operand, int nth, int lane) { return s.slot(operand)[lane] + s.i.offsets[nth]; }

void check_alignment(uint64_t address, int bytes) {
  if (address % bytes) throw Fault("misaligned access of " + std::to_string(bytes) + " bytes");
}

namespace {

uint64_t extended(uint64_t bits, Type t) {
  if (t.kind != Kind::Signed || t.bytes == 8) return bits;
  const int unused = 64 - 8 * t.bytes;
  return static_cast<uint64_t>(static_cast<int64_t>(bits << unused) >> unused);
}

void load_parameter(Step& s) {
  const Type t = s.i.type();
  const uint64_t at = address_of(s, 1, 0, __builtin_ctz(s.lanes)) - PARAMETERS;
  if (at + t.bytes * s.i.width > s.machine.parameters.size()) throw Fault("read outside the parameters");
  for (int k = 0; k < s.i.width; ++k) {
    uint64_t bits = 0;
    std::memcpy(&bits, &s.machine.parameters[at + k * t.bytes], t.bytes);
    s.each([&](int lane) { s.nth(k)[lane] = extended(bits, t); });
  }
}

enum class Order { Plain, Acquire, Release, Both, Relaxed };

template <Order O>
void load_global(Step& s) {
  const Type t = s.i.type();
  const int bytes = t.bytes * s.i.width;
  s.each([&](int lane) {
    const uint64_t address = address_of(s, 1, 0, lane);
    uint8_t data[32];
    check_alignment(address, bytes);
    s.machine.global.read(s.accessor(), address, bytes, data, O == Order::Plain ? Access::Plain : Access::Atomic);
    if (O == Order::Acquire) s.machine.acquire(s.block, s.warp, address);
    for (int k = 0; k < s.i.width; ++k) {
      uint64_t bits = 0;
      std::memcpy(&bits, data + k * t.bytes, t.bytes);
      s.nth(k)[lane] = extended(bits, t);
    }
  });
}

template <Order O>
void store_global(Step& s) {
  const int each = s.i.type().bytes, bytes = each * s.i.width;
  s.each([&](int lane) {
    const uint64_t address = address_of(s, 0, 0, lane);
    uint8_t data[32];
    for (int k = 0; k < s.i.width; ++k) std::memcpy(data + k * each, &s.nth(1 + k)[lane], each);
    check_alignment(address, bytes);
    s.machine.global.write(s.accessor(), address, bytes, data, O == Order::Plain ? Access::Plain : Access::Atomic);
    if (O == Order::Release) s.machine.release(s.block, s.warp, address, false);
  });
  s.machine.quiet = 0;
}

void load_shared(Step& s) {
  const Type t = s.i.type();
  const int bytes = t.bytes * s.i.width;
  s.each([&](int lane) {
    const uint32_t address = address_of(s, 1, 0, lane);
    uint8_t data[32];
    check_alignment(address, bytes);
    s.block.shared.read(s.warp.id, s.block.epoch, address, bytes, data);
    for (int k = 0; k < s.i.width; ++k) {
      uint64_t bits = 0;
      std::memcpy(&bits, data + k * t.bytes, t.bytes);
      s.nth(k)[lane] = extended(bits, t);
    }
  });
}

void store_shared(Step& s) {
  const int each = s.i.type().bytes, bytes = each * s.i.width;
  s.each([&](int lane) {
    const uint32_t address = address_of(s, 0, 0, lane);
    uint8_t data[32];
    for (int k = 0; k < s.i.width; ++k) std::memcpy(data + k * each, &s.nth(1 + k)[lane], each);
    check_alignment(address, bytes);
    s.block.shared.write(s.warp.id, s.block.epoch, s.warp.fences, address, bytes, data);
  });
  s.machine.quiet = 0;
}

template <char KIND>
uint64_t combined(uint64_t old, uint64_t x, Type t) {
  if (KIND == '+') return old + x;
  if (t.kind == Kind::Signed)
    return std::max(static_cast<int64_t>(extended(old, t)), static_cast<int64_t>(extended(x, t)));
  return std::max(old, x);
}

template <char KIND, Order O>
void atomic_global(Step& s) {
  const Type t = s.i.type();
  s.each([&](int lane) {
    const uint64_t address = address_of(s, 1, 0, lane);
    uint64_t old = 0;
    check_alignment(address, t.bytes);
    s.machine.global.read(s.accessor(), address, t.bytes, &old, Access::Atomic);
    if (O == Order::Acquire || O == Order::Both) s.machine.acquire(s.block, s.warp, address);
    const uint64_t now = combined<KIND>(old, s.slot(2)[lane], t);
    s.machine.global.write(s.accessor(), address, t.bytes, &now, Access::Atomic);
    if (O == Order::Release || O == Order::Both) s.machine.release(s.block, s.warp, address, true);
    s.slot(0)[lane] = extended(old, t);
  });
  s.yields = true;
  s.machine.quiet = 0;
}

// Ordered by barriers as other accesses are, but no race among themselves: they only meet atomics here.
template <char KIND>
void atomic_shared(Step& s) {
  const Type t = s.i.type();
  s.each([&](int lane) {
    const uint32_t address = address_of(s, 1, 0, lane);
    uint64_t old = 0;
    check_alignment(address, t.bytes);
    s.block.shared.exchange(s.warp.id, s.block.epoch, address, t.bytes, [&](uint8_t* data) {
      std::memcpy(&old, data, t.bytes);
      const uint64_t now = combined<KIND>(old, s.slot(2)[lane], t);
      std::memcpy(data, &now, t.bytes);
    });
    s.slot(0)[lane] = extended(old, t);
  });
  s.yields = true;
  s.machine.quiet = 0;
}

template <Handler H>
Handler one(const Instruction& i) {
  if (i.types.size() != 1 || i.width * i.type().bytes > 16) unknown(i);
  return H;
}
template <Handler H>
Handler whole(const Instruction& i) {
  const Type t = i.type();
  if (i.types.size() != 1 || t.bytes < 4 || t.kind == Kind::Float) unknown(i);
  return H;
}

// cp.async [shared], [global], bytes, bytes that are read: the rest is 0

void copy(Step& s) {
  s.each([&](int lane) {
    const uint32_t to = address_of(s, 0, 0, lane);
    const uint64_t from = address_of(s, 1, 1, lane);
    const int bytes = s.slot(2)[lane], read = s.i.operands.size() > 3 ? s.slot(3)[lane] : bytes;
    if (bytes != 4 && bytes != 8 && bytes != 16) throw Fault("a copy of a size that is not known");
    check_alignment(to, bytes);
    if (read) check_alignment(from, bytes);
    s.block.shared.begin_copy(to, bytes);
    Machine& machine = s.machine;
    Block& block = s.block;
    Warp& warp = s.warp;
    Asynchronous operation;
    operation.perform = [=, &machine, &block, &warp] {
      uint8_t data[16] = {};
      if (read) machine.global.read({block.id, warp.id, &warp.known}, from, read, data);
      std::memcpy(block.shared.data(to, bytes), data, bytes);
    };
    operation.finish = [=, &block, &warp] { block.shared.end_copy(warp.id, block.epoch, to, bytes); };
    machine.issue(warp.copies, std::move(operation));
  });
  s.machine.quiet = 0;
}

void commit_copies(Step& s) { s.warp.copies.commit(); }
void wait_copies(Step& s) { s.warp.copies.wait(s.uniform(0)); }

// Copies of boxes of matrices by the copy engine

TensorMap tensor_map(const Step& s, int operand, int nth, int lane) {
  const uint64_t at = address_of(s, operand, nth, lane) - PARAMETERS;
  if (at + sizeof(TensorMap) > s.machine.parameters.size()) throw Fault("a tensor map that is no parameter");
  TensorMap map;
  std::memcpy(&map, &s.machine.parameters[at], sizeof map);
  return map;
}

void fetch_map(Step& s) {
  s.each([&](int lane) { tensor_map(s, 0, 0, lane); });
}

uint32_t swizzled(uint32_t address, int swizzle) { return address ^ ((address >> 7 & ((1 << swizzle) - 1)) << 4); }

// Calls f(shared address, global address, whether the matrix has it) for every element of the box.
template <typename F>
void each_element(const TensorMap& map, int column, int row, uint32_t shared, F f) {
  const int row_bytes = map.box_columns * map.element_bytes;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int byte = 0; byte < row_bytes; byte += map.element_bytes) {
      const int64_t r_global = row + r, c_global = column + byte / map.element_bytes;
      const bool inside = r_global >= 0 && r_global < map.rows && c_global >= 0 && c_global < map.columns;
      const uint64_t address = map.base + r_global * map.stride_bytes + c_global * map.element_bytes;
      f(swizzled(shared + r * row_bytes + byte, map.swizzle), address, inside);
    }
  }
}

void check_box(const TensorMap& map, uint32_t shared) {
  const int row_bytes = map.box_columns * map.element_bytes;
  if (shared % 128) throw Fault("a box at a shared address that is no multiple of 128");
  if (map.base % 16 || map.stride_bytes % 16) throw Fault("a matrix whose rows are not aligned to 16 bytes");
  if (map.box_rows > 256 || map.box_columns > 256) throw Fault("a box of more than 256 rows or columns");
  if (map.swizzle && row_bytes > 16 << map.swizzle) throw Fault("rows of a box are longer than their swizzle");
}

// To blocks of the cluster by their ranks, at the same address in each; an mbarrier there, likewise, is told of it.
void load_box_to(Step& s, int lane, uint32_t ranks) {
  const TensorMap map = tensor_map(s, 1, 1, lane);
  const uint32_t to = address_of(s, 0, 0, lane), barrier = address_of(s, 2, 2, lane);
  const int first = s.i.operands[1];
  const int column = static_cast<int32_t>(s.nth(first + 1)[lane]), row = static_cast<int32_t>(s.nth(first + 2)[lane]);
  const int bytes = map.box_columns * map.box_rows * map.element_bytes;
  check_box(map, to);
  const auto known = std::make_shared<Knowledge>(s.warp.known);
  const Accessor who{s.block.id, s.warp.id, known.get()};
  for (; ranks; ranks &= ranks - 1) {
    Block& block = block_of(s, __builtin_ctz(ranks));
    check_published(s, block, barrier);
    block.shared.begin_bulk_copy(who, to, bytes);
    Machine& machine = s.machine;
    const uint32_t since = block.epoch;
    const auto perform = [=, &machine, &block] {
      (void)known;
      each_element(map, column, row, to, [&](uint32_t shared, uint64_t address, bool inside) {
        uint8_t* data = block.shared.data(shared, map.element_bytes);
        std::memset(data, 0, map.element_bytes);
        if (inside) machine.global.read(who, address, map.element_bytes, data);
      });
      MessageBarrier& message = block.message_barriers.at(barrier);
      block.shared.end_bulk_copy(since, block.key(barrier), message.phases, to, bytes);
      message.bytes -= bytes;
      message.complete_if_done();
      machine.quiet = 0;
    };
    if (machine.timing == Timing::Eager)
      perform();
    else
      block.bulk_copies.push_back(perform);
  }
}

void load_box(Step& s) {
  s.each([&](int lane) { load_box_to(s, lane, 1u << s.block.rank); });
}

void load_box_to_some(Step& s) {
  s.each([&](int lane) { load_box_to(s, lane, s.slot(3)[lane] & 0xffff); });
}

void store_box(Step& s) {
  s.each([&](int lane) {
    const TensorMap map = tensor_map(s, 0, 0, lane);
    const int column = static_cast<int32_t>(s.nth(1)[lane]), row = static_cast<int32_t>(s.nth(2)[lane]);
    const uint32_t from = address_of(s, 1, 1, lane);
    const int bytes = map.box_columns * map.box_rows * map.element_bytes;
    check_box(map, from);
    Machine& machine = s.machine;
    Block& block = s.block;
    Warp& warp = s.warp;
    std::vector<uint32_t> fences;
    for (const auto& w : block.warps) fences.push_back(w.fences);
    const uint64_t id = machine.next_id++;
    block.shared.begin_async_read(s.accessor(), id, fences, s.warp.fence_epoch, from, bytes);
    Asynchronous operation;
    operation.perform = [=, &machine, &block, &warp] {
      each_element(map, column, row, from, [&](uint32_t shared, uint64_t address, bool inside) {
        const uint8_t* data = block.shared.data(shared, map.element_bytes);
        if (inside) machine.global.write({block.id, warp.id, &warp.known}, address, map.element_bytes, data);
      });
    };
    operation.finish = [=, &block, &warp] { block.shared.end_async_read({block.id, warp.id, &warp.known}, id); };
    machine.issue(warp.stores, std::move(operation));
  });
  s.machine.quiet = 0;
}

void commit_stores(Step& s) { s.warp.stores.commit(); }
void wait_stores(Step& s) { s.warp.stores.wait(s.uniform(0)); }

void fence(Step& s) {
  ++s.warp.fences;
  s.warp.fence_epoch = s.block.epoch;
}

template <Handler H>
Handler untyped(const Instruction& i) {
  if (!i.types.empty() && !(i.types[0] == Type{Kind::Bits, 8})) unknown(i);
  return H;
}

}  // namespace

const Decoders& transfers() {
  static const Decoders table = {
      {"ld.param", {1, one<load_parameter>}},
      {"ld.global", {1, one<load_global<Order::Plain>>}},
      {"ld.global.cg", {1, one<load_global<Order::Plain>>}},
      {"ld.acquire.gpu", {1, one<load_global<Order::Acquire>>}},
      {"ld.shared", {1, one<load_shared>}},
      {"st.global", {0, one<store_global<Order::Plain>>}},
      {"st.release.gpu", {0, one<store_global<Order::Release>>}},
      {"st.shared", {0, one<store_shared>}},
      {"atom.global.add", {1, whole<atomic_global<'+', Order::Relaxed>>}},
      {"atom.global.gpu.relaxed.add", {1, whole<atomic_global<'+', Order::Relaxed>>}},
      {"atom.global.gpu.acq_rel.add", {1, whole<atomic_global<'+', Order::Both>>}},
      {"atom.shared.add", {1, whole<atomic_shared<'+'>>}},
      {"atom.shared.max", {1, whole<atomic_shared<'>'>>}},
      {"cp.async.ca.shared.global", {0, untyped<copy>}},
      {"cp.async.cg.shared.global", {0, untyped<copy>}},
      {"cp.async.commit_group", {0, untyped<commit_copies>}},
      {"cp.async.wait_group", {0, untyped<wait_copies>}},
      {"cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes", {0, untyped<load_box>}},
      {"cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster",
       {0, untyped<load_box_to_some>}},
      {"prefetch.tensormap", {0, untyped<fetch_map>}},
      {"cp.async.bulk.tensor.2d.global.shared::cta.bulk_group", {0, untyped<store_box>}},
      {"cp.async.bulk.commit_group", {0, untyped<commit_stores>}},
      {"cp.async.bulk.wait_group.read", {0, untyped<wait_stores>}},
      {"fence.proxy.async.shared::cta", {0, untyped<fence>}},
  };
  return table;
}

}  // namespace ptx
