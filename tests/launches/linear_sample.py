from qrm_fast.triton import linear_sample
from qrm_fast.triton.linear_sample import forward

from . import ODD_V, D, V, bf16, compiled_fold, fp32, fp64


def launches(capability):
    forward(bf16(512, D), bf16(V, D), fp64(512), bf16(V), 0.7, None, None)
    if capability == 90:
        forward(fp32(37, D), fp32(ODD_V, D), fp64(37), fp32(ODD_V), 1.0, fp32(37), 30.0)
        with compiled_fold(linear_sample):
            forward(bf16(512, D), bf16(V, D), fp64(512), bf16(V), 0.7, None, 30.0)
