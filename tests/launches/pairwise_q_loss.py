from qrm_fast.triton.pairwise_q_loss import backward, forward

from . import ODD_T, S, T, bf16, flags, fp32, i32, i64


def launches(capability):
    for rows in (bf16(T), i32(S + 1), flags(T)), (fp32(ODD_T), i64(S + 1), None):
        loss, margin, _, counts = forward(*rows, 0.1, 0.0)
        backward(loss, margin, *rows, margin, counts, 0.1, 0.0)
