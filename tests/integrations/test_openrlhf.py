"""OpenRLHF's own functions against ours: `make test-openrlhf` gives them an environment of their own.

OpenRLHF asks for flash-attn, which is built for CUDA alone. Its files are installed without what they depend on, and
the packages that they import but that these functions do not use are stood in for.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

import qrm_fast
from qrm_fast.integrations import padded

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("openrlhf is not installed (make test-openrlhf)", allow_module_level=True)

UNUSED = ["aiohttp", "deepspeed", "flash_attn", "packaging", "pandas", "peft", "pylatexenc", "ray", "torchdata", "tqdm"]
UNUSED += ["transformers", "vllm"]


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any module of an UNUSED package, but not flash-attn's ops: OpenRLHF's own formula is wanted here."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith("flash_attn.ops"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in UNUSED else None

    def create_module(self, spec):
        return MagicMock(__path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(autouse=True, scope="module")
def stand_ins():
    finder = StandIns()
    sys.meta_path.append(finder)
    yield
    sys.meta_path.remove(finder)
    for name in [name for name, module in sys.modules.items() if isinstance(module, MagicMock)]:
        del sys.modules[name]


def batch(seed):
    """Log-probabilities, older ones, advantages, values and a mask with holes; every clip is reached."""
    g = torch.Generator().manual_seed(seed)
    logp, noise, advantages, values = (torch.randn(6, 31, generator=g) for _ in range(4))
    mask = torch.rand(6, 31, generator=g) < 0.6
    mask[:, 20:] &= torch.rand(6, 1, generator=g) < 0.5
    return logp - 2, logp - 2 + 0.5 * noise, advantages, values, mask


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masked", [True, False])
def test_gae(seed, masked):
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    _, _, rewards, values, mask = batch(seed)
    arguments = values, rewards, mask.long() if masked else None, 0.97, 0.9
    for got, want in zip(
        padded.get_advantages_and_returns(*arguments),
        RemoteExperienceMaker.get_advantages_and_returns(None, *arguments),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_from_logits(temperature):
    from openrlhf.models.actor import log_probs_from_logits

    g = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(3, 5, 70, generator=g), torch.randint(70, (3, 5), generator=g)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    got = padded.selective_log_softmax(leaves[0], labels, temperature)
    want = log_probs_from_logits(1.0 * leaves[1], labels, temperature)  # which divides its argument in place
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(got.shape, generator=g)
    grads = [torch.autograd.grad(x, leaf, upstream)[0] for x, leaf in ((got, leaves[0]), (want, leaves[1]))]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "dual_clip"), [("ppo", None), ("ppo", 1.5), ("gspo", None)])
def test_policy_loss(seed, kind, dual_clip):
    from openrlhf.models.loss import PolicyLoss

    logp, old, advantages, _, mask = batch(seed)
    if kind == "gspo":  # theirs differentiates the mean: the same where an answer has one advantage
        advantages = advantages[:, :1].expand_as(logp).contiguous()
    leaves = [logp.clone().requires_grad_() for _ in range(2)]
    theirs = PolicyLoss(0.1, 0.3, dual_clip=dual_clip, policy_loss_type=kind)
    want, *_ = theirs(leaves[0], old, advantages, mask.float())
    cu_seqlens = torch.arange(7) * 31
    options = {"cu_seqlens": cu_seqlens} if kind == "gspo" else {}
    got = qrm_fast.policy_loss(
        leaves[1].flatten(),
        advantages.flatten(),
        old_logprobs=old.flatten(),
        token_weights=qrm_fast.loss_weights(
            cu_seqlens, mask=mask.flatten(), mode="seq-mean-token-mean" if kind == "gspo" else "token-mean"
        ),
        kind=kind,
        clip_low=0.1,
        clip_high=0.3,
        dual_clip=dual_clip,
        **options,
    ).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, leaf)[0] for x, leaf in ((want, leaves[0]), (got, leaves[1]))]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_the_patch_reaches_what_openrlhf_calls():
    import openrlhf.models.actor as actor
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    path = Path(__file__).parents[2] / "examples" / "openrlhf_patch.py"
    spec = importlib.util.spec_from_file_location("openrlhf_patch", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _, _, rewards, values, mask = batch(0)
    maker = object.__new__(RemoteExperienceMaker)
    arguments = values, rewards, mask, 1.0, 0.95
    before = maker.get_advantages_and_returns(*arguments)
    module.patch()
    assert actor.log_probs_from_logits is padded.selective_log_softmax
    for got, want in zip(maker.get_advantages_and_returns(*arguments), before, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    del RemoteExperienceMaker.get_advantages_and_returns
    with pytest.raises(AttributeError, match="get_advantages_and_returns"):
        module.patch()
