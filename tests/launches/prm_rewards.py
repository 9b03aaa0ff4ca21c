from qrm_fast.triton.prm_rewards import launch

from . import ODD_K, K, bf16, fp32


def launches(capability):
    launch(bf16(K, 2))
    launch(fp32(ODD_K, 2))
