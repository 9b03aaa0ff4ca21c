from qrm_fast.triton.token_q import backward, forward

from . import ODD_D, ODD_T, D, T, V, bf16, fp32, i64


def launches(capability):
    floats = fp32 if capability == 80 else bf16
    gathered = floats(T, D), floats(V, D), i64(T), floats(V), floats(D)
    scalar = fp32(ODD_T, ODD_D), fp32(1, ODD_D), None, None, None
    for hidden, head, targets, bias, norm_weight in gathered, scalar:
        q = forward(hidden, head, targets, bias, norm_weight, 1e-6)
        backward(q, hidden, head, targets, norm_weight, 1e-6, True, True, True, norm_weight is not None)
