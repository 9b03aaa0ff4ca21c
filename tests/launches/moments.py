from qrm_fast.triton.moments import launch

from . import MANY, ODD_T, S, T, bf16, flags, fp32, i32, i64


def launches(capability):
    launch(bf16(T), flags(T), i32(S + 1), i32(S))
    launch(bf16(T), flags(T), i32(MANY + 1), i64(MANY))
    launch(fp32(ODD_T), None, None, None)
