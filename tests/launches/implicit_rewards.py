from qrm_fast.triton.implicit_rewards import launch

from . import ODD_T, T, bf16, fp32


def launches(capability):
    launch(bf16(T), bf16(T), 0.05)
    launch(fp32(ODD_T), fp32(ODD_T), 0.05)
