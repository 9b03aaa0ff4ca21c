"""A pytest plugin for the workers of a slot: they share the tests out, and every outcome is in the journal at once."""

from itertools import groupby

import pytest
import torch

from qrm_fast import doctor

from .journal import Worker, leave_if_lost
from .provenance import ROOT, provenance


def pytest_configure(config: pytest.Config) -> None:
    if not torch.cuda.is_available():
        pytest.exit(f"torch {torch.__version__} sees no CUDA device", 3)
    config.pluginmanager.register(Journaled(Worker()))


class Journaled:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.reports: list[pytest.TestReport] = []

    def pytest_exception_interact(self, node, call, report) -> None:
        """A file that needs a package of an extra is skipped; any other that cannot be read has failed."""
        if isinstance(report, pytest.CollectReport):
            missing = missing_package(call.excinfo.value)
            outcome, why = ("skipped", f"no package {missing}") if missing else ("failed", report.longreprtext)
            self.worker.end(node.nodeid, outcome, why=why[-2000:])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Function by function, whose parameters share compiled kernels; each worker begins in another file."""
        functions = [list(items) for _, items in groupby(session.items, lambda item: item.nodeid.partition("[")[0])]
        if self.worker.start == 0:
            self.worker.journal.write(provenance=provenance("cuda"), served=[row._asdict() for row in doctor.served()])
        first = int(self.worker.start * len(functions))
        for items in functions[first:] + functions[:first]:
            if self.worker.claim(items[0].nodeid.partition("[")[0]):
                left = [item for item in items if item.nodeid not in self.worker.settled]
                for item, after in zip(left, [*left[1:], None], strict=False):
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        return True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reports = []
        self.worker.begin(nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self):
        yield
        torch.cuda.synchronize()  # what a kernel of this test did wrong is this test's

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        report = next((r for r in self.reports if not r.passed), self.reports[-1])
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        if crash := getattr(report.longrepr, "reprcrash", None):
            why += f"\n{crash.message.partition(chr(10))[0]}"  # last, where a table looks for it
        seconds = round(sum(r.duration for r in self.reports), 2)
        self.worker.end(nodeid, report.outcome, why=why[-2000:], seconds=seconds)
        leave_if_lost()
        torch.cuda.empty_cache()  # for the tests of the other workers


def missing_package(error: BaseException | None) -> str | None:
    """The package behind an error of import, if pyproject.toml names it."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0].replace("_", "-")
            return package if f'"{package}' in (ROOT / "pyproject.toml").read_text() else None
        error = error.__cause__
    return None
