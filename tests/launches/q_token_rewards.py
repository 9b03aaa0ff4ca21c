from qrm_fast.triton.q_token_rewards import launch

from . import ODD_S, ODD_T, S, T, bf16, flags, fp32, fp64, i32, i64


def launches(capability):
    launch(bf16(T), i32(S + 1), fp64(S, 3), flags(T), True, True, fp32(T), fp32(T), 0.1, "k3", 0.1, 1e-6)
    launch(fp32(ODD_T), i64(ODD_S + 1), fp64(1, 3), None, False, True, None, None, 0.1, "abs", 0.1, 1e-6)
