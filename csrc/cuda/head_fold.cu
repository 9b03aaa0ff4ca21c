// The fold of a vocabulary head's logits for sm_90a: what qrm_fast/triton/linear_logprobs.py gives Hopper's 16-bit
// inputs to. A tile of hidden @ weight.T becomes logits in the accumulators that made it (bias, softcap, temperature),
// and there (max, sum, weighted sum) of its columns: no logit is rounded to 16 bits, none is written but, where the
// loss asks for them, as exponentials. 2 T D V FLOP. A cluster of two blocks multiplies 256 rows with one split of the
// vocabulary, 2048 columns cut from V alone; 8 clusters with other rows go through one split before the next, so that
// weight and hidden tiles of a wave stay in L2. A row's bits depend on that row, weight and bias alone.
#include "head_fold.h"
#include "product_launch.h"

namespace qrm_fast {
namespace {

template <typename T>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1)
    head_fold(const __grid_constant__ CUtensorMap hidden, const __grid_constant__ CUtensorMap weight,
              const __grid_constant__ CUtensorMap kept, const __grid_constant__ int dim,
              const __grid_constant__ HeadFold p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const SplitTiles<TILE_COLUMNS, SPLIT> tiles(p.head.num_rows, p.head.vocab);
  multiply_tiles<T, Depth::Along, Depth::Along, Fold<T>>({{hidden, weight, dim}}, kept, tiles, p);
#else
  __trap();
#endif
}

// The arguments of fold() in qrm_fast/triton/linear_logprobs.py, which see: contiguous but for hidden, weight and kept,
// whose rows start at multiples of 16 bytes. `kept` and `tops` come together.
void launch(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& temperatures, std::optional<double> softcap, const Tensor& statistics,
            const Tensor& target_logits, const std::optional<Tensor>& kept, const std::optional<Tensor>& tops,
            const std::optional<Tensor>& running) {
  const auto data_of = [](const std::optional<Tensor>& x) { return x ? mutable_data<float>(*x) : nullptr; };
  const HeadFold p{head_logits(hidden, weight, bias, temperatures, softcap),
                   data<int64_t>(targets),
                   mutable_data<float>(statistics),
                   mutable_data<float>(target_logits),
                   data_of(tops),
                   data_of(running)};
  const int64_t splits = ceil_div(p.head.vocab, SPLIT), tiles = ceil_div(p.head.vocab, TILE_COLUMNS);
  STD_TORCH_CHECK(statistics.size(1) == splits, "a split of the vocabulary has ", SPLIT, " columns");
  STD_TORCH_CHECK((!tops || tops->size(0) == tiles) && (!running || running->size(1) == tiles), "a tile has ",
                  TILE_COLUMNS, " columns");
  STD_TORCH_CHECK(kept.has_value() == tops.has_value(), "exponentials are kept together with their tops");
  dispatch_halves(hidden.scalar_type(), [&](auto half, CUtensorMapDataType dtype) {
    const CUtensorMap rows = factor_map(hidden, dtype, Depth::Along, TILE_ROWS);
    const CUtensorMap columns = factor_map(weight, dtype, Depth::Along, TILE_COLUMNS / 2);
    const CUtensorMap boxes = kept ? tensor_map(*kept, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, WARP_ROWS) : CUtensorMap{};
    launch_product(head_fold<decltype(half)>, hidden, p.head.num_rows, splits, false, rows, columns, boxes,
                   static_cast<int>(hidden.size(1)), p);
  });
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CUDA, m) { m.impl("head_fold", TORCH_BOX(&qrm_fast::launch)); }
