// Matrices in registers and shared memory, and the tensor cores' products.
//
// A tensor core adds the exact products of a slice of the depth to the accumulator and truncates the sum to float32
// (arXiv 2206.02874 and others measured it): a result is a little nearer to zero than rounding would bring it.
#include <cmath>

#include "machine.h"

namespace ptx {
namespace {

float half_of(uint16_t bits, Kind kind) {
  if (kind == Kind::Bfloat) return value_of<float>(static_cast<uint64_t>(bits) << 16);
  return static_cast<float>(value_of<_Float16>(bits));
}

float accumulated(float sum, const float* a, const float* b, int depth) {
  double exact = sum;
  for (int k = 0; k < depth; ++k) exact += static_cast<double>(a[k]) * b[k];
  const float rounded = static_cast<float>(exact);
  const bool outwards = std::isfinite(exact) && std::fabs(static_cast<double>(rounded)) > std::fabs(exact);
  return outwards ? std::nextafter(rounded, 0.f) : rounded;
}

// 8 x 8 matrices of 16 bits: lane l holds row l / 4, columns 2 (l % 4) and the next; lanes 8 q to 8 q + 7 bring the
// addresses of the rows of matrix q.

template <bool TRANSPOSED>
void load_matrices(Step& s) {
  const int count = s.i.count(0);
  for (int q = 0; q < count; ++q) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      const uint32_t address = s.slot(1)[q * 8 + r] + s.i.offsets[0];
      if (address % 16) throw Fault("a row of a matrix that is not aligned to 16 bytes");
      s.block.shared.read(s.warp.id, s.block.epoch, address, 16, matrix[r]);
    }
    for (int lane = 0; lane < LANES; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint64_t low = TRANSPOSED ? matrix[c][r] : matrix[r][c];
      const uint64_t high = TRANSPOSED ? matrix[c + 1][r] : matrix[r][c + 1];
      s.nth(q)[lane] = low | high << 16;
    }
  }
}

void store_matrices(Step& s) {
  const int count = s.i.count(1);
  for (int q = 0; q < count; ++q) {
    for (int r = 0; r < 8; ++r) {
      uint32_t row[4];
      for (int c = 0; c < 4; ++c) row[c] = s.nth(1 + q)[r * 4 + c];
      const uint32_t address = s.slot(0)[q * 8 + r] + s.i.offsets[0];
      if (address % 16) throw Fault("a row of a matrix that is not aligned to 16 bytes");
      s.block.shared.write(s.warp.id, s.block.epoch, s.warp.fences, address, 16, row);
    }
  }
  s.machine.quiet = 0;
}

template <Handler H>
Handler matrix_rows(const Instruction& i) {
  const int count = std::max(i.count(0), i.count(1));
  if (i.shapes.size() != 2 || i.shapes[0] != "m8n8" || i.shapes[1] != "x" + std::to_string(count)) unknown(i);
  return H;
}

// m16n8k16: the layouts of PTX's manual

void multiply(Step& s) {
  const Kind kind = s.i.types[1].kind;
  float a[16][16], b[8][16], c[16][8];
  for (int lane = 0; lane < LANES; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int k = 0; k < 4; ++k) {
      for (int h = 0; h < 2; ++h) {
        a[group + 8 * (k & 1)][pair + h + 8 * (k >> 1)] = half_of(s.nth(4 + k)[lane] >> (16 * h), kind);
        if (k < 2) b[group][pair + h + 8 * k] = half_of(s.nth(8 + k)[lane] >> (16 * h), kind);
      }
      c[group + 8 * (k >> 1)][pair + (k & 1)] = value_of<float>(s.nth(10 + k)[lane]);
    }
  }
  for (int r = 0; r < 16; ++r) {
    for (int n = 0; n < 8; ++n) {
      for (int k = 0; k < 16; k += 8) c[r][n] = accumulated(c[r][n], &a[r][k], &b[n][k], 8);
    }
  }
  for (int lane = 0; lane < LANES; ++lane) {
    for (int k = 0; k < 4; ++k) s.nth(k)[lane] = bits_of(c[lane / 4 + 8 * (k >> 1)][lane % 4 * 2 + (k & 1)]);
  }
}

bool of_halves(const Instruction& i, size_t a, size_t b) {
  const Type t = i.types[a];
  return (t.kind == Kind::Float || t.kind == Kind::Bfloat) && t.bytes == 2 && !t.packed && t == i.types[b];
}

Handler multiplies(const Instruction& i) {
  const Type single{Kind::Float, 4};
  const bool known = i.types.size() == 4 && i.types[0] == single && i.types[3] == single && of_halves(i, 1, 2);
  if (!known || i.shapes != std::vector<std::string>{"m16n8k16"} || i.slots.size() != 14) unknown(i);
  return multiply;
}

// m64nNk16 of a group of four warps, both factors in shared memory. Warp w has rows 16 (w % 4) and up.

struct Factor {
  uint32_t start, leading, stride;  // bytes
  int swizzle, row_bytes;           // 1, 2, 3 for rows of 32, 64, 128 bytes
  bool transposed;                  // the depth goes along rows

