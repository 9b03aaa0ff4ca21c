from qrm_fast.triton.clip_delta import launch

from . import ODD_K, ODD_S, K, S, bf16, fp16, fp32, i32, i64


def launches(capability):
    launch(fp32(K), i64(S + 1), 0.1, True, True)
    launch(bf16(ODD_K), i32(ODD_S + 1), 0.1, False, True)
    launch(fp16(K), i64(S + 1), 0.1, True, False)
