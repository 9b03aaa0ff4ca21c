"""The numbers an option may be, written beside it: `lr: NonNegative = 1e-5`."""

import math
from typing import Annotated, Any, NamedTuple, get_type_hints


class Range(NamedTuple):
    low: float
    high: float = math.inf
    open: bool = False  # without its ends

    def __contains__(self, x: object) -> bool:
        assert isinstance(x, int | float)
        return self.low < x < self.high if self.open else self.low <= x <= self.high

    def __repr__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if self.open else 'at least'} {self.low}"
        return f"{'between' if self.open else 'from'} {self.low} {'and' if self.open else 'to'} {self.high}"


Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


def check_ranges(config: Any) -> None:
    """Raise ValueError for a field of a dataclass that is out of the range its annotation gives."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        for range in getattr(hint, "__metadata__", ()):
            if getattr(config, name) not in range:
                raise ValueError(f"{name} must be {range}, got {getattr(config, name)}")
