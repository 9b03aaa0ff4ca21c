from qrm_fast.triton.linear_q_values import forward

from . import ODD_D, ODD_T, ODD_V, D, T, V, bf16, fp32, i64


def launches(capability):
    def launch(floats, rows, vocab, dim, q_dim, temperature):
        heads = floats(rows, dim), floats(vocab, dim), floats(rows, q_dim), floats(vocab, q_dim)
        forward(*heads, i64(rows), temperature, None, 0.5, -100)

    launch(bf16, T, V, D, 2048, 0.7)
    if capability == 90:
        launch(bf16, T, V, D, 2048, 1.0)
        launch(bf16, ODD_T, ODD_V, ODD_D, ODD_D, 0.7)
        launch(fp32, ODD_T, ODD_V, D, 2048, 0.7)
