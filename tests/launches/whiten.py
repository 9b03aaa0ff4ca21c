from qrm_fast.triton.whiten import launch

from . import ODD_T, T, bf16, flags, fp32, fp64


def launches(capability):
    launch(bf16(T), fp64(1, 3), flags(T), True, False, 1e-8)
    launch(fp32(ODD_T), fp64(1, 3), None, False, False, 1e-8)
