// The returns of one sequence's steps: what min_form_returns and process_advantages share.
#pragma once
#include <cstdint>
#include <string>

#include "ceil_div.h"

namespace qrm_fast {

enum class Form { kSoft, kCausalSoft, kSum };

Form form_of(const std::string& name);

// n steps and as many more as fill a vector of 8.
inline int64_t whole_vectors(int64_t n) { return round_up(n, 8); }

// Of n > 0 steps; `returns` has room for whole_vectors(n), and those behind n are no returns. Returns the lowest
// reward, or NaN where a reward is not finite: every return is then NaN.
template <typename T>
double sequence_returns(const T* rewards, int64_t n, Form form, double temperature, double* returns);

}  // namespace qrm_fast
