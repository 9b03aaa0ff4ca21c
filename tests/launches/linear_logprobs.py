from qrm_fast.triton.linear_logprobs import forward

from . import ODD_D, ODD_T, ODD_V, D, T, V, bf16, fp32, i64


def launches(capability):
    forward(bf16(T, D), bf16(V, D), i64(T), bf16(V), 0.7, None, None, -100)
    forward(bf16(ODD_T, ODD_D), bf16(ODD_V, ODD_D), i64(ODD_T), None, 1.0, None, None, -100)
    if capability == 90:
        forward(fp32(ODD_T, D), fp32(ODD_V, D), i64(ODD_T), fp32(ODD_V), 1.0, fp32(ODD_T), 30.0, -100)
