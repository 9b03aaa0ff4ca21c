from qrm_fast.triton.value_loss import forward

from . import ODD_T, T, bf16, fp32


def launches(capability):
    forward(bf16(T), fp32(T), bf16(T), fp32(T), 0.2)
    forward(fp32(ODD_T), fp32(ODD_T), None, None, 0.2)
