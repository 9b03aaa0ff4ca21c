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
struct Attribute {  // of a launch
  unsigned id, unused;
  Extent value;
  char rest[52];
};
struct Configuration {
  Extent grid, block;
  size_t shared_bytes;
  void* stream;
  const Attribute* attributes;
  unsigned num_attributes;
};
using Launch = int (*)(const char* kernel, const unsigned* grid, unsigned cluster, const unsigned* block,
                       size_t shared_bytes, void** args);

// A tensor map as cpp/machine.h has it.
struct TensorMap {
  uint64_t base;
  int64_t columns, rows, stride_bytes;
  int32_t box_columns, box_rows, element_bytes, swizzle;
};

namespace {

Launch launch_in_python;

// Of kernels, by the host function that stands for each; registered while the library is loaded.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> found;
  return found;
}

constexpr unsigned CLUSTER_DIMENSION = 4;                       // an attribute of launches
constexpr int MULTIPROCESSOR_COUNT = 16, PROCESSORS = 4;        // of devices: few, so that blocks have several tiles
constexpr int MAX_DYNAMIC_SHARED_BYTES = 8, INVALID_VALUE = 1;  // an attribute of kernels, an error

// Of kernels that may have more than 48 KB.
std::map<const void*, size_t>& most_shared_bytes() {
  static std::map<const void*, size_t> found;
  return found;
}

// cuTensorMapEncodeTiled for matrices of 16-bit elements.
int encode(TensorMap* map, int, unsigned rank, void* base, const uint64_t* size, const uint64_t* stride_bytes,
           const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int, int fill) {
  *map = {reinterpret_cast<uint64_t>(base),
          int64_t(size[0]),
          int64_t(size[1]),
          int64_t(stride_bytes[0]),
          static_cast<int32_t>(box[0]),
          static_cast<int>(box[1]),
          2,
          swizzle};
  const bool whole = rank == 2 && element_strides[0] == 1 && element_strides[1] == 1 && interleave == 0 && fill == 0;
  const bool aligned = map->base % 16 == 0 && map->stride_bytes % 16 == 0 && map->stride_bytes >> 40 == 0;
  const bool sized = map->columns > 0 && map->rows > 0 && map->columns <= 1ll << 32 && map->rows <= 1ll << 32;
  const bool boxed = box[0] > 0 && box[1] > 0 && box[1] <= 256 && 2 * box[0] <= 16u << swizzle;
  return whole && aligned && sized && boxed ? 0 : INVALID_VALUE;
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
int launch(const void* host, const Extent& grid, unsigned cluster, const Extent& block, size_t bytes, void** args) {
  const auto most = most_shared_bytes().find(host);
  const bool fits = bytes <= (most == most_shared_bytes().end() ? 48 << 10 : most->second);
  last_error =
      fits ? launch_in_python(names().at(host).c_str(), &grid.x, cluster, &block.x, bytes, args) : INVALID_VALUE;
  return last_error;
}
int cudaLaunchKernel(const void* host, Extent grid, Extent block, void** args, size_t shared_bytes, void*) {
  return launch(host, grid, 1, block, shared_bytes, args);
}
int cudaLaunchKernelExC(const Configuration* c, const void* host, void** args) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < c->num_attributes; ++i) {
    const Attribute& a = c->attributes[i];
    if (a.id != CLUSTER_DIMENSION || a.value.y != 1 || a.value.z != 1) return last_error = INVALID_VALUE;
    cluster = a.value.x;
  }
  return launch(host, c->grid, cluster, c->block, c->shared_bytes, args);
}
int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  if (attribute != MAX_DYNAMIC_SHARED_BYTES || value > 227 << 10) return INVALID_VALUE;
  most_shared_bytes()[host] = value;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = PROCESSORS;
  return attribute == MULTIPROCESSOR_COUNT ? 0 : INVALID_VALUE;
}
int cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long, int* found) {
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *found = known ? 0 : 1;
  return 0;
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
