from qrm_fast.triton.min_form_returns import launch

from . import ODD_K, ODD_S, K, S, T, bf16, fp32, i32, i64


def launches(capability):
    launch(fp32(K), i64(K), i32(S + 1), T, "soft", 0.1)
    launch(fp32(ODD_K), i64(ODD_K), i32(ODD_S + 1), T, "sum", 0.1)
    launch(bf16(K), i32(K), i32(S + 1), T, "causal_soft", 0.1)
