"""`gae` in the place of verl's loop over columns: the plugin `qrm_fast_gae`."""

from types import ModuleType

from ..padded import compute_gae_advantage_return
from .hooks import after_import, hooked


@after_import("verl.trainer.ppo.core_algos", "compute_gae_advantage_return by one reverse scan")
def _(core_algos: ModuleType) -> None:
    name = "compute_gae_advantage_return"
    hooked(core_algos, name, "token_level_rewards values response_mask gamma lam")
    setattr(core_algos, name, compute_gae_advantage_return)
    core_algos.ADV_ESTIMATOR_REGISTRY["gae"] = compute_gae_advantage_return  # type: ignore[attr-defined]
