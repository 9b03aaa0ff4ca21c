"""The optimiser of every training here: AdamW in float32, clipped gradients, a learning rate set per step."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from .ranks import full


class AdamW:
    """AdamW without weight decay of the parameters that want a gradient, in float32 also where they have fewer bits.

    Such a parameter is the rounding of a float32 master: an update is mostly smaller than half its last bit, and would
    be lost in it.
    """

    def __init__(self, parameters: Iterable[Parameter], *, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [p.detach().float() if p.element_size() < 4 else p for p in self.parameters]
        self._adamw = torch.optim.AdamW(self.masters, lr=0.0, betas=betas, weight_decay=0.0, fused=True)

    def step(self, lr: float, max_grad_norm: float) -> Tensor:
        """One update with gradients scaled down to `max_grad_norm` at most. Returns their norm before, 0-d.

        A norm that is not finite changes no parameter and no moment.
        """
        for p, master in self._rounded():
            master.grad = None if p.grad is None else p.grad.float()
            p.grad = None
        grad_norm = full(torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm))
        for group in self._adamw.param_groups:
            group["lr"] = lr
        # Read by the fused kernel, so that nothing waits for the device.
        setattr(self._adamw, "found_inf", (~grad_norm.isfinite()).float())  # noqa: B010
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for p, master in self._rounded():
                p.copy_(master)
        return grad_norm

    def state_dict(self) -> dict:
        """All that is trained: moments, and the float32 parameters, of which those of fewer bits are the rounding."""
        return {
            "masters": [master.detach() for master in self.masters],
            "moments": [self._moments(master) for master in self.masters],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for p, master, saved in zip(self.parameters, self.masters, state["masters"], strict=True):
            master.copy_(saved)
            p.copy_(master)
        for master, saved in zip(self.masters, state["moments"], strict=True):
            for name, x in self._moments(master).items():
                x.copy_(saved[name])

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """What AdamW keeps of a parameter, zeros before the first gradient."""
        state = self._adamw.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return state

    def _rounded(self) -> list[tuple[Parameter, Tensor]]:
        return [(p, master) for p, master in zip(self.parameters, self.masters, strict=True) if p is not master]


def trapezoid(i: int, num_steps: int, *, warmup: int = 0, decay: float = 0.0) -> float:
    """Share of the peak learning rate at step i: up over `warmup` steps, down to 0 over the last share `decay`."""
    up = (i + 1) / (warmup + 1)
    down = (num_steps - i) / (decay * num_steps) if decay else 1.0
    return min(1.0, up, down)
