from qrm_fast.triton.merge_logprobs import forward

from . import T, fp32


def launches(capability):
    forward(*fp32(4, 8, T))
