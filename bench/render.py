"""Markdown from records, printed, or written with pictures into README.md and docs, at marks that `<!-- end -->` ends.

`<!-- bench: CASE -->` a table per case whose name begins so and per machine, with a row for every way;
`<!-- rows: CASE; CASE -->` one table with a row per case, ours beside the fastest other way;
`<!-- growth -->` one table of fitted exponents; `<!-- cost model -->` one of its figures beside measured ones;
`<!-- shares: CASE -->` one table of what the parts of our time take, a column per case;
`<!-- picture: KIND -->` a picture per machine (bench/pictures.py).
`rows` and `picture` take `on MACHINE` last, for the records of one machine alone.
"""

import json
import os
import re
from itertools import groupby
from pathlib import Path

from .growth import fixed, shape, sweeps
from .predicted import compared
from .provenance import ROOT
from .shares import of_ours

COLUMNS = {  # heading: key of a row, how it is written
    "ms": ("median_ms", "{:,.4g}"),
    "GB/s": ("gb_per_s", "{:,.4g}"),
    "GFLOP/s": ("gflop_per_s", "{:,.4g}"),
    "of a copy": ("of_baseline", "{:.1%}"),
    "of the fastest library GEMM": ("of_baseline", "{:.1%}"),
    "extra MiB": ("extra_mib", "{:,.1f}"),
    "error": ("error", "{:.2g}"),
}


def grid(lines: list[list[str]]) -> str:
    """A Markdown table; the first line is its heading."""
    heading, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([heading, f"|{' --- |' * len(lines[0])}", *rest])


def is_rival(record: dict, way: str) -> bool:
    """Whether this is another's way to the same result, and no baseline."""
    return "extra_mib" in record["times"][way] and not way.startswith(("qrm_fast", "copy"))


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
    details = list(dict.fromkeys(heading for row in rows.values() for heading in row.get("details", {})))
    lines = [["", *columns, *details, "time, ours = 1", "ms, p20 to p80"]]
    for way, row in rows.items():
        cells = [form.format(row[key]) if row.get(key) is not None else "" for key, form in columns.values()]
        cells += [f"{row['details'][x]:,.4g}" if x in row.get("details", {}) else "" for x in details]
        spread = f"{row['p20_ms']:,.4g} to {row['p80_ms']:,.4g}"
        lines.append([way, *cells, f"{row['median_ms'] / our_ms:.3g}", spread])
    absent = [f"{way} ({why})" for way, why in record.get("absent", {}).items()]
    return "\n\n".join([f"{title}:", grid(lines), *([f"Absent: {'; '.join(absent)}."] if absent else [])])


def rows(records: list[dict]) -> str:
    """Markdown: our way of each case beside the fastest other one; the runs are told below."""
    heading = ["", "ms (p20 to p80)", "rate", "of the fastest library GEMM (* of a copy)", "extra MiB"]
    heading += ["fastest other way", "its ms", "its extra MiB", "run"]
    runs: dict[str, str] = {}
    lines = [heading]
    for record in records:
        run = runs.setdefault(provenance_line(record), str(len(runs) + 1))
        op, sizes = shape(record["case"])
        name = f"`{op}` {', '.join(f'{key}={value}' for key, value in sizes.items())}"
        if "refused" in record:
            lines.append([name, f"refused: {record['refused']}", *[""] * (len(heading) - 3), run])
            continue
        own = next(iter(record["times"].values()))
        rate = ("gflop_per_s", "GFLOP/s") if record["flops"] else ("gb_per_s", "GB/s")
        cells = [name, f"{own['median_ms']:,.4g} ({own['p20_ms']:,.4g} to {own['p80_ms']:,.4g})"]
        cells += [f"{own[rate[0]]:,.4g} {rate[1]}", f"{own['of_baseline']:.0%}{'' if record['flops'] else ' *'}"]
        cells.append(f"{own['extra_mib']:,.1f}")
        others = {way: row for way, row in record["times"].items() if is_rival(record, way)}
        fastest = min(others, key=lambda way: others[way]["median_ms"], default=None)
        other = others.get(fastest)
        cells += [fastest, f"{other['median_ms']:,.4g}", f"{other['extra_mib']:,.1f}"] if other else ["", "", ""]
        lines.append([*cells, run])
    return "\n\n".join([grid(lines), _numbered(runs)])


