"""Fleets shared by tests, and their logs in the report of a test that failed."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.fleet import Fleet

BIG_MODEL = "org/" + "big" * 1200
"""A name in every chunk: streams of this model fill buffers soon. The slash is a test, too."""


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One prefill and two decode workers, simulated. Tests leave it idle and whole; they are marked
    `xdist_group("api")`."""
    with Fleet(tmp_path_factory.mktemp("fleet"), decode=2) as fleet:
        yield fleet


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report: pytest.TestReport = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Fleet):
                report.sections.append((f"logs of {name}", value.dump_logs()))
    return report
