// Count, mean and sum of squared deviations of the counted (unmasked, finite) rows of each sequence, group or the
// batch. Reads every row once (5 bytes with a mask in fp32) and writes 24 bytes per set: bound by memory. Rows
// are cut into blocks relative to their sequence's start; a block is held in cache for its two passes, about a value of
// its own and then about its mean, and blocks, sequences and groups are joined in order. So the bits depend neither on
// the number of threads nor, per sequence, on the packing, and a constant gives a spread of exactly zero.
#include "moments.h"

#include <algorithm>
#include <vector>

#include "../dtypes.h"
#include "../indices.h"
#include "packed/cu_seqlens.h"
#include "packed/groups.h"
#include "parallel.h"
#include "simd/simd.h"

namespace qrm_fast {
namespace {

constexpr int64_t BT = 1024;  // rows of a block
constexpr int64_t LANES = 16;

template <typename T>
QRM_FAST_CLONES Moments block_moments(const T* x, const bool* mask, int64_t num_rows) {
  double value[BT], weight[BT];
  for (int64_t t = 0; t < num_rows; ++t) {
    const double v = static_cast<acc_t<T>>(x[t]);
    const bool finite = v - v == 0;
    value[t] = finite ? v : 0;
    weight[t] = finite ? 1 : 0;
  }
  if (mask != nullptr) {
    for (int64_t t = 0; t < num_rows; ++t) weight[t] = mask[t] ? weight[t] : 0;
  }
  const int64_t padded = round_up(num_rows, LANES);
  std::fill(value + num_rows, value + padded, 0.0);
  std::fill(weight + num_rows, weight + padded, 0.0);

  const int64_t first = std::find(weight, weight + num_rows, 1.0) - weight;
  if (first == num_rows) return {};
  const double origin = value[first];
  double count[LANES] = {}, sum[LANES] = {}, m2[LANES] = {};
  for (int64_t t = 0; t < padded; t += LANES) {
    for (int64_t l = 0; l < LANES; ++l) {
      count[l] += weight[t + l];
      sum[l] += weight[t + l] * (value[t + l] - origin);
    }
  }
  const double n = sum_halves(count, LANES);
  const double mean = origin + sum_halves(sum, LANES) / n;
  for (int64_t t = 0; t < padded; t += LANES) {
    for (int64_t l = 0; l < LANES; ++l) {
      const double deviation = weight[t + l] * (value[t + l] - mean);
      m2[l] += deviation * deviation;
    }
  }
  return {n, mean, sum_halves(m2, LANES)};
}

Tensor moments(const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens,
               const std::optional<Tensor>& group_ids) {
  const int64_t num_tokens = x.size(0);
  std::vector<int64_t> bounds{0, num_tokens};
  if (cu_seqlens.has_value()) {
    const CuSeqlens cu(*cu_seqlens, num_tokens);
    bounds.resize(cu.num_sequences() + 1);
    for (size_t i = 0; i < bounds.size(); ++i) bounds[i] = cu[i];
  }
  const int64_t num_sets = bounds.size() - 1;

  std::vector<int64_t> first_block(num_sets + 1), starts;
  for (int64_t i = 0; i < num_sets; ++i) {
    for (int64_t t = bounds[i]; t < bounds[i + 1]; t += BT) starts.push_back(t);
    first_block[i + 1] = starts.size();
  }
  std::vector<Moments> blocks(starts.size());
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* rows = data<T>(x);
    const bool* m = data_or_null<bool>(mask);
    parallel(blocks.size(), 8, [&](int64_t b) {
      const int64_t eos = *std::upper_bound(bounds.begin(), bounds.end(), starts[b]);
      blocks[b] = block_moments(rows + starts[b], m ? m + starts[b] : nullptr, std::min(BT, eos - starts[b]));
    });
  });

  Tensor out = torch::stable::new_empty(x, {num_sets, 3}, ScalarType::Double);
  Moments* sets = mutable_data<Moments>(out);
  for (int64_t i = 0; i < num_sets; ++i) {
    sets[i] = join(first_block[i + 1] - first_block[i], [&](int64_t b) { return blocks[first_block[i] + b]; });
  }
  if (group_ids.has_value()) {
    const Groups groups(*group_ids);
    for (int64_t g = 0; g < groups.size(); ++g) {
      const Groups::Members members = groups.members(g);
      const Moments joint = join(members.size(), [&](int64_t k) { return sets[members[k]]; });
      for (const int64_t i : members) sets[i] = joint;
    }
  }
  return out;
}

}  // namespace

template <typename T>
Moments row_moments(const T* x, const bool* mask, int64_t num_rows) {
  std::vector<Moments> blocks;
  for (int64_t t = 0; t < num_rows; t += BT) {
    blocks.push_back(block_moments(x + t, mask ? mask + t : nullptr, std::min(BT, num_rows - t)));
  }
  return join(blocks.size(), [&](int64_t b) { return blocks[b]; });
}

template Moments row_moments(const float*, const bool*, int64_t);
template Moments row_moments(const double*, const bool*, int64_t);

}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("moments", TORCH_BOX(&qrm_fast::moments)); }
