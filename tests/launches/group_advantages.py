from qrm_fast.triton.group_advantages import launch

from . import MANY, ODD_S, S, bf16, fp16, fp32, i32, i64


def launches(capability):
    launch(fp32(S), i64(S), None, None, "rloo", 1e-6)
    launch(bf16(MANY), i32(MANY), None, None, "grpo", 1e-6)
    launch(fp32(MANY), i64(MANY), i64(MANY), None, "opo", 1e-6)
    launch(fp32(ODD_S), i32(ODD_S), None, None, "pass_at_k", 1e-6)
    launch(fp16(MANY), i64(MANY), None, fp16(MANY), "remax", 1e-6)
