from qrm_fast.triton.informative_groups import launch

from . import MANY, ODD_S, bf16, fp32, i32, i64


def launches(capability):
    launch(fp32(ODD_S), i64(ODD_S))
    launch(bf16(MANY), i32(MANY))
