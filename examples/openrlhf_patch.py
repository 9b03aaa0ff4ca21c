"""OpenRLHF 0.11: its log-probabilities and its GAE replaced in place. Unsupported: OpenRLHF has no registry.

Names are rebound in the process that imports this file, and OpenRLHF computes in Ray workers: give the function to
Ray as `ray.init(runtime_env={"worker_process_setup_hook": "openrlhf_patch.patch"})`. A name that has moved
raises AttributeError. The logits are materialised by OpenRLHF before they arrive, so their memory stays.
"""

from qrm_fast.integrations.padded import get_advantages_and_returns, selective_log_softmax


def patch():
    import openrlhf.models.actor as actor
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    for owner, name, ours in (
        (actor, "log_probs_from_logits", selective_log_softmax),
        (RemoteExperienceMaker, "get_advantages_and_returns", staticmethod(get_advantages_and_returns)),
    ):
        getattr(owner, name)
        setattr(owner, name, ours)
