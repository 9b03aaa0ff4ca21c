from qrm_fast.triton.process_diagnostics import launch

from . import ODD_K, ODD_S, K, S, T, bf16, fp32, i32, i64


def launches(capability):
    launch(bf16(K), i32(K), i32(S + 1), 0.1, 100, fp32(T))
    launch(fp32(ODD_K), i64(ODD_K), i64(ODD_S + 1), 0.1, 100, None)
