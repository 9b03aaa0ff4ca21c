from qrm_fast.triton.q_head_advantages import launch

from . import ODD_D, ODD_S, ODD_T, D, S, T, bf16, flags, fp16, fp32, i32, i64


def launches(capability):
    launch(bf16(T, D), bf16(D), i32(S + 1), flags(T), True, True, 0.1, 1e-6)
    launch(fp16(ODD_T, ODD_D), fp16(ODD_D), i32(ODD_S + 1), flags(ODD_T), True, True, 0.1, 1e-6)
    launch(fp32(T, D), fp32(D), i64(S + 1), None, False, False, 0.1, 1e-6)
