"""An FSDP engine in which only the rows that predict a response token reach the head."""

from typing import Any

import torch
from torch import Tensor

from .hooks import hooked


def response_rows(micro_batch: Any) -> Tensor | None:
    """[R] int64: of a packed micro-batch the rows that predict a response token; None where it names no responses.

    `input_ids`, `prompts`, `responses` of `micro_batch` are nested, [B, any length]. Sequence b ends at its offset, and
    what predicts a token is the row before it.
    """
    if "responses" not in micro_batch.keys():  # noqa: SIM118  fine-tuning: the loss reads all rows
        return None
    ends, lengths = (micro_batch[name].offsets() for name in ("input_ids", "responses"))
    ends, lengths = ends[1:], lengths.diff()
    starts = ends - 1 - lengths  # [B]
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=ends.device) + (starts - before).repeat_interleave(lengths)


def register(transformer_impl: Any) -> None:
    """Give verl the engine, for VERL_ENGINE_VENDOR=qrm_fast: a vendor's engine outranks the default one."""
    base = transformer_impl.FSDPEngineWithLMHead
    hooked(base, "forward_step", "self micro_batch loss_function forward_only")
    hooked(base, "__init__", "self model_config engine_config")
    hooked(transformer_impl.EngineRegistry, "register", "model_type backend device vendor")

    class ResponseRowsEngine(transformer_impl.FSDPEngineWithLMHead):
        def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
            for name, got, wanted in (
                ("model.use_fused_kernels", model_config.use_fused_kernels, (True,)),
                ("impl_backend", (model_config.fused_kernel_options or {}).get("impl_backend"), ("torch", "triton")),
                ("model.use_remove_padding", model_config.use_remove_padding, (True,)),
                ("ulysses_sequence_parallel_size", engine_config.ulysses_sequence_parallel_size, (1,)),
            ):
                if got not in wanted:
                    expected = " or ".join(map(str, wanted))
                    raise ValueError(f"VERL_ENGINE_VENDOR=qrm_fast needs {name} to be {expected}, got {got}")
            from . import head  # here, for importing it changes verl's head: this engine brings it along

            self.rows_read = head.rows_read
            super().__init__(model_config, engine_config, *args, **kwargs)

        def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
            with self.rows_read(response_rows(micro_batch)):
                return super().forward_step(micro_batch, loss_function, forward_only)

    transformer_impl.EngineRegistry.register(
        model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="qrm_fast"
    )(ResponseRowsEngine)
