// The returns of one sequence's steps: what min_form_returns and process_advantages share.
#pragma once
#include <cstdint>
#include <string>

#include "../indices.h"
#include "simd/simd.h"

namespace qrm_fast {

enum class Form { kSoft, kCausalSoft, kSum };

Form form_of(const std::string& name);

using Simd8 = Simd<double, 64>;

// n steps and as many more as fill a vector.
inline int64_t whole_vectors(int64_t n) { return round_up(n, Simd8::kLanes); }

// Of n > 0 steps; `returns` has room for whole_vectors(n), and those behind n are no returns. Returns the lowest
// reward, or NaN where a reward is not finite: every return is then NaN.
template <typename T>
double sequence_returns(const T* rewards, int64_t n, Form form, double temperature, double* returns);

}  // namespace qrm_fast
