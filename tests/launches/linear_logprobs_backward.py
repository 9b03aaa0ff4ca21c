from qrm_fast.triton.linear_logprobs_backward import backward

from . import ODD_T, D, T, V, bf16, fp32, i64


def launches(capability):
    def launch(hidden, weight, bias, softcap, need_hidden, need_bias):
        upstream, results = (fp32(len(hidden)),) * 2, (fp32(len(hidden)),) * 3
        head = hidden, weight, i64(len(hidden)), bias, 0.7, None, softcap
        backward(*upstream, *head, -100, *results, need_hidden, True, need_bias)

    launch(bf16(T, D), bf16(V, D), bf16(V), None, capability == 90, False)
    if capability == 90:
        launch(bf16(T, D), bf16(V, D), bf16(V), 30.0, True, True)
        launch(fp32(T + ODD_T, D), fp32(V, D), fp32(V), 30.0, False, True)
