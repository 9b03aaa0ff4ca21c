"""The product behind the heads' gradients: hidden's dZ W and weight's dZ^T X, in blocks of fixed shape.

An element is summed over the depth in order, in one program, in float32: its bits depend on its row of A and its column
of B alone, which a library's GEMM, choosing its kernel by shape, does not promise. A product over a longer depth may be
cut into calls of this one, each starting from what the last one wrote. 2 M N K FLOP.
Programs run through GROUP blocks of rows for one block of columns before the next, so that a wave of programs reads
about as many blocks of A as of B. On Hopper csrc/cuda/head_product.cu, where it is compiled, multiplies 16-bit inputs
instead. Block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped]

from ..ops.hopper import not_served

GROUP = 16  # blocks of rows that share a block of columns


def blocks(dtype: torch.dtype, capability: int, described: bool, *, halved=False, stored=False) -> dict[str, int]:
    """Block sizes BT x BV x BD of a product with float32 accumulators, for a GPU of this major compute capability.

    128 x 256 accumulators fill the register file of a multiprocessor. Pointers instead of descriptors take registers of
    their own: half the columns then, as where the caller asks for room by `halved`. `stored`: the accumulators leave
    through shared memory, in the place of one buffer, and in the 99 KB of sm_120 beside buffers of half the depth.
    """
    if dtype == torch.float32:
        return {"BT": 64, "BV": 64, "BD": 16, "num_warps": 8, "num_stages": 3}
    if capability in (9, 10):
        launch = {"BT": 128, "BV": 256 if described else 128, "BD": 64, "num_warps": 8, "num_stages": 3 + (not stored)}
    else:
        launch = {"BT": 128, "BV": 128, "BD": 64 if capability == 8 else 32, "num_warps": 8, "num_stages": 3}
    if halved:
        launch["BV"] //= 2
    return launch


def capability(x: Tensor) -> int:
    """Major compute capability; the interpreter, on the CPU, runs what a Hopper GPU runs."""
    return 9 if x.is_cpu else torch.cuda.get_device_capability(x.device)[0]


def vectorised(*operands: Tensor) -> bool:
    """Whether Triton knows that every row of all of these [rows, columns] starts at a multiple of 16 bytes."""
    return all(x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 for x in operands)


def describable(*operands: Tensor) -> bool:
    """Whether the copy engine of Hopper and later can load blocks of all of these [rows, columns]."""
    aligned = (x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in operands)
    return operands[0].element_size() == 2 and capability(operands[0]) >= 9 and all(aligned)


def compiled(*operands: Tensor) -> bool:
    """Whether csrc/cuda multiplies these: on Hopper, where it is compiled, what the copy engine can load."""
    x = operands[0]
    return capability(x) == 9 and describable(*operands) and not not_served("cpu" if x.is_cpu else x.device.type)


def operand(x: Tensor, described: bool, height: int, width: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [height, width]) if described else x


@triton.jit
def load_block(matrix, i_r, i_c, DESCRIBED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Block [BR, BC] from row i_r and column i_c on, 0 outside.

    `matrix`: a descriptor or a pointer, the stride of its rows, their number, the number of columns.
    """
    x, stride, num_rows, num_columns = matrix
    if DESCRIBED:
        return x.load([i_r, i_c])
    else:
        o_r = i_r + tl.arange(0, BR)
        o_c = i_c + tl.arange(0, BC)
        p = x + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
        return tl.load(p, (o_r < num_rows)[:, None] & (o_c < num_columns)[None, :], 0.0)


