"""What a router says of itself and its fleet, asked over HTTP by a test."""

import http.client
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from prometheus_client.parser import text_string_to_metric_families

POLL_S = 0.02

T = TypeVar("T")


class RouterView(ABC):
    """Questions to the router on `port`, or to another one on this machine."""

    @property
    @abstractmethod
    def port(self) -> int: ...

    def get(self, path: str, port: int | None = None) -> tuple[int, bytes]:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=5.0)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def cluster_info(self, port: int | None = None) -> dict[str, Any]:
        status, body = self.get("/cluster_info", port)
        assert status == 200, body
        info: dict[str, Any] = json.loads(body)
        return info

    def eligible(self, port: int | None = None) -> list[str]:
        """Names of the workers that a router gives work to; empty if it does not answer."""
        try:
            workers = self.cluster_info(port)["workers"]
        except OSError:
            return []
        return [worker["worker_id"] for worker in workers if worker["eligible"]]

    def metrics(
        self, port: int | None = None
    ) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Sample by name and labels."""
        _, body = self.get("/metrics", port)
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }

    def metric(self, name: str, port: int | None = None, **labels: str) -> float:
        """Sum of the samples of that name that have these labels."""
        wanted = labels.items()
        return sum(
            value
            for (sample, has), value in self.metrics(port).items()
            if sample == name and wanted <= has
        )

    def remains(self, port: int | None = None) -> dict[str, Any]:
        """What is left of work, in the router's books and in what the living workers report; empty
        when nothing is."""
        info = self.cluster_info(port)
        left = {name: info[name] for name in ("inflight", "queued") if info[name]}
        for worker in info["workers"]:
            load = worker["load"] if worker["live"] and worker["load"] is not None else {}
            counts = {"reservations": worker["reservations"]} | {
                name: load.get(name, 0)
                for name in ("running", "waiting", "lent_blocks", "quarantined_blocks")
            }
            if any(counts.values()):
                left[worker["worker_id"]] = counts
        return left

    def is_idle(self, port: int | None = None) -> bool:
        return not self.remains(port)

    def until(self, condition: Callable[[], T], *, what: str, timeout_s: float = 15.0) -> T:
        """Ask until the answer is true; other processes cannot wake us."""
        until = time.monotonic() + timeout_s
        while True:
            answer = condition()
            if answer:
                return answer
            assert time.monotonic() < until, f"waited {timeout_s} s for {what}"
            time.sleep(POLL_S)

    def until_idle(self, *, timeout_s: float = 5.0) -> None:
        until = time.monotonic() + timeout_s
        while left := self.remains():
            assert time.monotonic() < until, f"left after {timeout_s} s: {left}"
            time.sleep(POLL_S)
