from qrm_fast.triton.policy_loss import forward, scaled, sequence_log_ratios

from . import ODD_T, S, T, bf16, fp32, i32


def launches(capability):
    options = 0.2, 0.28, 3.0, 0.01
    forward(bf16(T), fp32(T), *(bf16(T),) * 3, fp32(T), None, "ppo", *options, "k3", 0.01)
    forward(fp32(T), fp32(T), *(fp32(T),) * 4, i32(S + 1), "gspo", *options, "k3", 0.01)
    forward(fp32(ODD_T), fp32(ODD_T), *(fp32(ODD_T),) * 3, None, None, "cispo", *options, "k2", 0.01)
    forward(bf16(T), fp32(T), *(bf16(T),) * 3, fp32(T), None, "sapo", *options, "unbiased", 0.01)
    sequence_log_ratios(bf16(T), bf16(T), fp32(T), i32(S + 1))
    scaled(fp32(()), fp32(T), bf16(T))
