"""Tables from records, printed, or written into README.md and docs: `<!-- bench: CASE -->` to `<!-- end -->`."""

import json
import re
from itertools import groupby

from .provenance import ROOT

COLUMNS = {  # heading: key of a row, how it is written
    "ms": ("median_ms", "{:,.4g}"),
    "GB/s": ("gb_per_s", "{:,.4g}"),
    "GFLOP/s": ("gflop_per_s", "{:,.4g}"),
    "of the limit": ("of_limit", "{:.1%}"),
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
    # GB/s say little of a kernel whose limit is counted in FLOP.
    unused = {"GB/s"} if record.get("flops") else set()
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


def provenance_line(record: dict) -> str:
    made = record["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
    commit = (
        f"commit {made['commit'][:10]}{' with changes' if made['dirty'] else ''}" if made["commit"] else "no commit"
    )
    busy = record.get("other_cpu", 0)
    shared = f"; others took {busy:.0%} of the CPU" if record["device"] == "cpu" and busy > 0.1 else ""
    return f"{made['hardware']}; {versions}; {commit}; {made['date']}{shared}."


def into_docs() -> None:
    """Rewrite every marked place from bench/results; a case that nobody measured reads "not measured"."""
    records = [
        r for path in sorted((ROOT / "bench/results").glob("*.json")) for r in json.loads(path.read_text())["records"]
    ]

    def block(match: re.Match) -> str:
        chosen = [record for record in records if record["case"].startswith(match[1])]
        return f"<!-- bench: {match[1]} -->\n{table(chosen) if chosen else 'not measured'}\n<!-- end -->"

    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        path.write_text(re.sub(r"<!-- bench: (.*?) -->\n.*?<!-- end -->", block, path.read_text(), flags=re.DOTALL))
