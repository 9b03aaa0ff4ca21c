from qrm_fast.triton import linear_policy_loss
from qrm_fast.triton.linear_policy_loss import forward

from . import WIDEST_V, D, S, T, V, bf16, compiled_fold, fp32, i32, i64


def launches(capability):
    def launch(hidden, weight, bias, refs, cu_seqlens, temperature, softcap, kind, entropy_coef):
        rows = len(hidden)
        policy = fp32(rows), fp32(rows), refs, fp32(rows), cu_seqlens
        options = kind, 0.2, 0.28, 3.0, 0.01, "unbiased" if kind == "sapo" else "k3", entropy_coef
        needs = True, True, bias is not None
        forward(hidden, weight, i64(rows), *policy, bias, temperature, None, softcap, -100, *options, *needs)

    launch(bf16(T, 1000), bf16(V, 1000), None, None, None, 1.0, None, "ppo", 0.01)
    if capability != 90:
        launch(bf16(T, D), bf16(V, D), bf16(V), fp32(T), None, 0.7, None, "ppo", 0.01)
        return
    launch(bf16(T, D), bf16(V, D), None, None, None, 1.0, None, "ppo", 0.0)
    launch(bf16(256, D), bf16(WIDEST_V, D), None, None, None, 1.0, None, "ppo", 0.0)
    launch(bf16(T, D), bf16(V, D), None, fp32(T), None, 1.0, None, "sapo", 0.0)
    launch(bf16(4096, D), bf16(V, D), bf16(V), fp32(4096), i32(S + 1), 0.7, 30.0, "gspo", 0.01)  # in one block
    launch(fp32(2001, D), fp32(V, D), fp32(V), fp32(2001), i64(S + 1), 0.7, 30.0, "gspo", 0.01)
    with compiled_fold(linear_policy_loss):
        launch(bf16(4096, D), bf16(V, D), bf16(V), fp32(4096), i32(S + 1), 0.7, 30.0, "gspo", 0.01)
