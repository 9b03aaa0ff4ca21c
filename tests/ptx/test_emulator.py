"""The emulator by itself: small kernels that are right run, and each of their mutants is caught for what it is."""

import struct

import pytest
import torch

from ptx import emulator
from ptx.emulator import Fault, Kernel

SEEDS = range(12)


def run(
    body: str, *tensors: torch.Tensor, grid: int = 1, threads: int = 64, shared: int = 0, seeds=SEEDS, cluster: int = 1
) -> set[bytes]:
    """Runs the kernel on fresh copies under each seed; the bytes that the first tensor then holds."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(tensors)))
    loads = "".join(f"ld.param.u64 %a{i}, [p{i}];\n" for i in range(len(tensors)))
    text = f"""
        .version 8.7
        .target sm_90a
        .extern .shared .align 16 .b8 memory[];
        .visible .entry kernel({parameters})
        {{
            .reg .pred %p<10>;
            .reg .b32 %r<30>;
            .reg .f32 %f<10>;
            .reg .b64 %a<10>;
            {loads}
            mov.u32 %r0, %tid.x;
            mov.u32 %r1, %ctaid.x;
            {body}
            ret;
        }}"""
    kernel, found = Kernel(text, "kernel"), set()
    for seed in seeds:
        own = [x.clone() for x in tensors]
        parameters = kernel.pack(struct.pack("<Q", x.data_ptr()) for x in own)
        kernel.run(parameters, (grid, 1, 1), threads, shared, own, seed, cluster=cluster)
        found.add(own[0].numpy().tobytes())
    return found


def check(
    body: str, *tensors: torch.Tensor, expected: list[int], mutants: dict[tuple[str, str], str], **options
) -> None:
    """The body gives `expected` under every seed; with one piece replaced by another, the emulator complains."""
    assert run(body, *tensors, **options) == {torch.tensor(expected, dtype=torch.int32).numpy().tobytes()}
    for (good, bad), complaint in mutants.items():
        assert good in body
        with pytest.raises(Fault, match=complaint):
            run(body.replace(good, bad), *tensors, **options)


def zeros(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32)


NEIGHBOURS = """
    shl.b32 %r2, %r0, 2;
    mov.b32 %r3, memory;
    add.s32 %r4, %r3, %r2;
    st.shared.b32 [%r4], %r0;
    bar.sync 0;
    xor.b32 %r5, %r4, 128;          // the same lane of the other warp
    ld.shared.b32 %r6, [%r5];
    mul.wide.u32 %a1, %r0, 4;
    add.s64 %a2, %a0, %a1;
    st.global.b32 [%a2], %r6;
"""


def test_threads_exchange_through_shared_memory():
    expected = [*range(32, 64), *range(32)]
    mutants = {
        ("bar.sync 0;", ""): "race in shared memory: read of what another warp wrote|write of what another warp reads",
        ("[%a2], %r6", "[%a2+4], %r6"): "global access outside every tensor",
        ("[%a2], %r6", "[%a2+2], %r6"): "outside every tensor|misaligned access of 4 bytes",
        ("ld.shared.b32 %r6, [%r5]", "ld.shared.b32 %r6, [%r5+256]"): "shared access outside",
        ("ld.shared.b32 %r6, [%r5]", "ld.shared.v2.b32 {%r6, %r7}, [%r5]"): "misaligned access of 8 bytes",
    }
    check(NEIGHBOURS, zeros(64), expected=expected, mutants=mutants, shared=256)


def test_a_second_round_may_not_overtake_the_first():
    """Twice through the same shared memory: the barrier behind the reads is needed as well."""
    again = NEIGHBOURS + "bar.sync 0;" + NEIGHBOURS.replace("[%r4], %r0", "[%r4], %r6")
    check(again, zeros(64), expected=list(range(64)), mutants={}, shared=256)
    with pytest.raises(Fault, match="race in shared memory"):
        run(
            again.replace("st.global.b32 [%a2], %r6;\nbar.sync 0;", "st.global.b32 [%a2], %r6;\n"),
            zeros(64),
            shared=256,
        )


TICKETS = """
    setp.ne.s32 %p0, %r0, 0;
    @%p0 bra done;
    atom.global.add.u32 %r2, [%a1], 1;      // the block's place
    setp.eq.s32 %p1, %r2, 0;
    mov.b32 %r5, 0;
    @%p1 bra add;
    sub.s32 %r3, %r2, 1;                    // whom it waits for
    mul.wide.s32 %a3, %r3, 4;
    add.s64 %a4, %a2, %a3;
