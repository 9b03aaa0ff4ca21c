from qrm_fast.triton.gather_logprobs import backward, forward

from . import ODD_T, ODD_V, T, V, bf16, fp32, i64


def launches(capability):
    for logits, *options in (bf16(T, V), 1.0, None, None), (fp32(ODD_T, ODD_V), 1.0, fp32(ODD_T), 30.0):
        rows = logits, i64(len(logits)), *options, -100
        logprobs, *results = forward(*rows)
        backward(logprobs, results[0], *rows, *results)
