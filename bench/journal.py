"""What a slot has done: one JSON object a line, each on the disk before the next step begins.

`{"begin": case}` and `{"end": case, "outcome": ...}` come from the processes that run the cases, or from slot.py where
such a process did not live to say it. A case's last end counts; one that began and has no end is run again.
"""

import json
import os
from pathlib import Path

RESTART = 70  # exit status: the device is lost to this process, a fresh one may go on


class Journal:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def write(self, **entry: object) -> None:
        """One write of one line, so that those of several processes do not mix; after one that was cut short, too."""
        os.write(self.file, ("\n" + json.dumps(entry) + "\n").encode())
        os.fsync(self.file)

    def entries(self, start: int = 0) -> tuple[list[dict], int]:
        """The whole lines from this byte on, and where they end. A line cut short by a crash is left out."""
        with self.path.open("rb") as file:
            file.seek(start)
            *lines, rest = file.read().split(b"\n")
            return [entry for line in lines if (entry := _parsed(line))], file.tell() - len(rest)


def _parsed(line: bytes) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def ends(entries: list[dict]) -> dict[str, dict]:
    """The last end of each case."""
    return {entry["end"]: entry for entry in entries if "end" in entry}


class Worker:
    """A process of a slot, told by its environment which journal it writes and under which name."""

    def __init__(self) -> None:
        self.name, self.start = os.environ["SLOT_WORKER"], float(os.environ["SLOT_START"])
        self.claims = Path(os.environ["SLOT_CLAIMS"])
        self.journal = Journal(Path(os.environ["SLOT_JOURNAL"]))
        self.settled = ends(self.journal.entries()[0])

    def begin(self, case: str) -> None:
        self.journal.write(begin=case, worker=self.name)

    def end(self, case: str, outcome: str, **details: object) -> None:
        self.journal.write(end=case, worker=self.name, outcome=outcome, **details)

    def claim(self, cases: str) -> bool:
        """Whether these cases are this worker's: the first to ask has them, and its successor after a crash."""
        claim = self.claims / cases.replace("/", ":")
        try:
            with claim.open("x") as file:
                file.write(self.name)
        except FileExistsError:
            return claim.read_text() == self.name
        return True


def leave_if_lost() -> None:
    """End this process at once where an error sticks to its CUDA context: everything after it would fail too."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception as error:
        print(f"the device is lost to this process: {error}", flush=True)
        os._exit(RESTART)
