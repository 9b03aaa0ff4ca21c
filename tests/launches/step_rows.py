from qrm_fast.triton.step_rows import launch

from . import ODD_K, ODD_S, ODD_T, K, S, T, fp32, fp64, i32, i64


def launches(capability):
    launch(fp64(K), fp64(S), i64(K), i64(S + 1), fp32(T), fp64(2, 3), "nonzero", T, True, False)
    launch(fp64(K), fp64(S), i32(K), i32(S + 1), None, fp64(2, 3), "unbiased", T, False, False)
    launch(fp64(ODD_K), None, i64(ODD_K), i64(ODD_S + 1), None, None, "", ODD_T, False, False)
    launch(fp64(K), fp64(S), i64(K), i64(S + 1), fp32(T), fp64(2, 3), "unbiased", T, False, True)
