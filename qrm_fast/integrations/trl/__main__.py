"""`python -m qrm_fast.integrations.trl check`: versions, hooks, and what TRL would run of this package."""

import sys

from ... import doctor
from ...rl.attention import flash_attn_varlen_func
from .hooks import HOOKS, SUPPORTED, Moved, find_hook


def check() -> int:
    """Print versions, hooks and what would run; 1 where a hook has moved."""
    versions = {name: doctor.version(name) for name in ("qrm_fast", "trl", "transformers", "torch", "peft")}
    print(", ".join(f"{name} {version or 'absent'}" for name, version in versions.items()), f"(trl {SUPPORTED} needed)")
    moved = 0
    for name in HOOKS:
        try:
            find_hook(name)
            print(f"found  {name}")
        except Moved as error:
            moved = 1
            print(f"moved  {error}")
    own = "flash_attn" if flash_attn_varlen_func is not None else "torch's varlen_attn"
    print(f"packed attention: {own} for 16-bit models on CUDA, SDPA per run of equal lengths elsewhere")
    served = next(row for row in doctor.served() if row.op == "linear_logprobs")
    print(f"head: {served.cpu} on the CPU, {served.cuda or served.fallback} on CUDA")
    return moved


if __name__ == "__main__":
    if sys.argv[1:] != ["check"]:
        sys.exit("usage: python -m qrm_fast.integrations.trl check")
    sys.exit(check())