  Factor(uint64_t descriptor, bool transposed) : transposed(transposed) {
    start = (descriptor & 0x3fff) << 4;
    leading = (descriptor >> 16 & 0x3fff) << 4;
    stride = (descriptor >> 32 & 0x3fff) << 4;
    const int mode = descriptor >> 62;
    if (mode == 0 || (descriptor >> 49 & 7) != 0) throw Fault("a matrix descriptor that is not known");
    swizzle = 4 - mode;
    row_bytes = 16 << swizzle;
  }
  uint32_t address(int row, int k) const {
    uint32_t at;
    if (transposed) {
      const int per_row = row_bytes / 2;
      at = start + row / per_row * leading + k / 8 * stride + k % 8 * row_bytes + row % per_row * 2;
    } else {
      at = start + row / 8 * stride + row % 8 * row_bytes + k * 2;
    }
    return at ^ ((at >> 7 & ((1 << swizzle) - 1)) << 4);
  }
  // Bytes that hold rows [first, first + rows): whole rows of memory, a little more than is read.
  std::pair<uint32_t, uint32_t> range(int first, int rows) const {
    uint32_t low = ~0u, high = 0;
    for (int r = first; r < first + rows; r += transposed ? 1 : 8) {
      for (int k = 0; k < 16; k += 8) {
        low = std::min(low, address(r, k) / row_bytes * row_bytes);
        high = std::max(high, address(std::min(r + 7, first + rows - 1), k + 7) / row_bytes * row_bytes + row_bytes);
      }
    }
    return {low, high};
  }
};

void multiply_group(Step& s) {
  const int columns = std::stoi(s.i.shapes[0].substr(4)), count = columns / 2;
  const Kind kind = s.i.types[1].kind;
  const Factor a(s.uniform(1), s.uniform(6)), b(s.uniform(2), s.uniform(7));
  const bool adds = s.uniform(3) & 1;
  if (s.uniform(4) != 1 || s.uniform(5) != 1) throw Fault("a negated factor is not known");
  if (s.block.warps.size() % 4) throw Fault("a block without whole groups of four warps");
  const int first_row = s.warp.id % 4 * 16;
  std::vector<uint32_t> fences;
  for (const auto& warp : s.block.warps) fences.push_back(warp.fences);
  if (!s.warp.registers_fenced) throw Fault("a product without a fence between it and accesses to its accumulators");
  const uint64_t id = s.machine.next_id++;
  for (const auto& [low, high] : {a.range(first_row, 16), b.range(0, columns)}) {
    s.block.shared.begin_async_read(s.accessor(), id, fences, s.warp.fence_epoch, low, high - low);
  }
  Block& block = s.block;
  Warp& warp = s.warp;
  const Instruction& i = s.i;
  for (int k = 0; k < count; ++k) ++warp.written_later[i.slots[k]];
  Asynchronous operation;
  operation.perform = [=, &block, &warp, &i] {
    const auto element = [&](const Factor& f, int row, int k) {
      uint16_t bits;
      std::memcpy(&bits, block.shared.data(f.address(row, k), 2), 2);
      return half_of(bits, kind);
    };
    std::vector<float> rows(16 * 16), others(columns * 16);
    for (int r = 0; r < 16; ++r) {
      for (int k = 0; k < 16; ++k) rows[r * 16 + k] = element(a, first_row + r, k);
    }
    for (int n = 0; n < columns; ++n) {
      for (int k = 0; k < 16; ++k) others[n * 16 + k] = element(b, n, k);
    }
    for (int k = 0; k < count; ++k) {
      uint64_t* out = &warp.registers[static_cast<size_t>(i.slots[k]) * LANES];
      for (int lane = 0; lane < LANES; ++lane) {
        const int r = lane / 4 + 8 * (k / 2 & 1), n = k / 4 * 8 + lane % 4 * 2 + (k & 1);
        out[lane] = bits_of(accumulated(adds ? value_of<float>(out[lane]) : 0.f, &rows[r * 16], &others[n * 16], 16));
      }
    }
  };
  operation.finish = [=, &block, &warp, &i] {
    block.shared.end_async_read({block.id, warp.id, &warp.known}, id);
    for (int k = 0; k < count; ++k) --warp.written_later[i.slots[k]];
  };
  s.machine.issue(warp.products, std::move(operation));
  s.machine.quiet = 0;
}

Handler multiplies_group(const Instruction& i) {
  const bool known = i.types.size() == 3 && i.types[0] == Type{Kind::Float, 4} && of_halves(i, 1, 2);
  const bool shaped = i.shapes.size() == 1 && i.shapes[0].compare(0, 4, "m64n") == 0 &&
                      i.shapes[0].substr(i.shapes[0].size() - 3) == "k16";
  if (!known || !shaped || i.operands.size() != 8 || 2 * i.count(0) != std::stoi(i.shapes[0].substr(4))) unknown(i);
  return multiply_group;
}

void fence_registers(Step& s) { s.warp.registers_fenced = true; }
void commit_products(Step& s) { s.warp.products.commit(); }
void wait_products(Step& s) {
  s.warp.products.wait(s.uniform(0));
  s.warp.registers_fenced = false;
}

template <Handler H>
Handler plain(const Instruction&) {
  return H;
}

}  // namespace

const Decoders& matrices() {
  static const Decoders table = {
      {"ldmatrix.sync.aligned.shared", {1, matrix_rows<load_matrices<false>>, true}},
      {"ldmatrix.sync.aligned.trans.shared", {1, matrix_rows<load_matrices<true>>, true}},
      {"stmatrix.sync.aligned.shared", {0, matrix_rows<store_matrices>, true}},
      {"mma.sync.aligned.row.col", {1, multiplies, true}},
      {"wgmma.mma_async.sync.aligned", {1, multiplies_group, true}},
      {"wgmma.fence.sync.aligned", {0, plain<fence_registers>, true}},
      {"wgmma.commit_group.sync.aligned", {0, plain<commit_products>, true}},
      {"wgmma.wait_group.sync.aligned", {0, plain<wait_products>, true}},
  };
  return table;
}

}  // namespace ptx
