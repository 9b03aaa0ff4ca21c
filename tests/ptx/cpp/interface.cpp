// What Python calls, through ctypes.
#include <cstring>

#include "machine.h"

using namespace ptx;

namespace {

constexpr int MESSAGE_BYTES = 1024;

template <typename F>
bool guarded(char* message, F f) {
  try {
    f();
    return true;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), MESSAGE_BYTES - 1);
    message[MESSAGE_BYTES - 1] = 0;
    return false;
  }
}

}  // namespace

extern "C" {

Kernel* ptx_parse(const char* text, const char* name, int contract, char* message) {
  Kernel* kernel = nullptr;
  guarded(message, [&] { kernel = new Kernel(parse(text, name, contract)); });
  return kernel;
}

int ptx_num_parameters(const Kernel* kernel) { return kernel->parameters.size(); }
int ptx_parameter_offset(const Kernel* kernel, int i) { return kernel->parameters[i].offset; }
int ptx_parameter_bytes(const Kernel* kernel, int i) { return kernel->parameters[i].bytes; }

// regions: begin, end and element size of each; returns how many instructions warps executed, 0 with a message.
uint64_t ptx_run(const Kernel* kernel, const uint8_t* parameters, const int* grid, int cluster, int threads,
                 int shared_bytes, const uint64_t* regions, int num_regions, uint64_t seed, int most_blocks,
                 uint64_t most_steps, int blocks_may_race, char* message) {
  uint64_t steps = 0;
  guarded(message, [&] {
    Machine machine(*kernel, parameters, {grid[0], grid[1], grid[2]}, threads, shared_bytes,
                    {seed, most_blocks, most_steps, cluster});
    for (int i = 0; i < num_regions; ++i) {
      machine.global.add(regions[3 * i], regions[3 * i + 1], regions[3 * i + 2]);
    }
    machine.global.blocks_may_race = blocks_may_race;
    machine.run();
    steps = machine.steps;
  });
  return steps;
}

}  // extern "C"
