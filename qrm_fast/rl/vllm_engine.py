"""Sampling by vLLM in this process, from a copy of the policy's weights (extra `vllm`)."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .attention import without_adapters
from .lora import merged_weights
from .policy import Policy
from .rollout import Rollout, check_finite_logprobs, check_request

LEAST_TEMPERATURE = 0.01  # vLLM raises a lower one to this


class VLLMEngine:
    """Samples from a copy of `policy`, which vLLM runs in this process, up to `max_rows` answers at a time.

    Samples the whole vocabulary at the given temperature, without top-p or top-k, from float32 logits, of which the
    returned log-probabilities are; ids that no token has are not in vLLM's vocabulary. A prompt with its answer has at
    most `max_len` tokens; keys and values take `cache_gib` GiB. After `sync` the weights, with adapters merged, are
    read in place when answers are asked for. On CUDA nothing is kept on the device between two calls, neither keys and
    values nor weights; on a CPU vLLM keeps both.

    Runs in one process. Raises ValueError without vLLM and for a model that vLLM cannot run.
    """

    def __init__(
        self, policy: Policy, stop_ids: Sequence[int], *, max_len: int, max_rows: int = 512, cache_gib: float = 4.0
    ) -> None:
        self.vllm, plain = _import_vllm(), without_adapters(policy.model)
        self.stop_ids, self.max_len, self.sleeps = list(stop_ids), max_len, plain.device.type == "cuda"
        with TemporaryDirectory() as folder, _of_vllm(type(plain).__name__):
            plain.config.save_pretrained(folder)
            self.llm = self.vllm.LLM(
                folder,
                hf_overrides=dict(
                    architectures=[type(plain).__name__], vocab_size=len(policy.head().weight), head_dtype="float32"
                ),
                load_format="dummy",
                generation_config="vllm",  # its own, in which nothing stops an answer or shapes the distribution
                skip_tokenizer_init=True,
                dtype=str(plain.dtype).removeprefix("torch."),
                max_model_len=max_len,
                max_num_seqs=max_rows,
                block_size=32,  # whole blocks of a prompt are read once for all its answers
                kv_cache_memory_bytes=int(cache_gib * 2**30),
                gpu_memory_utilization=0.01,  # must be free at the start; the cache has the size above
                logprobs_mode="processed_logprobs",
                enforce_eager=not self.sleeps,
                enable_sleep_mode=self.sleeps,
            )
            self.names = set(self.llm.apply_model(_names)[0])
            self.sync(policy)
            self._read_weights()

    def sync(self, policy: Policy) -> None:
        self.policy, self.current = policy, False

    def generate(
        self, prompts: list[list[int]], *, num_samples: int = 1, max_new_tokens: int, temperature: float, seed: int
    ) -> Rollout:
        """Temperature 0 takes the argmax, with log-probability 0.

        Raises ValueError for no prompt, an empty prompt, one of more than max_len - max_new_tokens tokens, a
        temperature that is negative or above 0 and below 0.01, num_samples or max_new_tokens < 1, FloatingPointError
        for a model whose logits are not finite.
        """
        check_request(prompts, num_samples, max_new_tokens, temperature)
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"vLLM samples at temperature 0 or {LEAST_TEMPERATURE} and above, got {temperature}")
        longest = max(map(len, prompts)) + max_new_tokens
        if longest > self.max_len:
            raise ValueError(f"a prompt with its answer must have at most {self.max_len} tokens, got {longest}")
        draw = Random(seed)
        requests = [dict(prompt_token_ids=prompt) for prompt in prompts for _ in range(num_samples)]
        options = [
            self.vllm.SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                stop_token_ids=self.stop_ids,
                seed=draw.getrandbits(63),
                logprobs=0,  # of the sampled token alone
                flat_logprobs=True,
                detokenize=False,
            )
            for _ in requests
        ]
        with self._awake():
            answers = [x.outputs[0] for x in self.llm.generate(requests, options, use_tqdm=False)]
        responses = [list(answer.token_ids) for answer in answers]
        rows = [x for answer in answers for x in answer.logprobs.logprobs]
        logprobs = torch.tensor(rows, device=self.policy.model.device)
        check_finite_logprobs(logprobs, self.policy)
        if temperature == 0:
            logprobs.zero_()
        finished = [response[-1] in self.stop_ids for response in responses]
        return Rollout(responses, list(logprobs.split(list(map(len, responses)))), finished)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """With the weights of the policy, and without keys and values of any prompt: what a batch is made of, and so
        the bits of its answers, does not depend on what was asked before."""
        if self.sleeps:
            self.llm.wake_up()
        if not self.current:
            self._read_weights()
        self.llm.reset_prefix_cache()
        try:
            yield
        finally:
            if self.sleeps:
                self.llm.sleep(level=2)
                self.current = False

    def _read_weights(self) -> None:
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=self._weights()))
        self.current = True

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and weights as a checkpoint has them, without the rows of ids that no token has."""
        plain, head = without_adapters(self.policy.model), self.policy.head()
        tables = {x.data_ptr() for x in (plain.get_input_embeddings().weight, head.weight, head.bias) if x is not None}
        given: set[int] = set()
        for name, x in merged_weights(self.policy.model):
            if x.data_ptr() in tables:
                if x.data_ptr() in given and name not in self.names:
                    continue  # the head of a family whose embedding is the head, to vLLM
                given.add(x.data_ptr())
                x = x[: len(head.weight)]
            yield name, x


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


@contextmanager
def _of_vllm(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{name} cannot be run by vLLM ({said})") from error


def _import_vllm() -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise ValueError(
            f"the engine \"vllm\" needs the package vllm, pip install 'qrm_fast[vllm]', got {error}"
        ) from error
    return vllm