def growth(records: list[dict]) -> str:
    """Markdown: a row per sweep and way, with the exponents of its time and memory."""
    runs: dict[str, str] = {}
    lines = [["", "over", "way", "time", "extra memory", "run"]]
    for sweep in sweeps(records):
        first = sweep.records[0]
        run = runs.setdefault(provenance_line(first), str(len(runs) + 1))
        for way in (way for way in first["times"] if "extra_mib" in first["times"][way]):
            exponents = (sweep.exponent(way, key) for key in ("median_ms", "extra_mib"))
            cells = ("" if x is None else f"{x:.2f}" for x in exponents)
            over = f"{sweep.over} {min(sweep.sizes):,} to {max(sweep.sizes):,}"
            lines.append([f"`{sweep.op}`", over, way, *cells, run])
    return "\n\n".join([grid(lines), _numbered(runs)])


def cost_model(records: list[dict]) -> str:
    """Markdown: what the cost model says of every case that measured its machine beside it."""
    runs: dict[str, str] = {}
    lines = [["", "", "measured", "cost model", "ratio", "run"]]
    for record in records:
        run = runs.setdefault(provenance_line(record), str(len(runs) + 1))
        for what, seen, said in compared(record):
            lines.append([f"`{record['case']}`", what, f"{seen:,.4g}", f"{said:,.4g}", f"{said / seen:.2f}", run])
    return "\n\n".join([grid(lines), _numbered(runs)])


def shares(records: list[dict]) -> str:
    """Markdown: the share of our time that each part takes, a column per case, without what is nowhere a thousandth."""
    runs: dict[str, str] = {}
    titles = []
    for record in records:
        run = runs.setdefault(provenance_line(record), str(len(runs) + 1))
        titles.append(f"{fixed(record)} ({run})")
    columns = [record["shares"] for record in records]
    own = list(map(of_ours, columns))
    parts = dict.fromkeys(name for column in (*own, *columns) for name in column)
    lines = [["", *titles], ["ops of qrm_fast", *(f"**{sum(column.values()):.1%}**" for column in own)]]
    for part in parts:
        if max(column.get(part, 0.0) for column in columns) >= 1e-3:
            name = f"- `{part}`" if any(part in column for column in own) else part
            lines.append([name, *(f"{column[part]:.1%}" if part in column else "" for column in columns)])
    return "\n\n".join([grid(lines), _numbered(runs)])


def _numbered(runs: dict[str, str]) -> str:
    return "\n".join(f"{number}. {run}" for run, number in runs.items())


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


def summary(records: list[dict]) -> str:
    """What a picture of these was measured on: hardware, commits, dates."""
    every = [record["provenance"] for record in records]
    commits = dict.fromkeys(_commit(made).removeprefix("commit ")[:7] for made in every)
    dates = sorted({made["date"] for made in every})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{every[0]['hardware']}; commits {', '.join(commits)}; {days}"


def into_docs() -> None:
    """Rewrite every marked place from bench/results; what nobody measured reads "not measured"."""
    from . import pictures  # which need matplotlib

    files = {
        path: sorted(json.loads(path.read_text())["records"], key=lambda record: record["case"])
        for path in sorted((ROOT / "bench/results").glob("*.json"))
    }

    def written(match: re.Match, page: Path) -> str:
        kind, what, machine = match["kind"], match["what"] or "", match["machine"] or ""
        there = {
            path: records
            for path, records in files.items()
            if records and records[0]["provenance"]["hardware"].startswith(machine)
        }
        wanted = what.split("; ")
        chosen = [
            record
            for prefix in wanted
            for records in there.values()
            for record in records
            if record["case"].startswith(prefix)
        ]
        if kind == "picture":
            drawn = {
                path: pictures.draw(what, path, records, ROOT / "docs/pictures") for path, records in there.items()
            }
            parts = [_picture(what, svg, files[path], page) for path, svg in drawn.items() if svg]
            text = "\n\n".join(parts)
        elif kind == "growth":
            text = growth(chosen) if sweeps(chosen) else ""
        elif kind == "cost model":
            beside = [record for record in chosen if "machine" in record]
            text = cost_model(beside) if beside else ""
        elif kind == "shares":
            taken = [record for record in chosen if "shares" in record]
            text = shares(taken) if taken else ""
        else:
            complete = all(any(record["case"].startswith(prefix) for record in chosen) for prefix in wanted)
            text = {"bench": table, "rows": rows}[kind](chosen) if complete else ""
        return f"{match['mark']}\n{text or 'not measured'}\n<!-- end -->"

    kind = "(?P<kind>bench|rows|growth|cost model|shares|picture)"
    mark = rf"(?P<mark><!-- {kind}(?:: (?P<what>.*?))?(?:; on (?P<machine>.*?))? -->)"
    places = re.compile(mark + r"\n.*?<!-- end -->", re.DOTALL)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        page.write_text(places.sub(lambda match, page=page: written(match, page), page.read_text()))


def _picture(kind: str, svg: Path, records: list[dict], page: Path) -> str:
    return f"![{kind}: {summary(records)}]({os.path.relpath(svg, page.parent)})"
