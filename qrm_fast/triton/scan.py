"""Triton kernels of the scans over packed sequences, for installs without nvcc; csrc/cuda has the faster way.

A row turns the state that it receives from its successor into the one that it hands on by a map; runs of rows compose
to maps of the same form (csrc/maps.h has the algebra). Sequences are cut from their *end* into pieces of PIECE rows and
pieces into groups of GROUP, all found from cu_seqlens by binary search, in five launches:
  scan_setup   finds each program's first sequence and checks the boundaries;
  scan_rows    folds every piece, and finishes the last piece of every sequence: short sequences are done here;
  scan_groups  composes the maps of the pieces of a group, scan_states those of the groups of a long sequence, in order;
  scan_rows    takes the pieces that have others behind them once more, with the state that those hand on.
So a token of a sequence of one piece moves the bytes of its columns once, of a longer one the inputs twice: 24 bytes
instead of 16 for gae in fp32. Which maps are composed in which order depends on the distance to the sequence's end
alone, and every product that a sum takes is an explicit fma or rounded by itself: bits do not depend on the packing.
Grids come from shapes. Boundaries that a CPU kernel would refuse are clamped and turn every row into NaN.
Block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from .. import has_cuda_kernels
from .search import boundary, sequence_at

PIECE, GROUP = 32, 64  # rows, pieces
SETUP_PROGRAMS = 64
SETUP = {"BS": 512, "num_warps": 4}
ROWS = {"BP": 32, "HALVINGS": 6, "enable_fp_fusion": False}
GROUPS = {"BP": 16, "HALVINGS": 5, "enable_fp_fusion": False}
STATES = {"BG": 512, "num_warps": 4, "enable_fp_fusion": False}
PARTS = {"gae": 2, "discounted_returns": 2, "min_gae": 3, "vtrace": 5}  # numbers that a map has
WARPS = {"gae": 4, "discounted_returns": 4, "min_gae": 4, "vtrace": 8}  # of rows and groups: at 4, five numbers spill


@triton.jit
def decay_product(a, b):
    """a b that reaches zero only through a zero: a factor that decayed away still hands infinity and NaN on."""
    p = a * b
    return tl.where((p == 0.0) & (a != 0.0) & (b != 0.0), 1.17549435e-38, p)


@triton.jit
def minimum(a, b):
    """NaN wins, as in torch.minimum."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def shifted(a, b, x):
    """b + a x; a factor of zero drops its term."""
    return tl.where(a == 0.0, b, tl.fma(a, x, b))


@triton.jit
def affine_join(a, b, next_a, next_b):
    """x -> b + a x of some rows, then that of the rows before them."""
    return decay_product(next_a, a), tl.fma(next_a, b, next_b)


@triton.jit
def clamped_join(m, a, b, next_m, next_a, next_b):
    """x -> min(m, b + a x), likewise."""
    return minimum(next_m, shifted(next_a, next_b, m)), decay_product(next_a, a), shifted(next_a, next_b, b)


@triton.jit
def vtrace_join(a, k, b, v, counted, next_a, next_k, next_b, next_v, next_counted):
    """(target, value) -> (b + a target + k value, v), likewise; a run of masked rows is not counted."""
    m_both = (counted != 0.0) & (next_counted != 0.0)
    m_next = next_counted != 0.0
    joint_a = tl.where(m_both, decay_product(next_a, a), tl.where(m_next, next_a, a))
    joint_k = tl.where(m_both, next_a * k, tl.where(m_next, next_k, k))
    joint_b = tl.where(m_both, tl.fma(next_k, v, tl.fma(next_a, b, next_b)), tl.where(m_next, next_b, b))
    return joint_a, joint_k, joint_b, tl.where(m_next, next_v, v), tl.where(m_next, next_counted, counted)


