// Errors about facts that need the data. Metadata (rank, dtype, shape) is checked in Python by the public function.
#pragma once
#include <sstream>
#include <stdexcept>

// Arrives in Python as ValueError. Never call it inside parallel_for: exceptions do not cross torch's C interface
// unchanged.
#define CHECK_VALUE(cond, ...)                                      \
  do {                                                              \
    if (!(cond)) {                                                  \
      throw std::invalid_argument(qrm_fast::sentence(__VA_ARGS__)); \
    }                                                               \
  } while (0)

namespace qrm_fast {

template <typename... Args>
std::string sentence(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

}  // namespace qrm_fast