@triton.jit
def store_block(matrix, i_r, i_c, b, DESCRIBED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Block b [BR, BC] to rows from i_r and columns i_c on, in the matrix's dtype; what lies outside is left out."""
    x, stride, num_rows, num_columns = matrix
    if DESCRIBED:
        x.store([i_r, i_c], b.to(x.dtype))
    else:
        o_r = i_r + tl.arange(0, BR)
        o_c = i_c + tl.arange(0, BC)
        p = x + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
        tl.store(p, b.to(x.dtype.element_ty), (o_r < num_rows)[:, None] & (o_c < num_columns)[None, :])


@triton.jit
def grouped(i_p, num_blocks, num_columns, GROUP: tl.constexpr):
    """Block of rows and block of columns of program i_p."""
    i_group = i_p // (GROUP * num_columns)
    height = tl.minimum(num_blocks - i_group * GROUP, GROUP)
    i_p -= i_group * GROUP * num_columns
    return i_group * GROUP + i_p % height, i_p // height


@triton.jit
def product(
    a,  # [M, K], or [K, M] where TRANSPOSED
    b,  # [K, N]
    start,  # [M, N] what the product is added to, or None; out itself, whose addresses would outlive the loop
    out,  # [M, N] float32
    scale,  # [M] where SCALED_ROWS, else []: powers of 2 times which the product counts; 0 makes a row 0
    stride_a,
    stride_b,
    stride_start,
    stride_out,
    num_rows,
    num_columns,
    depth,
    TRANSPOSED: tl.constexpr,
    SCALED_ROWS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    i_t, i_v = grouped(tl.program_id(0), tl.cdiv(num_rows, BT), tl.cdiv(num_columns, BV), GROUP)
    i_t, i_v = i_t * BT, i_v * BV
    o_t, o_v = i_t + tl.arange(0, BT), i_v + tl.arange(0, BV)
    m = (o_t < num_rows)[:, None] & (o_v < num_columns)[None, :]
    b_scale = tl.load(scale + o_t, o_t < num_rows, 0.0)[:, None] if SCALED_ROWS else tl.load(scale)
    o_t = o_t.to(tl.int64)
    matrix_a = (a, stride_a, depth, num_rows) if TRANSPOSED else (a, stride_a, num_rows, depth)
    matrix_b = (b, stride_b, depth, num_columns)
    b_out = tl.zeros([BT, BV], tl.float32)
    if start is not None:
        b_out = tl.load(start + o_t[:, None] * stride_start + o_v[None, :], m, 0.0) / b_scale  # [BT, BV]
    for i_d in range(0, depth, BD):
        if TRANSPOSED:
            b_a = load_block(matrix_a, i_d, i_t, DESCRIBED, BD, BT).T
        else:
            b_a = load_block(matrix_a, i_t, i_d, DESCRIBED, BT, BD)
        b_b = load_block(matrix_b, i_d, i_v, DESCRIBED, BD, BV)
        b_out = tl.dot(b_a, b_b, b_out, input_precision="ieee")
    b_out *= b_scale
    if SCALED_ROWS:
        b_out = tl.where(b_scale == 0, 0.0, b_out)
    tl.store(out + o_t[:, None] * stride_out + o_v[None, :], b_out, m)


def multiply(a: Tensor, b: Tensor, out: Tensor, scale: Tensor, *, added: bool, transposed: bool) -> None:
    """out = scale a @ b, plus out where `added`, a.T for a where `transposed`; `scale` is 0-d or one per row of out."""
    if compiled(a, b):
        torch.ops.qrm_fast.head_product(a, b, out, scale, added, transposed)
        return
    num_rows, num_columns = out.shape
    described = describable(a, b)
    launch = blocks(a.dtype, capability(a), described, halved=not vectorised(out))
    height, width, depth = launch["BT"], launch["BV"], launch["BD"]
    product[(triton.cdiv(num_rows, height) * triton.cdiv(num_columns, width),)](
        operand(a, described, *((depth, height) if transposed else (height, depth))),
        operand(b, described, depth, width),
        out if added else None,
        out,
        scale,
        a.stride(0),
        b.stride(0),
        out.stride(0),
        out.stride(0),
        num_rows,
        num_columns,
        b.shape[0],
        transposed,
        scale.ndim == 1,
        described,
        GROUP,
        **launch,
    )
