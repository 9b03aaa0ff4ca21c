"""Tables from records, printed, or written into README.md and docs: `<!-- bench: CASE -->` to `<!-- end -->`."""

import json
import re

from .provenance import ROOT


def table(records: list[dict]) -> str:
    """Markdown: one row per way of each case, and one line per provenance."""
    lines = [
        "| case | provider | ms (p20 to p80) | our time | GB/s | GFLOP/s | of the limit | extra MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        if "refused" in record:
            lines.append(f"| {record['case']} | refused: {record['refused']} | | | | | | |")
            continue
        our_ms = next(iter(record["times"].values()))["median_ms"]
        for way, row in record["times"].items():
            ms = f"{row['median_ms']:,.4g} ({row['p20_ms']:,.4g} to {row['p80_ms']:,.4g})"
            rates = [f"{row[key]:.4g}" if row.get(key) else "" for key in ("gb_per_s", "gflop_per_s")]
            memory = f"{row['extra_mib']:.1f}" if "extra_mib" in row else ""
            cells = [
                record["case"],
                way,
                ms,
                f"x {row['median_ms'] / our_ms:.3g}",
                *rates,
                f"{row['of_limit']:.1%}",
                memory,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *dict.fromkeys(map(_provenance, records))])


def _provenance(record: dict) -> str:
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
