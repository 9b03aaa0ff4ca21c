"""Whether ours became slower than in other records, of whatever machine: only ratios within a run are compared.

Ours stands beside its run's baseline (a copy, the fastest library GEMM) and beside the fastest rival that both runs
have. Where ours is slower, it is so beside both; where only a copy was faster, it is not.
"""

from .render import grid, is_rival, provenance_line

SLOWER = 1.15  # times as long as before, in these units


def compare(records: list[dict], before: list[dict]) -> tuple[str, bool]:
    """A table of these records, and whether all have figures, one at least also before, and none is slower."""
    known = {record["case"]: record for record in before if "times" in record}
    lines = [["time of ours, before = 1", "beside the baseline", "beside the fastest rival", ""]]
    slower, compared = False, []
    for record in records:
        name, old = f"`{record['case']}`", known.get(record["case"])
        if "refused" in record:
            lines.append([name, "", "", f"refused: {record['refused']}"])
            slower = True
        elif old is None:
            lines.append([name, "", "", "not measured before"])
        else:
            compared.append(old)
            found = slowdowns(record, old)
            worse = min(found.values()) > SLOWER
            slower |= worse
            cells = [f"{found[unit]:.2f}" if unit in found else "" for unit in ("baseline", "rival")]
            lines.append([name, *cells, "slower" if worse else ""])
    runs = dict.fromkeys(f"Before: {provenance_line(old)}" for old in compared)
    return "\n\n".join([grid(lines), *runs]), bool(compared) and not slower


def slowdowns(record: dict, before: dict) -> dict[str, float]:
    """How many times as long as before ours takes, by its baseline and, where both runs have one, by a rival."""
    rivals = [way for way in record["times"] if is_rival(record, way) and way in before["times"]]
    now, then = (_in_units(each, rivals) for each in (record, before))
    return {unit: now[unit] / then[unit] for unit in now}


def _in_units(record: dict, rivals: list[str]) -> dict[str, float]:
    times = record["times"]
    ours = next(iter(times.values()))
    units = {"baseline": 1 / ours["of_baseline"]}
    if rivals:
        units["rival"] = ours["median_ms"] / min(times[way]["median_ms"] for way in rivals)
    return units
