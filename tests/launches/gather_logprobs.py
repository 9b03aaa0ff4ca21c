from qrm_fast.triton.gather_logprobs import backward, forward

from . import ODD_T, ODD_V, WIDEST_V, T, V, bf16, fp32, i64


def launches(capability):
    plain = 1.0, None, None
    for logits, *options in (
        (bf16(T, V), *plain),
        (bf16(T, WIDEST_V), *plain),
        (fp32(ODD_T, ODD_V), 1.0, fp32(ODD_T), 30.0),
    ):
        rows = logits, i64(len(logits)), *options, -100
        logprobs, *results = forward(*rows)
        backward(logprobs, results[0], *rows, *results)