wait:
    ld.acquire.gpu.b32 %r4, [%a4];
    setp.eq.s32 %p2, %r4, 0;
    @%p2 bra wait;
    add.s64 %a5, %a0, %a3;
    ld.global.b32 %r5, [%a5];
add:
    add.s32 %r6, %r5, %r2;
    mul.wide.s32 %a6, %r2, 4;
    add.s64 %a7, %a0, %a6;
    st.global.b32 [%a7], %r6;
    add.s64 %a8, %a2, %a6;
    st.release.gpu.b32 [%a8], 1;
done:
"""


def test_blocks_wait_for_each_other_in_the_order_of_their_tickets():
    """More blocks than are in flight: who waits for a later ticket waits for ever."""
    mutants = {
        ("st.release.gpu.b32", "st.global.b32"): "race in global memory: read of what another block wrote",
        ("ld.acquire.gpu.b32", "ld.global.b32"): "race in global memory",
        ("@%p2 bra wait;", ""): "race in global memory",
        ("atom.global.add.u32 %r2, [%a1], 1;", "ld.global.b32 %r2, [%a1];"): "race in global memory: two blocks write",
    }
    sums = [i * (i + 1) // 2 for i in range(16)]
    check(TICKETS, zeros(16), zeros(1), zeros(16), expected=sums, mutants=mutants, grid=16, threads=32)
    reversed_tickets = TICKETS.replace("setp.eq.s32 %p1, %r2, 0;", "setp.eq.s32 %p1, %r2, 15;")
    reversed_tickets = reversed_tickets.replace("sub.s32 %r3, %r2, 1;", "add.s32 %r3, %r2, 1;")
    with pytest.raises(Fault, match="hang: all warps compute and read"):
        run(reversed_tickets, zeros(16), zeros(1), zeros(16), grid=16, threads=32, seeds=range(1))


LAST = """
    mul.wide.u32 %a2, %r1, 4;
    add.s64 %a3, %a0, %a2;
    setp.ne.s32 %p0, %r0, 32;               // the second warp writes, the first one tells
    @%p0 bra written;
    st.global.b32 [%a3], %r1;
written:
    bar.sync 0;
    setp.ne.s32 %p1, %r0, 0;
    mov.b32 %r3, memory;
    @%p1 bra told;
    atom.global.gpu.acq_rel.add.u32 %r2, [%a1], 1;
    st.shared.b32 [%r3], %r2;
told:
    bar.sync 0;
    ld.shared.b32 %r4, [%r3];
    setp.ne.s32 %p2, %r4, 7;
    @%p2 bra done;
    ld.global.b32 %r5, [%a0+4];
    ld.global.b32 %r6, [%a0+24];
    bar.sync 0;
    add.s32 %r7, %r5, %r6;
    setp.eq.s32 %p3, %r0, 0;
    @%p3 st.global.b32 [%a0], %r7;
done:
"""


def test_the_last_block_reads_what_the_others_wrote():
    mutants = {
        ("gpu.acq_rel.add", "gpu.relaxed.add"): "race in global memory",
        ("written:\n    bar.sync 0;", "written:"): "race in global memory",
    }
    check(LAST, zeros(8), zeros(1), expected=[7, *range(1, 8)], mutants=mutants, grid=8, shared=4)


COPIES = """
    shl.b32 %r2, %r0, 4;
    mov.b32 %r3, memory;
    add.s32 %r4, %r3, %r2;
    mul.wide.u32 %a2, %r0, 16;
    add.s64 %a3, %a1, %a2;
    cp.async.cg.shared.global [%r4], [%a3], 16, 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r5, %r4, 512;
    ld.shared.b32 %r6, [%r5];
    mul.wide.u32 %a4, %r0, 4;
    add.s64 %a5, %a0, %a4;
    st.global.b32 [%a5], %r6;
"""


def test_asynchronous_copies_are_waited_for():
    mutants = {
        ("wait_group 0", "wait_group 1"): "read of shared memory that a copy in flight writes",
        ("bar.sync 0;", ""): "race in shared memory|copy in flight",
        ("[%a3], 16, 16", "[%a3+8], 16, 16"): "misaligned|outside",
    }
    values = torch.arange(256, dtype=torch.int32)
    expected = [4 * (i ^ 32) for i in range(64)]
    check(COPIES, zeros(64), values, expected=expected, mutants=mutants, shared=1024)


MEETING = """
    mov.b32 %r2, memory;
    mov.u32 %r3, %cluster_ctarank;
    mov.u32 %r4, %cluster_nctarank;
    setp.ne.s32 %p0, %r0, 0;
    @%p0 bra ready;
    mbarrier.init.shared::cta.b64 [%r2], 2;     // one arrival of each block
    fence.mbarrier_init.release.cluster;
