"""How time and memory grow with one number of a shape: exponents fitted to the records that differ in it alone."""

import math
import re
from typing import NamedTuple


class Sweep(NamedTuple):
    """Records of one op and device, in the order of `over`, the number in which their shapes differ."""

    op: str
    over: str
    sizes: list[int]
    records: list[dict]

    def exponent(self, way: str, key: str) -> float | None:
        """b of the least squares a size^b in logarithms, of `median_ms` or `extra_mib`; None where one is missing."""
        values = [record["times"].get(way, {}).get(key, 0) for record in self.records]
        if min(values) <= 0:
            return None
        x, y = ([math.log(v) for v in each] for each in (self.sizes, values))
        mean_x = sum(x) / len(x)
        slope = sum((a - mean_x) * b for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
        return round(slope, 2) + 0.0  # no -0


def shape(case: str) -> tuple[str, dict[str, str]]:
    """The op and the shape of a case's name: `op[key=value, key=value] device`."""
    op, inside = re.fullmatch(r"(\w+)\[(.*)\] \w+", case).groups()
    return op, dict(re.findall(r"(\w+)=(.*?)(?:, (?=\w+=)|$)", inside))


def fixed(record: dict, over: str = "") -> str:
    """The shape, without the number that a sweep is over."""
    return ", ".join(f"{key} {value}" for key, value in shape(record["case"])[1].items() if key != over)


def sweeps(records: list[dict]) -> list[Sweep]:
    """Every set of three records or more, of one machine, whose shapes differ in one whole number."""
    groups: dict[tuple, list[tuple[int, dict]]] = {}
    for record in records:
        if "times" in record:
            op, sizes = shape(record["case"])
            for over in (key for key, value in sizes.items() if value.isdigit()):
                rest = tuple(item for item in sizes.items() if item[0] != over)
                groups.setdefault((op, over, rest), []).append((int(sizes[over]), record))
    found = []
    for (op, over, _), members in groups.items():
        if len(members) >= 3:
            ordered = sorted(members, key=lambda member: member[0])
            found.append(Sweep(op, over, [size for size, _ in ordered], [record for _, record in ordered]))
    return found
