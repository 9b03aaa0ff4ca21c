"""`python -m qrm_fast.integrations.verl check`: what verl would run of this package, and what is wrong with it."""

import importlib
import os
import sys
import warnings
from importlib.metadata import EntryPoint, entry_points

from ... import doctor
from .hooks import HOOKS

PLUGINS = {  # by name: what `import verl` loads
    "qrm_fast": "qrm_fast.integrations.verl",
    "qrm_fast_gae": "qrm_fast.integrations.verl.gae",
    "qrm_fast_head": "qrm_fast.integrations.verl.head",
}
OPS = ("gae", "linear_logprobs", "min_form_returns", "policy_loss", "process_advantages", "q_token_rewards")


def check() -> int:
    """Print the report; 1 where a plugin does not load or a name of verl has moved, else 0."""
    warnings.filterwarnings("ignore")
    wrong = 0
    for name in ("verl", "qrm_fast", "torch", "triton", "transformers"):
        print(f"{name:<14} {doctor.version(name)}")
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    found: dict[str, EntryPoint] = {point.name: point for point in entry_points(group="verl.plugins")}
    print(f"\nplugins, by VERL_USE_EXTERNAL_PLUGINS={policy}")
    for name, module in PLUGINS.items():
        wanted = policy == "auto" or name in map(str.strip, policy.split(","))
        if name not in found:
            state = f"not installed: pip install qrm_fast, or VERL_USE_EXTERNAL_MODULES={module}"
            wrong = 1
        elif wanted:
            state = _outcome(module)
            wrong |= state != "loaded"
        else:
            state = "off"
        print(f"  {name:<14} {state}")
    print("\nchanges, made when verl imports the module")
    for module, hooks in HOOKS.items():
        state = _outcome(module)
        wrong |= state.startswith("HookMoved")
        print(f"  {module}: {state}")
        for hook in hooks:
            print(f"    {hook.what}")
    print("\nwhat runs, on CPU and on CUDA")
    for served in doctor.served():
        if served.op in OPS:
            print(f"  {served.op:<20} {served.cpu or served.fallback:<32} {served.cuda or served.fallback}")
    return int(wrong)


def _outcome(module: str) -> str:
    """What importing it comes to, in a line."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "loaded"


if __name__ == "__main__":
    if sys.argv[1:] != ["check"]:
        sys.exit("usage: python -m qrm_fast.integrations.verl check")
    sys.exit(check())