ready:
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
    setp.ge.u32 %p1, %r0, %r4;
    @%p1 bra wait;
    mapa.shared::cluster.u32 %r5, %r2, %r0;     // thread k arrives in block k
    mbarrier.arrive.shared::cluster.b64 _, [%r5];
wait:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
    @!%p2 bra wait;
    shl.b32 %r6, %r4, 4;
    add.s32 %r7, %r6, %r3;
    mul.wide.u32 %a1, %r1, 4;
    add.s64 %a2, %a0, %a1;
    @!%p0 st.global.b32 [%a2], %r7;
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
"""


def test_blocks_of_a_cluster_meet_at_each_others_barriers():
    nobody_waits = MEETING[MEETING.index("wait:\n") :]
    barrier = "barrier.cluster.arrive.release;\n    barrier.cluster.wait.acquire;\n"
    mutants = {
        ("[%r2], 2;", "[%r2], 1;"): "hang|more arrivals|block ends while another|has ended",
        ("[%r2], 2;", "[%r2], 3;"): "hang",
        ("fence.mbarrier_init.release.cluster;", ""): "not published",
        (nobody_waits, "wait:\n"): "has ended|block ends while another",
        (f"ready:\n    {barrier}", "ready:"): "not initialised|not published|initialised yet",
        ("mapa.shared::cluster.u32 %r5, %r2, %r0;", "mapa.shared::cluster.u32 %r5, %r2, 2;"): "cluster does not have",
        ("%r7;\n    barrier.cluster.arrive.release;", "%r7;"): "without having arrived",
        (
            f"{barrier}    setp.ge",
            "barrier.cluster.arrive.release;\n    setp.ge",
        ): "work between a cluster barrier's arrival",
    }
    options = {"grid": 4, "cluster": 2, "shared": 8}
    check(MEETING, zeros(4), expected=[32, 33, 32, 33], mutants=mutants, **options)
    with pytest.raises(Fault, match="no multiple of its clusters"):
        run(MEETING, zeros(4), grid=3, cluster=2, shared=8)


REGISTERS = """
    setp.ge.s32 %p0, %r0, 128;
    @%p0 bra many;
    setmaxnreg.dec.sync.aligned.u32 24;
    bra done;
many:
    setmaxnreg.inc.sync.aligned.u32 240;
done:
    @!%p0 st.global.b32 [%a0], 1;
"""


def test_registers_change_hands():
    mutants = {
        ("u32 240", "u32 248"): "registers that nobody gives up",
        ("u32 24;", "u32 32;"): "registers that nobody gives up",
        ("%r0, 128", "%r0, 64"): "warps of a group of four ask for different",
        ("u32 240", "u32 244"): "a number of registers that is not known",
    }
    check(REGISTERS, zeros(1), expected=[1], mutants=mutants, threads=384)


DIVERGED = """
    setp.lt.s32 %p0, %r0, 16;
    @%p0 bra low;
    add.s32 %r2, %r0, 100;
    bra met;
low:
    add.s32 %r2, %r0, 200;
met:
    shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;
    mul.wide.u32 %a1, %r0, 4;
    add.s64 %a2, %a0, %a1;
    st.global.b32 [%a2], %r3;
"""


def test_lanes_meet_at_shuffles_and_threads_at_barriers():
    expected = [*range(116, 132), *range(200, 216)]
    mutants = {
        ("bra met;", "bra out;"): "deadlock: lanes of a warp wait|not all lanes",
        ("bra met;", "bar.sync 0;\nbra met;"): "deadlock",
    }
    body = DIVERGED + "out:\n"
    check(body, zeros(32), expected=expected, mutants=mutants, threads=32)


BITS = """
    and.b32 %r2, %r0, 1;
    setp.eq.s32 %p0, %r2, 1;
    vote.sync.ballot.b32 %r3, %p0, -1;      // 0xaaaaaaaa
    bfi.b32 %r4, %r0, %r3, 4, 8;
    popc.b32 %r5, %r4;
    mov.b64 %a1, {%r4, %r5};
    bfi.b64 %a2, %a1, 0, 32, 32;
    shr.u64 %a3, %a2, 32;
    cvt.u32.u64 %r6, %a3;
    add.s32 %r7, %r5, %r6;
    mul.wide.u32 %a4, %r0, 4;
    add.s64 %a5, %a0, %a4;
    st.global.b32 [%a5], %r7;
