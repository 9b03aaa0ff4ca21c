"""verl 0.9: estimators, losses, a token-level reward manager, a faster GAE and head, by verl's own plugin door.

Three entry points of the group `verl.plugins`, which `import verl` loads: `qrm_fast` (this package) adds names and
changes nothing that works without them; `qrm_fast_gae` and `qrm_fast_head` put our ops behind verl's own names.
`VERL_USE_EXTERNAL_PLUGINS=qrm_fast,qrm_fast_gae` loads those two alone, as verl documents.
`python -m qrm_fast.integrations.verl check` says what is there, and what is wrong with it.
"""

import inspect
from types import ModuleType
from typing import Any

import torch

from .estimators import ESTIMATORS, qrm_gae
from .hooks import HookMoved, after_import, hooked
from .losses import LOSSES

__all__ = ["HookMoved"]

CORE = "verl.trainer.ppo.core_algos"


@after_import(CORE, f"adv_estimator: {', '.join(f.__name__ for f in ESTIMATORS)}")
def _(core_algos: ModuleType) -> None:
    register = hooked(core_algos, "register_adv_est", "name_or_enum")
    hooked(core_algos, "compute_rloo_outcome_advantage", "token_level_rewards response_mask index")
    for estimator in ESTIMATORS:
        register(estimator.__name__)(estimator)


@after_import(CORE, f"policy_loss.loss_mode: {', '.join(LOSSES)}")
def _(core_algos: ModuleType) -> None:
    register = hooked(core_algos, "register_policy_loss", "name")
    taken = "old_log_prob log_prob advantages response_mask loss_agg_mode config rollout_is_weights"
    hooked(core_algos, "compute_policy_loss_vanilla", taken)
    for name, loss in LOSSES.items():
        register(name)(loss)


@after_import("verl.trainer.ppo.ray_trainer", "qrm_gae: compute_advantage hands it the values of the critic")
def _(ray_trainer: ModuleType) -> None:
    theirs = hooked(ray_trainer, "compute_advantage", "data adv_estimator")
    signature = inspect.signature(theirs)

    def compute_advantage(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        if call["adv_estimator"] != "qrm_gae":
            return theirs(*args, **kwargs)
        data, config = call["data"], call["config"]
        if "response_mask" not in data.batch.keys():  # noqa: SIM118  a TensorDict has no `in`
            data.batch["response_mask"] = ray_trainer.compute_response_mask(data)
        rewards, mask = data.batch["token_level_rewards"], data.batch["response_mask"]
        data.batch["advantages"], data.batch["returns"] = qrm_gae(
            rewards, mask, config=config, values=data.batch.get("values", None)
        )
        return data

    ray_trainer.compute_advantage = compute_advantage  # type: ignore[attr-defined]


ENGINE = "verl.workers.engine.fsdp.transformer_impl"


@after_import(ENGINE, "VERL_ENGINE_VENDOR=qrm_fast: an FSDP engine whose head computes response rows alone")
def _(transformer_impl: ModuleType) -> None:
    from .engine import register

    register(transformer_impl)


@after_import(
    "verl.experimental.reward_loop.reward_manager.naive", "reward.reward_manager.name: qrm_token, scores of tokens"
)
def _(naive: ModuleType) -> None:
    hooked(naive.NaiveRewardManager, "__init__", "self config tokenizer compute_score")
    hooked(naive.NaiveRewardManager, "run_single", "self data")
    hooked(naive.NaiveRewardManager, "assemble_rm_scores", "data scores")
    from .reward import TokenRewardManager

    naive.register("qrm_token")(TokenRewardManager)


@after_import("verl.experimental.agent_loop.agent_loop", "qrm_token: an answer may carry a list of scores, [T]")
def _(agent_loop: ModuleType) -> None:
    output = agent_loop.AgentLoopOutput
    theirs = hooked(output, "as_dict", "self")

    def as_dict(self: Any) -> dict[str, Any]:
        scores = self.reward_score
        if not isinstance(scores, list):
            return theirs(self)
        if len(scores) != len(self.response_ids):
            raise ValueError(f"an answer must have a score per token, {len(self.response_ids)}, got {len(scores)}")
        fields = theirs(self.model_copy(update={"reward_score": None}))
        return fields | {"rm_scores": torch.tensor(scores, dtype=torch.float32)}

    output.as_dict = as_dict
