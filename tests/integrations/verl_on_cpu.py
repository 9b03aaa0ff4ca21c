"""verl's FSDP engine on the CPU, world of one: its platform, a tiny model and one mini-batch in verl's layout.

Import it before verl. The benchmark of verl's update uses it, too.
"""

import contextlib
import importlib.util
import math
import os
import tempfile
import types
from pathlib import Path

os.environ.update(VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", HF_HUB_OFFLINE="1")

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class _Cpu(types.ModuleType):
    """torch.cpu with the names of torch.cuda that verl reads."""

    get_rng_state, set_rng_state = staticmethod(torch.get_rng_state), staticmethod(torch.set_rng_state)

    def __getattr__(self, name: str):
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        if name == "mem_get_info":
            return lambda *_: (1 << 34, 1 << 34)
        if name.startswith(("memory_", "max_memory_")):
            return lambda *_: 0
        raise AttributeError(name)


@PlatformRegistry.register(platform="cpu")
class Platform(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = _Cpu("verl_cpu")

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "NO_DEVICES"

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    @contextlib.contextmanager
    def nvtx_range(self, msg):
        yield

    def ray_resource_name(self):
        return "CPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def _nothing(self, *_):
        return None

    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = _nothing


def untouched(module):
    """A second copy of a module of verl, which nothing has changed."""
    spec = importlib.util.spec_from_file_location(f"untouched_{module.__name__.replace('.', '_')}", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def write_model(folder: Path, *, vocab: int, dim: int, layers: int) -> Path:
    """A random Qwen2 and a tokenizer whose words are `w2`, `w3` and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=dim, num_hidden_layers=layers, intermediate_size=11 * dim // 4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        initializer_range=0.05, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


def engine(model: Path, *, fused: str | None, **model_options):
    """verl's engine for a policy, initialised: `fused` is its impl_backend, None for logits."""
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    if not dist.is_initialized():
        store = dist.FileStore(tempfile.mkstemp()[1], 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    float32 = dict(param_dtype="fp32", reduce_dtype="fp32", buffer_dtype="fp32")
    model_options = dict(use_remove_padding=True, enable_gradient_checkpointing=False) | model_options
    built = EngineRegistry.new(
        "language_model",
        "fsdp2",
        HFModelConfig(
            path=str(model), use_fused_kernels=fused is not None, fused_kernel_options={"impl_backend": fused},
            override_config={"attn_implementation": "sdpa"}, **model_options,
        ),
        FSDPEngineConfig(
            forward_only=False, fsdp_size=1, strategy="fsdp2", use_dynamic_bsz=True, use_remove_padding=True,
            max_token_len_per_gpu=1 << 15, infer_max_token_len_per_gpu=1 << 15, model_dtype="fp32",
            mixed_precision=float32, use_torch_compile=False,
        ),
        FSDPOptimizerConfig(lr=1e-3),
        None,
    )  # fmt: skip
    built.initialize()
    return built


def mini_batch(prompt_lens: list[int], response_lens: list[int], vocab: int, *, fused: bool) -> TensorDict:
    """Random answers, log-probabilities and advantages of their tokens, as verl's trainer hands them to its engine."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    generator = torch.Generator().manual_seed(0)
    sizes = list(zip(prompt_lens, response_lens, strict=True))
    ids = [torch.randint(2, vocab, (p + r,), generator=generator) for p, r in sizes]

    def nested(rows: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    ones = nested([torch.ones(r, dtype=torch.long) for _, r in sizes])
    data = TensorDict(
        {
            "input_ids": nested(ids),
            "position_ids": nested([torch.arange(len(row)) for row in ids]),
            "prompts": nested([row[:p] for row, (p, _) in zip(ids, sizes, strict=True)]),
            "responses": nested([row[p:] for row, (p, _) in zip(ids, sizes, strict=True)]),
            "response_mask": ones,
            "loss_mask": ones,
            "old_log_probs": nested([0.3 * torch.randn(r, generator=generator) - math.log(vocab) for _, r in sizes]),
            "advantages": nested([torch.randn(r, generator=generator) for _, r in sizes]),
        },
        batch_size=[len(ids)],
    )
    tu.assign_non_tensor(
        data, use_remove_padding=True, pad_mode=DatasetPadMode.NO_PADDING, use_fused_kernels=fused, compute_loss=True,
        calculate_entropy=True, temperature=0.9, use_dynamic_bsz=True, max_token_len_per_gpu=1 << 15,
        global_batch_size=len(ids),
    )  # fmt: skip
    return data


def actor_config(batch_size: int, **options):
    from verl.workers.config import ActorConfig

    sizes = dict(ppo_mini_batch_size=batch_size, ppo_micro_batch_size_per_gpu=batch_size)
    return ActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, entropy_coeff=0.01, **sizes, **options)