@triton.jit
def join(b_map, b_next, RULE: tl.constexpr):
    if RULE == "vtrace":
        return vtrace_join(*b_map, *b_next)
    elif RULE == "min_gae":
        return clamped_join(*b_map, *b_next)
    else:
        return affine_join(*b_map, *b_next)


@triton.jit
def scanned(b_map, axis: tl.constexpr, RULE: tl.constexpr):
    """Each map joined to all those in front of it along the axis."""
    if RULE == "vtrace":
        return tl.associative_scan(b_map, axis, vtrace_join)
    elif RULE == "min_gae":
        return tl.associative_scan(b_map, axis, clamped_join)
    else:
        return tl.associative_scan(b_map, axis, affine_join)


@triton.jit
def load_map(maps, num_maps, o, m, RULE: tl.constexpr):
    """Maps [o], the identity where `m` is False."""
    if RULE == "vtrace":
        b_a, b_k = tl.load(maps + o, m, 1.0), tl.load(maps + num_maps + o, m, 0.0)
        b_b, b_v = tl.load(maps + 2 * num_maps + o, m, 0.0), tl.load(maps + 3 * num_maps + o, m, 0.0)
        return b_a, b_k, b_b, b_v, tl.load(maps + 4 * num_maps + o, m, 0.0)
    elif RULE == "min_gae":
        b_a, b_b = tl.load(maps + num_maps + o, m, 1.0), tl.load(maps + 2 * num_maps + o, m, 0.0)
        return tl.load(maps + o, m, float("inf")), b_a, b_b
    else:
        return tl.load(maps + o, m, 1.0), tl.load(maps + num_maps + o, m, 0.0)


@triton.jit
def store_map(maps, num_maps, o, b_map, m, PARTS: tl.constexpr):
    for i in tl.static_range(PARTS):
        tl.store(maps + i * num_maps + o, b_map[i], m)


@triton.jit
def applied(b_map, b_x, b_value, RULE: tl.constexpr):
    """The state that the rows of a map hand on, given the one they receive; its second part is vtrace's value."""
    if RULE == "vtrace":
        a, k, b, v, counted = b_map
        b_target = tl.fma(k, b_value, tl.fma(a, b_x, b))
        return tl.where(counted != 0.0, b_target, b_x), tl.where(counted != 0.0, v, b_value)
    elif RULE == "min_gae":
        m, a, b = b_map
        return minimum(m, shifted(a, b, b_x)), b_value
    else:
        a, b = b_map
        return tl.fma(a, b_x, b), b_value


@triton.jit
def load_row(rewards, values, ratios, o_t, m_t):
    b_r = tl.load(rewards + o_t, m_t, 0.0).to(tl.float32)
    b_v, b_ratio = b_r, b_r
    if values is not None:
        b_v = tl.load(values + o_t, m_t, 0.0).to(tl.float32)
    if ratios is not None:
        b_ratio = tl.load(ratios + o_t, m_t, 0.0).to(tl.float32)
    return b_r, b_v, b_ratio


@triton.jit
def row_map(b_r, b_v, b_ratio, m, gamma, b_decay, rho_bar, c_bar, RULE: tl.constexpr):
    """The map of a row, the identity where `m` is False."""
    if RULE == "gae":
        # A_t = r_t + u_{t+1} - V_t with u_t = gamma V_t + gamma lam A_t
        return tl.where(m, b_decay, 1.0), tl.where(m, tl.fma(b_decay, b_r - b_v, gamma * b_v), 0.0)
    elif RULE == "discounted_returns":
        # R_t = r_t + gamma R_{t+1}
        return tl.where(m, gamma, 1.0), tl.where(m, b_r, 0.0)
    elif RULE == "min_gae":
        # Q_t = min(r_t, u_{t+1}) with u_t = (1 - lam) V_t + lam Q_t
        b_rest = gamma * b_v
        b_m = shifted(b_decay, b_rest, b_r)
        return tl.where(m, b_m, float("inf")), tl.where(m, b_decay, 1.0), tl.where(m, b_rest, 0.0)
    else:
        # target_t = V_t + rho_t (r_t + gamma V' - V_t) + gamma c_t (target' - V')
        b_rho, b_factor = minimum(b_ratio, rho_bar), b_decay * minimum(b_ratio, c_bar)
        b_k, b_b = tl.fma(b_rho, gamma, -b_factor), tl.fma(b_rho, b_r - b_v, b_v)
        b_counted = tl.where(m, 1.0, 0.0)
        return (
            tl.where(m, b_factor, 1.0),
            tl.where(m, b_k, 0.0),
            tl.where(m, b_b, 0.0),
            tl.where(m, b_v, 0.0),
            b_counted,
        )


