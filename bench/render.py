"""Tables from records, printed, or written into README.md and docs.

`<!-- bench: CASE -->` to `<!-- end -->` holds a table per case whose name begins so and per machine;
`<!-- rows: MACHINE; CASE; CASE -->` one table, with a row per case on one machine.
"""

import json
import re
from itertools import groupby

from .provenance import ROOT

COLUMNS = {  # heading: key of a row, how it is written
    "ms": ("median_ms", "{:,.4g}"),
    "GB/s": ("gb_per_s", "{:,.4g}"),
    "GFLOP/s": ("gflop_per_s", "{:,.4g}"),
    "of a copy": ("of_baseline", "{:.1%}"),
    "of the fastest library GEMM": ("of_baseline", "{:.1%}"),
    "extra MiB": ("extra_mib", "{:,.1f}"),
    "error": ("error", "{:.2g}"),
}


def table(records: list[dict]) -> str:
    """Markdown: one table per case with a row per way, and one line of provenance behind those that share it."""
    parts = []
    for made, together in groupby(records, provenance_line):
        parts += [*map(_case, together), made]
    return "\n\n".join(parts)


def _case(record: dict) -> str:
    title = f"`{record['case']}`"
    if "refused" in record:
        return f"{title} refused: {record['refused']}"
    rows = record["times"]
    our_ms = next(iter(rows.values()))["median_ms"]
    # A result with FLOP to its name is measured by them, and stands beside a GEMM; all others stand beside a copy.
    unused = {"GB/s", "of a copy"} if record.get("flops") else {"of the fastest library GEMM"}
    columns = {
        heading: column
        for heading, column in COLUMNS.items()
        if heading not in unused and any(row.get(column[0]) is not None for row in rows.values())
    }
    lines = [["", *columns, "time, ours = 1", "ms, p20 to p80"], ["---"] * (len(columns) + 3)]
    for way, row in rows.items():
        cells = [form.format(row[key]) if row.get(key) is not None else "" for key, form in columns.values()]
        spread = f"{row['p20_ms']:,.4g} to {row['p80_ms']:,.4g}"
        lines.append([way, *cells, f"{row['median_ms'] / our_ms:.3g}", spread])
    absent = [f"{way} ({why})" for way, why in record.get("absent", {}).items()]
    notes = ["", f"Absent: {'; '.join(absent)}."] if absent else []
    return "\n".join([f"{title}:", "", *("| " + " | ".join(cells) + " |" for cells in lines), *notes])


def rows(records: list[dict]) -> str:
    """Markdown: our way of each case beside the fastest other one, and what they all ran on."""
    heading = ["", "ms", "fastest other way", "its ms", "extra MiB", "its extra MiB"]
    heading += ["of the fastest library GEMM (* of a copy)", ""]
    lines = [f"| {' | '.join(heading)} |", f"|{' --- |' * len(heading)}"]
    for record in records:
        ours, *others = ((way, row) for way, row in record["times"].items() if "extra_mib" in row)
        way, other = min((x for x in others if not x[0].startswith("qrm_fast")), key=lambda x: x[1]["median_ms"])
        own = ours[1]
        cells = [f"`{record['case']}`", f"{own['median_ms']:,.4g}", way, f"{other['median_ms']:,.4g}"]
        cells += [f"{own['extra_mib']:,.1f}", f"{other['extra_mib']:,.1f}"]
        cells += [f"{own['of_baseline']:.0%}{'' if record['flops'] else ' *'}", _commit(record["provenance"])]
        lines.append("| " + " | ".join(cells) + " |")
    machines = dict.fromkeys(f"{_machine(r['provenance'])}; {r['provenance']['date']}." for r in records)
    return "\n\n".join(["\n".join(lines), *machines])


def provenance_line(record: dict) -> str:
    made = record["provenance"]
    busy = record.get("other_cpu", 0)
    shared = f"; others took {busy:.0%} of the CPU" if record["device"] == "cpu" and busy > 0.1 else ""
    return f"{_machine(made)}; {_commit(made)}; {made['date']}{shared}."


def _machine(made: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
    return f"{made['hardware']}; {versions}"


def _commit(made: dict) -> str:
    return f"commit {made['commit'][:10]}{' with changes' if made['dirty'] else ''}" if made["commit"] else "no commit"


def into_docs() -> None:
    """Rewrite every marked place from bench/results; a case that nobody measured reads "not measured"."""
    records = [
        r for path in sorted((ROOT / "bench/results").glob("*.json")) for r in json.loads(path.read_text())["records"]
    ]

    def written(match: re.Match) -> str:
        kind, what = match.groups()
        if kind == "bench":
            chosen = [record for record in records if record["case"].startswith(what)]
            text = table(chosen) if chosen else "not measured"
        else:
            machine, *cases = what.split("; ")
            there = [record for record in records if record["provenance"]["hardware"].startswith(machine)]
            chosen = [record for case in cases for record in there if record["case"].startswith(case)]
            text = rows(chosen) if len(chosen) == len(cases) else "not measured"
        return f"<!-- {kind}: {what} -->\n{text}\n<!-- end -->"

    places = re.compile(r"<!-- (bench|rows): (.*?) -->\n.*?<!-- end -->", re.DOTALL)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        path.write_text(places.sub(written, path.read_text()))
