// A CUDA runtime that hands kernel launches to Python: what the host code of csrc/cuda needs of one.
//
// Linked into the same library as that code, whose symbols bind here first. Tensors are on the CPU, so a device's guard
// and stream are nothing.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

struct Extent {
  unsigned x, y, z;
};
using Launch = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared_bytes,
                       void** args);

namespace {

Launch launch_in_python;

// Of kernels, by the host function that stands for each; registered while the library is loaded.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> found;
  return found;
}

Extent pushed_grid, pushed_block;
size_t pushed_bytes;
void* pushed_stream;
int last_error;

}  // namespace

extern "C" {

void emulate_launches(Launch launch) { launch_in_python = launch; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[host] = name;
}

unsigned __cudaPushCallConfiguration(Extent grid, Extent block, size_t shared_bytes, void* stream) {
  pushed_grid = grid;
  pushed_block = block;
  pushed_bytes = shared_bytes;
  pushed_stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(Extent* grid, Extent* block, size_t* shared_bytes, void* stream) {
  *grid = pushed_grid;
  *block = pushed_block;
  *shared_bytes = pushed_bytes;
  *static_cast<void**>(stream) = pushed_stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int cudaLaunchKernel(const void* host, Extent grid, Extent block, void** args, size_t shared_bytes, void*) {
  last_error = launch_in_python(names().at(host).c_str(), &grid.x, &block.x, shared_bytes, args);
  return last_error;
}
int __cudaLaunchKernel(const void* host, Extent grid, Extent block, void** args, size_t shared_bytes, void* stream) {
  return cudaLaunchKernel(host, grid, block, args, shared_bytes, stream);
}
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}

int aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int aoti_torch_delete_device_guard(void*) { return 0; }
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = error ? strdup("the launch was refused") : nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }

}  // extern "C"
