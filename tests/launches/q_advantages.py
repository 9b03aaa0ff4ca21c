from qrm_fast.triton.q_advantages import launch

from . import ODD_S, ODD_T, S, T, bf16, flags, fp32, fp64, i32, i64


def launches(capability):
    def whole(floats, index, rows, sequences):
        q, stats, logprobs = floats(rows), fp64(sequences, 3), fp32(rows)
        tensors = q, q, index(sequences + 1), stats, stats, flags(rows)
        launch(*tensors, 0.5, True, True, True, logprobs, logprobs, 0.1, "k3", 0.1, 1e-6)

    whole(bf16, i32, T, S)
    if capability == 90:
        whole(fp32, i64, ODD_T, ODD_S)
