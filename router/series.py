"""Histograms that cost their observers a bisection, and numbers that cost an addition: a dozen are
touched for every request.

Prometheus's own take a lock, check their labels and walk the bounds. These are observed on one
thread, the loop's; a page is made on another, from copies.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Series:
    """One histogram of a family."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Values up to each bound and above the one before; in the end those above all."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class Histogram(Collector):
    """A family; its series are made when they are first asked for."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = tuple(float(bound) for bound in buckets)
        self._series: dict[tuple[str, ...], Series] = {}
        registry.register(self)

    def of(self, *values: str) -> Series:
        """The series with these labels."""
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = Series(self._bounds)
        return series

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, series in list(self._series.items()):
            counts, total = tuple(series.counts), series.total
            buckets: list[tuple[str, float]] = []
            below = 0
            for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
                below += count
                buckets.append((_go(bound), below))
            family.add_metric(values, buckets=buckets, sum_value=total)
        yield family

    def describe(self) -> Iterator[Metric]:
        """So that the registry knows the name before there is a series."""
        yield HistogramMetricFamily(self._name, self._text, labels=self._labels)


class Number:
    """One number of a family: add to its `value`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class Numbers(Collector):
    """A family of counters, or of gauges; its numbers are made when they are first asked for."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        *,
        registry: CollectorRegistry,
        is_gauge: bool = False,
    ) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._family = GaugeMetricFamily if is_gauge else CounterMetricFamily
        self._numbers: dict[tuple[str, ...], Number] = {}
        registry.register(self)

    def of(self, *values: str) -> Number:
        """The number with these labels."""
        number = self._numbers.get(values)
        if number is None:
            number = self._numbers[values] = Number()
        return number

    def collect(self) -> Iterator[Metric]:
        family = self._family(self._name, self._text, labels=self._labels)
        for values, number in list(self._numbers.items()):
            family.add_metric(values, number.value)
        yield family

    def describe(self) -> Iterator[Metric]:
        """So that the registry knows the name before there is a number."""
        yield self._family(self._name, self._text, labels=self._labels)


def _go(bound: float) -> str:
    """As Prometheus writes a bound."""
    text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
    return text