@triton.jit
def row_results(b_r, b_v, b_ratio, b_x, b_value, gamma, b_decay, rho_bar, c_bar, RULE: tl.constexpr):
    """What a row that receives this state gives."""
    if RULE == "gae":
        b_advantage = b_r + b_x - b_v
        return b_advantage, b_advantage + b_v
    elif RULE == "discounted_returns":
        b_return = tl.fma(gamma, b_x, b_r)
        return b_return, b_return
    elif RULE == "min_gae":
        b_q = minimum(b_r, b_x)
        return b_q - b_v, b_q
    else:
        b_rho, b_factor = minimum(b_ratio, rho_bar), b_decay * minimum(b_ratio, c_bar)
        b_correction = tl.fma(b_factor, b_x - b_value, b_rho * (tl.fma(gamma, b_value, b_r) - b_v))
        return b_v + b_correction, b_rho * (tl.fma(gamma, b_x, b_r) - b_v)


@triton.jit
def end_state(bootstrap, i_s, m_s, gamma, RULE: tl.constexpr):
    """The state behind the last row of a sequence."""
    b_x = (i_s * 0).to(tl.float32)
    if bootstrap is not None:
        b_x = tl.load(bootstrap + i_s, m_s, 0.0)
        if RULE == "gae":
            b_x = gamma * b_x
    elif RULE == "min_gae":
        b_x += float("inf")
    return b_x, b_x


