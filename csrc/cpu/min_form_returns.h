// The returns of one sequence's steps: what min_form_returns and process_advantages share.
#pragma once
#include <cstdint>
#include <string>

namespace qrm_fast {

enum class Form { kSoft, kCausalSoft, kSum };

Form form_of(const std::string& name);

// Of n > 0 steps. Returns the first step of the lowest reward, or -1 where a reward is not finite: every return is then
// NaN.
template <typename T>
int64_t sequence_returns(const T* rewards, int64_t n, Form form, double temperature, double* returns);

}  // namespace qrm_fast
