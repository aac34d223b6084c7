"""Writes docs/metrics.md from what routers and workers have. `--check` only compares."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from protocol.worker_info import Capacity, EngineTraits, KvLayout, WorkerInfo
from router.metrics import RouterMetrics
from worker.engine.base import EngineStats, Load
from worker.metrics import WorkerCollector

TARGET = Path(__file__).parents[1] / "docs" / "metrics.md"

HEAD = """\
# Metrics

For Prometheus, on `/metrics` of a router (its HTTP port) and of a worker (`metrics_port`; with
`baton up` any free port, see `processes.json`). Those of several routers under one parent have the
label `router` besides. Both kinds of process also have the usual `process_*`. Times are seconds.
Codes, and kinds of events, are listed in [api.md](api.md).

This page is generated: `python scripts/write_metrics_doc.py`.
"""


def router_families() -> Iterator[Metric]:
    """Each with a sample, which shows its labels."""
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    metrics.started("m")
    metrics.ended("m", "completed", "decode", "", 1.0)
    metrics.queue_time("m", 1.0)
    metrics.prefilled("m", 1.0, 1.0)
    metrics.first_token("m", 1.0)
    metrics.token_gap("m", 1.0)
    metrics.transfer("m", "tcp", 1, 1.0)
    metrics.handle_used("m", 1.0)
    metrics.note("retry", "refused")
    metrics.answered("/v1/models", 200)
    metrics.error_answer(503, "queue_full")
    metrics.workers.labels("m", "decode", "live").set(1)
    metrics.worker_load.labels("m", "decode", "d").set(1)
    return iter(registry.collect())


def worker_families() -> Iterator[Metric]:
    """Of an engine that has done everything once."""
    engine = SimpleNamespace(
        load=lambda: Load(0, 0, 1, 1, 0, 0, 0, 0),
        stats=lambda: EngineStats(
            {"released": 1}, {("tcp", "ok"): 1}, {"tcp": 1}, {"source": ("tcp", "auto")}
        ),
    )
    info = WorkerInfo(
        "w", "i", "decode", "m", "", KvLayout(1, 1), Capacity(1, 1, 1), "", EngineTraits(),
        transports=["tcp"], transport_reasons={"tcp": "always"},
    )  # fmt: skip
    return WorkerCollector(cast("Any", engine), cast("Any", ()), info).collect()


def table(families: Iterable[Metric]) -> str:
    rows = ["| metric | kind | labels | |", "|---|---|---|---|"]
    for family in sorted(families, key=lambda family: family.name):
        if not family.name.startswith("baton_"):
            continue
        labels = {name: None for sample in family.samples for name in sample.labels if name != "le"}
        shown = ", ".join(f"`{name}`" for name in labels)
        suffix = "_total" if family.type == "counter" else ""
        text = family.documentation.removesuffix(".")
        rows.append(f"| `{family.name}{suffix}` | {family.type} | {shown} | {text} |")
    return "\n".join(rows)


def document() -> str:
    parts = [
        HEAD,
        "## A router\n\n" + table(router_families()) + "\n",
        "## A worker\n\n" + table(worker_families()) + "\n",
    ]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is out of date")
    args = parser.parse_args()
    text = document()
    if args.check:
        return 0 if TARGET.read_text() == text else 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