@triton.jit
def owners(
    cu_seqlens,
    firsts,
    o_slot,
    num_tokens,
    num_sequences,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """Of a program's slots: sequences, whether there are such, boundaries, place of the run of ROWS in its sequence."""
    low = tl.load(firsts + tl.program_id(0))
    b_low, b_high = o_slot * 0 + low, o_slot * 0 + tl.minimum(low + SLOTS, num_sequences)
    i_s = sequence_at(cu_seqlens, o_slot, b_low, b_high, HALVINGS, num_tokens, ROWS)
    m_s = i_s < num_sequences
    bos = boundary(cu_seqlens, i_s, m_s, num_tokens)
    eos = boundary(cu_seqlens, i_s + 1, m_s, num_tokens)
    i_run = o_slot - (i_s + bos // ROWS)
    return i_s, m_s & (i_run >= 0), bos, eos, i_run


@triton.jit(
    do_not_specialize=[
        "piece_firsts",
        "group_firsts",
        "broken",
        "num_tokens",
        "num_sequences",
        "num_piece_programs",
        "num_group_programs",
        "num_halvings",
    ]
)
def scan_setup(
    cu_seqlens,  # [S+1]
    piece_firsts,  # [programs of scan_rows]
    group_firsts,  # [programs of scan_groups]
    broken,  # [SETUP_PROGRAMS]: whether the boundaries that each saw are not those of packed sequences
    num_tokens,
    num_sequences,
    num_piece_programs,
    num_group_programs,
    num_halvings,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,  # slots of a program
    GROUPS: tl.constexpr,
    BS: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0) * BS
    b_low = tl.zeros([BS], tl.int64)
    for i in range(i_p * BS, num_piece_programs, stride):
        o = i + tl.arange(0, BS)
        i_s = sequence_at(cu_seqlens, o * PIECES, b_low, b_low + num_sequences, num_halvings, num_tokens, PIECE)
        tl.store(piece_firsts + o, i_s, o < num_piece_programs)
    for i in range(i_p * BS, num_group_programs, stride):
        o = i + tl.arange(0, BS)
        i_s = sequence_at(cu_seqlens, o * GROUPS, b_low, b_low + num_sequences, num_halvings, num_tokens, PIECE * GROUP)
        tl.store(group_firsts + o, i_s, o < num_group_programs)
    b_broken = tl.zeros([BS], tl.int32)
    for i in range(i_p * BS, num_sequences, stride):
        o = i + tl.arange(0, BS)
        m = o < num_sequences
        b_broken |= (tl.load(cu_seqlens + o, m, 0) > tl.load(cu_seqlens + o + 1, m, 0)).to(tl.int32)
    ends = (tl.load(cu_seqlens) != 0) | (tl.load(cu_seqlens + num_sequences) != num_tokens)
    tl.store(broken + i_p, tl.maximum(tl.max(b_broken, 0), ends.to(tl.int32)))


@triton.jit(do_not_specialize=["firsts", "broken", "num_tokens", "num_sequences", "num_maps", "num_states"])
def scan_rows(
    rewards,  # [T]
    values,  # [T] or None
    ratios,  # [T] or None
    mask,  # [T] or None
    bootstrap,  # [S] or None
    lam_per_sequence,  # [S] or None
    result,  # [T]
    more,  # [T] or None, the second result
    cu_seqlens,  # [S+1]
    firsts,
    broken,
    maps,  # [PARTS, pieces]: of each piece; then of it and the pieces behind it in its group
    states,  # [2, groups of long sequences]: what each receives
    num_tokens,
    num_sequences,
    num_maps,
    num_states,
    gamma,
    decay,
    rho_bar,
    c_bar,
    RULE: tl.constexpr,
    PARTS: tl.constexpr,
    JOINING: tl.constexpr,  # False: fold all pieces, finish the last of each sequence; True: finish the others
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    SETUP_PROGRAMS: tl.constexpr,
    BP: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    o_slot = i_p * BP + tl.arange(0, BP)
    i_s, m_s, bos, eos, i_piece = owners(cu_seqlens, firsts, o_slot, num_tokens, num_sequences, PIECE, BP, HALVINGS)
    end = eos - i_piece * PIECE
    begin = tl.maximum(end - PIECE, bos)
    b_x, b_value = end_state(bootstrap, i_s, m_s, gamma, RULE)
    if JOINING:
        if tl.max(tl.load(broken + tl.arange(0, SETUP_PROGRAMS)), 0) != 0:
            o_t = i_p * (BP * PIECE) + tl.arange(0, BP * PIECE)
            tl.store(result + o_t, float("nan"), o_t < num_tokens)
            if more is not None:
                tl.store(more + o_t, float("nan"), o_t < num_tokens)
            return
        m_piece = m_s & (begin < end) & (i_piece > 0)
        if tl.max(m_piece.to(tl.int32), 0) == 0:
            return
        m_far = m_piece & (i_piece >= GROUP)
        o_state = bos // (PIECE * GROUP) + i_piece // GROUP
        b_x = tl.where(m_far, tl.load(states + o_state, m_far, 0.0), b_x)
        if RULE == "vtrace":
            b_value = tl.where(m_far, tl.load(states + num_states + o_state, m_far, 0.0), b_value)
        b_behind = load_map(maps, num_maps, o_slot - 1, m_piece & (i_piece % GROUP > 0), RULE)
        b_x, b_value = applied(b_behind, b_x, b_value, RULE)
    else:
        m_piece = m_s & (begin < end)

    # from the end of the piece on; each lane folds what is behind its row: the map beside it is its successor's
    o_t = (end - 1)[:, None] - tl.arange(0, PIECE)[None, :]  # [BP, PIECE]
    m_t = m_piece[:, None] & (o_t >= begin[:, None])
    m_next = m_t & (o_t + 1 < end[:, None])
    m_out, m_map = m_t, m_next
    if mask is not None:
        m_t = m_t & (tl.load(mask + o_t, m_t, 0) != 0)
        m_map = m_next & (tl.load(mask + o_t + 1, m_next, 0) != 0)
    b_decay = decay
    if lam_per_sequence is not None:
        b_decay = (gamma * tl.load(lam_per_sequence + i_s, m_s, 0.0))[:, None]
    b_r, b_v, b_ratio = load_row(rewards, values, ratios, o_t, m_t)
    b_later_r, b_later_v, b_later_ratio = load_row(rewards, values, ratios, o_t + 1, m_map)
    b_map = row_map(b_later_r, b_later_v, b_later_ratio, m_map, gamma, b_decay, rho_bar, c_bar, RULE)
    b_map = scanned(b_map, 1, RULE)
    if not JOINING:
        b_whole = join(b_map, row_map(b_r, b_v, b_ratio, m_t, gamma, b_decay, rho_bar, c_bar, RULE), RULE)
        m_first = m_out & (o_t == begin[:, None]) & (begin > bos)[:, None]
        store_map(maps, num_maps, o_slot[:, None] + o_t * 0, b_whole, m_first, PARTS)
        m_out = m_out & (i_piece == 0)[:, None]
    b_x, b_value = applied(b_map, b_x[:, None], b_value[:, None], RULE)
    b_result, b_more = row_results(b_r, b_v, b_ratio, b_x, b_value, gamma, b_decay, rho_bar, c_bar, RULE)
    tl.store(result + o_t, tl.where(m_t, b_result, 0.0), m_out)
    if more is not None:
        tl.store(more + o_t, tl.where(m_t, b_more, 0.0), m_out)


@triton.jit(do_not_specialize=["firsts", "num_tokens", "num_sequences", "num_maps"])
def scan_groups(
    cu_seqlens,
    firsts,
    maps,
    num_tokens,
    num_sequences,
    num_maps,
    RULE: tl.constexpr,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    BP: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    o_slot = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    i_s, m_s, bos, eos, i_group = owners(
        cu_seqlens, firsts, o_slot, num_tokens, num_sequences, PIECE * GROUP, BP, HALVINGS
    )
    o_piece = (i_group * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]  # [BP, GROUP]
    m_piece = m_s[:, None] & (o_piece * PIECE + PIECE < (eos - bos)[:, None])  # with rows in front of it
    if tl.max(tl.max(m_piece.to(tl.int32), 1), 0) == 0:
        return
    o_map = (i_s + bos // PIECE)[:, None] + o_piece
    b_map = load_map(maps, num_maps, o_map, m_piece, RULE)
    store_map(maps, num_maps, o_map, scanned(b_map, 1, RULE), m_piece, PARTS)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_maps", "num_states", "num_halvings"])
def scan_states(
    bootstrap,
    cu_seqlens,
    maps,
    states,
    num_tokens,
    num_sequences,
    num_maps,
    num_states,
    num_halvings,
    gamma,
    RULE: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    BG: tl.constexpr,
):
    # a sequence of several groups has a row at a multiple of their length: its first such row names the program
    i_p = tl.program_id(0).to(tl.int64)
    i_s = sequence_at(cu_seqlens, i_p * (PIECE * GROUP), i_p * 0, i_p * 0 + num_sequences, num_halvings, num_tokens, 0)
    m_s = i_s < num_sequences
    bos, eos = boundary(cu_seqlens, i_s, m_s, num_tokens), boundary(cu_seqlens, i_s + 1, m_s, num_tokens)
    num_groups = tl.where(tl.cdiv(bos, PIECE * GROUP) == i_p, tl.cdiv(eos - bos, PIECE * GROUP), 0)
    x, value = end_state(bootstrap, i_s, m_s, gamma, RULE)
    for i_g in range(0, num_groups, BG):
        o_g = i_g + tl.arange(0, BG)
        m_g = (o_g > 0) & (o_g < num_groups)
        o_map = i_s + bos // PIECE + o_g * GROUP - 1  # the piece that holds the map of the group behind
        b_map = scanned(load_map(maps, num_maps, o_map, m_g, RULE), 0, RULE)
        b_x, b_value = applied(b_map, x, value, RULE)
        o_state = bos // (PIECE * GROUP) + o_g
        tl.store(states + o_state, b_x, m_g)
        m_last = tl.arange(0, BG) == BG - 1
        x = tl.sum(tl.where(m_last, b_x, 0.0), 0)
        if RULE == "vtrace":
            tl.store(states + num_states + o_state, b_value, m_g)
            value = tl.sum(tl.where(m_last, b_value, 0.0), 0)


def launch(
    rule: str,
    columns: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    bootstrap: Tensor | None,
    mask: Tensor | None,
    *numbers: float,
    lam_per_sequence: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The results [T] of one of PARTS over its columns. numbers: gamma, gamma lam, rho_bar, c_bar; 1 - lam, lam."""
    rewards, values, ratios = (*columns, None, None)[:3]
    num_tokens, num_sequences = rewards.shape[0], cu_seqlens.shape[0] - 1
    results = tuple(torch.empty_like(x, dtype=torch.float32) for x in columns[:2])
    if num_tokens == 0:
        return results
    num_maps, num_states = num_tokens // PIECE + num_sequences + 1, num_tokens // (PIECE * GROUP) + 1
    programs, group_programs = triton.cdiv(num_maps, ROWS["BP"]), triton.cdiv(num_states + num_sequences, GROUPS["BP"])
    indices = rewards.new_empty(programs + group_programs + SETUP_PROGRAMS, dtype=torch.int64)
    firsts, group_firsts, broken = indices.split([programs, group_programs, SETUP_PROGRAMS])
    maps = rewards.new_empty(PARTS[rule], num_maps, dtype=torch.float32)
    states = rewards.new_empty(2, num_states + 1, dtype=torch.float32)
    sizes, halvings = (num_tokens, num_sequences), num_sequences.bit_length()
    tree = {"PIECE": PIECE, "GROUP": GROUP}
    rows = {"SETUP_PROGRAMS": SETUP_PROGRAMS, "num_warps": WARPS[rule], **tree, **ROWS}
    of_rows = rewards, values, ratios, mask, bootstrap, lam_per_sequence, *(*results, None)[:2], cu_seqlens
    of_rows = *of_rows, firsts, broken, maps, states, *sizes, num_maps, num_states + 1, *(*numbers, 0.0, 0.0)[:4]
    with torch.cuda.device_of(rewards):
        scan_setup[(SETUP_PROGRAMS,)](
            cu_seqlens,
            firsts,
            group_firsts,
            broken,
            *sizes,
            programs,
            group_programs,
            halvings,
            PIECES=ROWS["BP"],
            GROUPS=GROUPS["BP"],
            **tree,
            **SETUP,
        )
        scan_rows[(programs,)](*of_rows, rule, PARTS[rule], False, **rows)
        scan_groups[(group_programs,)](
            *(cu_seqlens, group_firsts, maps, *sizes, num_maps, rule, PARTS[rule]),
            num_warps=WARPS[rule],
            **tree,
            **GROUPS,
        )
        scan_states[(num_states,)](
            bootstrap,
            cu_seqlens,
            maps,
            states,
            *sizes,
            num_maps,
            num_states + 1,
            halvings,
            numbers[0],
            rule,
            **tree,
            **STATES,
        )
        scan_rows[(programs,)](*of_rows, rule, PARTS[rule], True, **rows)
    return results


def register(op, launch) -> None:
    """For CUDA, where the CUDA extension is not there to serve the op, as it does faster."""
    if not has_cuda_kernels:
        op.register_kernel("cuda")(launch)
