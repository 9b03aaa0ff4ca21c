from qrm_fast.triton import discounted_returns, gae, min_gae, vtrace

from . import ODD_S, ODD_T, S, T, bf16, flags, fp16, fp32, i32, i64

COLUMNS = (bf16, i32), (fp16, i64), (fp32, i64)


def launches(capability):
    # a row map is met in every dtype, in each on one architecture
    rows, sequences = (ODD_T, ODD_S) if capability == 80 else (T, S)
    options = fp32(sequences), flags(rows)
    for i, rule in enumerate((gae, discounted_returns, min_gae, vtrace)):
        floats, index = COLUMNS[(i + capability // 10) % 3]
        x, cu_seqlens = floats(rows), index(sequences + 1)
        if rule is gae:
            gae.launch(x, x, cu_seqlens, 1.0, 0.95, fp32(sequences), *options)
        elif rule is discounted_returns:
            discounted_returns.launch(x, cu_seqlens, 0.99, *options)
        elif rule is min_gae:
            min_gae.launch(x, x, cu_seqlens, 0.95, *options)
        else:
            vtrace.launch(x, x, x, cu_seqlens, 0.99, 0.95, 1.0, 1.0, *options)
    if capability == 100:
        gae.launch(fp32(T), fp32(T), i64(S + 1), 1.0, 0.95, None, None, None)
        min_gae.launch(fp32(T), fp32(T), i64(S + 1), 0.95, None, None)
