// Elements in another dtype, rounded once.
#pragma once
#include <cstdint>

#include "instruction_set.h"

namespace qrm_fast {

template <typename In, typename Out>
QRM_FAST_CLONES static void convert(const In* __restrict in, int64_t count, Out* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Out>(in[i]);
}

}  // namespace qrm_fast
