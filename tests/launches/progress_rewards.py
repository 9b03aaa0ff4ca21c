from qrm_fast.triton.progress_rewards import launch

from . import ODD_K, ODD_S, K, S, bf16, fp32, i32, i64


def launches(capability):
    launch(bf16(K), bf16(S), i32(S + 1), 5.0)
    launch(fp32(ODD_K), fp32(ODD_S), i64(ODD_S + 1), 5.0)