"""


def test_lanes_vote_and_bits_are_inserted_and_counted():
    words = [0xAAAAAAAA & ~0xFF0 | lane << 4 for lane in range(32)]
    expected = [(word.bit_count() + word) & 0xFFFFFFFF for word in words]
    signed = [x - (1 << 32) if x >> 31 else x for x in expected]
    check(BITS, zeros(32), expected=signed, mutants={}, threads=32)


def test_the_larger_of_two_is_not_a_number_where_one_is_not():
    body = """
        mov.b32 %f0, 0f7FC00000;
        mov.b32 %f1, 0f3F800000;
        max.NaN.f32 %f2, %f1, %f0;
        max.f32 %f3, %f1, %f0;
        setp.nan.f32 %p0, %f2, %f2;
        selp.b32 %r2, 1, 0, %p0;
        mov.b32 %r3, %f3;
        shl.b32 %r3, %r3, 1;
        add.s32 %r4, %r2, %r3;
        mul.wide.u32 %a1, %r0, 4;
        add.s64 %a2, %a0, %a1;
        st.global.b32 [%a2], %r4;
    """
    check(body, zeros(32), expected=[(2 * 0x3F800000 | 1)] * 32, mutants={}, threads=32)


@pytest.mark.parametrize(
    "statement",
    [
        "frobnicate.b32 %r2, %r3;",
        "add.sat.s32 %r2, %r2, %r0;",
        "ld.global.volatile.b32 %r2, [%a0];",
        "bar.sync 1;",
        "shfl.sync.bfly.b32 %r3, %r2, 16, 31, 255;",
        "vote.sync.ballot.b32 %r3, %p0, 255;",
        "popc.b64 %r3, %a0;",
        "bfi.s32 %r3, %r2, %r0, 8, 8;",
        "mov.u32 %r2, %clock;",
        "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%f0, %f1, %f2, %f3}, %a0, %a0, 1, 1, 1;",
        "call f;",
        "barrier.cluster.arrive.relaxed;",
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];",
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p0, [%r2], 0;",
        "mapa.u64 %a1, %a0, 0;",
        "ld.shared::cluster.b32 %r2, [%r3];",
    ],
)
def test_what_is_not_known_is_an_error(statement):
    with pytest.raises(Fault, match=r"not known|unknown"):
        run(statement, zeros(32), threads=32)


def bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


@pytest.mark.parametrize(
    "statement, expected",
    [
        ("mov.b32 %r2, -7; shr.s32 %r3, %r2, 1;", -4),
        ("mov.b32 %r2, -7; shr.u32 %r3, %r2, 28;", 15),
        ("mov.b32 %r2, -7; div.s32 %r3, %r2, 2;", -3),
        ("mov.b32 %r2, 0x4321; prmt.b32 %r3, %r2, 0, 0x7701U;", 0x2143),
        ("mov.b32 %r2, 12; bfe.s32 %r3, %r2, 2, 2;", -1),
        ("mov.b32 %r2, 0f40600000; cvt.rzi.s32.f32 %r3, %r2;", 3),
        ("mov.b32 %r2, 0f7FC00000; max.f32 %r3, %r2, 0f3F800000;", bits(1.0)),
        ("mov.b32 %r2, 0f3F808000; cvt.rn.bf16x2.f32 %r3, %r2, %r2;", 0x3F803F80),  # to even
        ("mov.b32 %r2, 0f00000001; abs.ftz.f32 %r3, %r2;", 0),
        ("mul.f32 %f0, 0f3F800001, 0f3F800001; sub.f32 %r3, %f0, 0f3F800002;", bits(2.0**-46)),  # contracted
        ("mul.rn.f32 %f0, 0f3F800001, 0f3F800001; sub.f32 %r3, %f0, 0f3F800002;", 0),
    ],
)
def test_arithmetic(statement, expected):
    body = f"{statement}\nst.global.b32 [%a0], %r3;"
    assert run(body, zeros(1), threads=32, seeds=[0]) == {struct.pack("<i", expected)}


def test_a_folder_that_another_process_has_compiled_meanwhile_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(emulator, "BUILD", tmp_path)

    def compile_to(path):
        for folder in (path, path.with_name(path.name.partition("-")[2])):  # the other process's
            folder.mkdir()
            (folder / "kernels.ptx").touch()

    assert list(tmp_path.iterdir()) == [emulator.compiled("kernels.built", [], compile_to)]
