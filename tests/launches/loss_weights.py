from qrm_fast.triton.loss_weights import launch

from . import ODD_S, ODD_T, S, T, flags, i32, i64


def launches(capability):
    launch(i32(S + 1), flags(ODD_T), ODD_T, "seq-mean-token-mean", 0.0, 1.0)
    launch(i32(S + 1), flags(T), T, "token-mean", 0.0, 1.0)
    launch(i64(ODD_S + 1), None, ODD_T, "token-mean", 0.0, 1.0)
    launch(i64(ODD_S + 1), None, ODD_T, "seq-mean-token-mean", 0.0, 1.0)
