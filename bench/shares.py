"""What a step of training is made of: the share of its wall time that each op takes, by PyTorch's profiler on a CPU."""

import re
import time
from collections import defaultdict
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

OURS = re.compile(r"qrm_fast(?:::|_)_?(\w+?)(?:_default(?:Backward)?)?$")  # an op, or its gradient
LIBRARIES = {  # what the rest of a step is made of: names of events
    "linear layers": re.compile(r"mkldnn::_linear_pointwise|aten::(addmm|mm|linear)$"),
    "attention": re.compile(r"aten::(_scaled_dot_product_\w+|bmm|baddbmm|_softmax)$"),
    "optimiser": re.compile(r"aten::_fused_adamw_$"),
}
REST = "element-wise operations, Python"


def shares(step: Callable[[], object]) -> dict[str, float]:
    """Of one call: each op of this package, the largest first, then what libraries compute, then all else."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
    ours: dict[str, float] = defaultdict(float)
    theirs = dict.fromkeys(LIBRARIES, 0.0)
    for event in profiled.key_averages():
        own = event.self_cpu_time_total / 1e6 / seconds
        if op := OURS.search(event.key):
            ours[op[1]] += own
        else:
            for name, events in LIBRARIES.items():
                theirs[name] += own if events.match(event.key) else 0.0
    parts = dict(sorted(ours.items(), key=lambda part: -part[1])) | theirs
    return parts | {REST: 1 - sum(parts.values())}


def of_ours(parts: dict[str, float]) -> dict[str, float]:
    """The shares of the ops of this package, of all that `shares` found."""
    return {name: share for name, share in parts.items() if name not in (*LIBRARIES, REST)}
