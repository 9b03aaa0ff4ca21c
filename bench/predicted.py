"""What the cost model says of the training steps that were measured, from what the machine did at most beside them."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .drawn import GROUP, drawn
from .growth import shape
from .qwen2 import qwen2


class Compared(NamedTuple):
    what: str
    measured: float
    predicted: float


def compared(record: dict) -> Iterator[Compared]:
    """Seconds of each phase of our step, and MiB beside the weights at its peak."""
    from qrm_fast.rl.cost_model import Ceilings, costs, shape_of_policy, work_of
    from qrm_fast.rl.policy import Policy

    sizes = {key: int(value) for key, value in shape(record["case"])[1].items()}
    data = drawn(sizes["num_answers"], sizes["prompt"])
    model, _ = qwen2(sizes["width"], sizes["num_layers"])
    work = work_of(sizes["prompt"], list(map(len, data.answers)), GROUP)
    ceilings = Ceilings(**record["machine"], link=math.inf, network=math.inf, queued=False, source="the record")
    own = record["times"]["qrm_fast"]
    most = math.ceil(work.num_rows / own["details"].get("micro-batches", 1))
    plan = costs(shape_of_policy(Policy(model)), work, ceilings, torch.float32, most_tokens=most)
    yield Compared("sampling, s", own["details"]["sampling, s"], plan.phases["rollout"].seconds)
    yield Compared("update, s", own["details"]["update, s"], plan.phases["update"].seconds)
    yield Compared("step, s", own["median_ms"] / 1e3, plan.step.seconds)
    yield Compared("memory, MiB", own["extra_mib"], (sum(plan.memory.values()) - plan.memory["weights"]) / 2**20)
