// What Hopper has and CUDA C++ has no words for, as PTX for sm_90a: clusters of blocks, mbarriers, copies of boxes of
// matrices, products of groups of four warps. Shared memory is meant by its 32-bit address throughout.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace qrm_fast::hopper {

__device__ inline uint32_t rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline uint32_t blocks_in_cluster() {
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
// All threads of all blocks of the cluster meet.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Registers of each thread of a group of four warps from here on.
template <int kRegisters>
__device__ inline void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// mbarriers: a phase ends when all arrivals and all announced bytes have come. They order what copies write and
// products read; for what threads write, an arrival in another block would have to fence the whole memory.

__device__ inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the cluster and the copy engine, once the cluster's barrier is behind all.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive_announcing(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// At the barrier that has the same address in another block of the cluster, or in this one.
__device__ inline void arrive_in(uint32_t rank, uint32_t barrier) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Until the phase of this parity has ended.
__device__ inline void await(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// Boxes of matrices, in shared memory in rows of 128 bytes whose pieces of 16 bytes are swizzled; 0 outside the matrix.

__device__ inline void fetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// To this address in every block of the mask, telling the barrier of the same address there of its bytes.
__device__ inline void load_box(const CUtensorMap& map, int row, int column, uint32_t to, uint32_t barrier,
                                uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}
__device__ inline void load_box(const CUtensorMap& map, int row, int column, uint32_t to, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// What the matrix does not have is left out. The copy engine sees what the warp wrote before show_to_copies.
__device__ inline void store_box(const CUtensorMap& map, int row, int column, uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n\t"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}
__device__ inline void show_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Until all but the last kPending stores of this thread have read their boxes.
template <int kPending>
__device__ inline void await_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Four 8 x 8 matrices, a row of 16 bytes to the address that each lane brings.
__device__ inline void store_matrices(uint32_t to, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

// Products

// Of a matrix in rows of 128 bytes as load_box leaves them, in units of 16 bytes. Where the depth lies across the rows,
// 64 further rows or columns of the factor start `next` bytes on.
__device__ inline uint64_t described(uint32_t address, uint32_t next) {
  constexpr uint64_t eight_rows = 1024 >> 4, swizzled_by_128 = 1;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(next >> 4) << 16 | eight_rows << 32 | swizzled_by_128 << 62;
}
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler takes none of these registers for known before this point.
template <int kCount>
__device__ inline void settle(float (&z)[kCount]) {
#pragma unroll
  for (float& x : z) asm volatile("" : "+f"(x)::"memory");
}

#define QRM_FAST_8(z, i)                                                                                      \
  "+f"(z[i]), "+f"(z[i + 1]), "+f"(z[i + 2]), "+f"(z[i + 3]), "+f"(z[i + 4]), "+f"(z[i + 5]), "+f"(z[i + 6]), \
      "+f"(z[i + 7])
#define QRM_FAST_32(z, i) QRM_FAST_8(z, i), QRM_FAST_8(z, i + 8), QRM_FAST_8(z, i + 16), QRM_FAST_8(z, i + 24)
#define QRM_FAST_96(z) QRM_FAST_32(z, 0), QRM_FAST_32(z, 32), QRM_FAST_32(z, 64)
#define QRM_FAST_128(z) QRM_FAST_96(z), QRM_FAST_32(z, 96)
#define QRM_FAST_96_NAMES                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"             \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define QRM_FAST_128_NAMES                                                                       \
  QRM_FAST_96_NAMES                                                                              \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// The operands behind the accumulators by their numbers: the factors, whether to add, how the factors lie.
#define QRM_FAST_MULTIPLY(n, type, names, a_name, b_name, adds_name, rows, columns, accumulators)                    \
  asm volatile("{\n\t.reg .pred adds;\n\tsetp.ne.b32 adds, " adds_name ", 0;\n\twgmma.mma_async.sync.aligned.m64n" n \
               "k16.f32." type "." type " {" names "}, " a_name ", " b_name ", adds, 1, 1, " rows ", " columns       \
               ";\n\t}"                                                                                              \
               : accumulators                                                                                        \
               : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(kRowsAcross), "n"(kColumnsAcross))
#define QRM_FAST_MULTIPLY_192(type) \
  QRM_FAST_MULTIPLY("192", type, QRM_FAST_96_NAMES, "%96", "%97", "%98", "%99", "%100", QRM_FAST_96(z))
#define QRM_FAST_MULTIPLY_256(type) \
  QRM_FAST_MULTIPLY("256", type, QRM_FAST_128_NAMES, "%128", "%129", "%130", "%131", "%132", QRM_FAST_128(z))

// z = a b^T, plus z where `adds`: 64 x 192 or 64 x 256 accumulators of four warps from 16 steps of the depth. Warp w of
// the four has rows 16 w and up; z[4 j + 2 h + c] of lane l stands in row l / 4 + 8 h, column 8 j + 2 (l % 4) + c. The
// depth lies along the rows of a and b in memory, or across them.
template <typename T, int kRowsAcross, int kColumnsAcross, int kCount>
__device__ inline void multiply(float (&z)[kCount], uint64_t a, uint64_t b, bool adds) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kCount == 96 || kCount == 128);
  if constexpr (kCount == 96 && kHalf) {
    QRM_FAST_MULTIPLY_192("f16");
  } else if constexpr (kCount == 96) {
    QRM_FAST_MULTIPLY_192("bf16");
  } else if constexpr (kHalf) {
    QRM_FAST_MULTIPLY_256("f16");
  } else {
    QRM_FAST_MULTIPLY_256("bf16");
  }
}

#undef QRM_FAST_MULTIPLY_256
#undef QRM_FAST_MULTIPLY_192
#undef QRM_FAST_MULTIPLY
#undef QRM_FAST_128_NAMES
#undef QRM_FAST_96_NAMES
#undef QRM_FAST_128
#undef QRM_FAST_96
#undef QRM_FAST_32
#undef QRM_FAST_8

}  // namespace qrm_fast::hopper
