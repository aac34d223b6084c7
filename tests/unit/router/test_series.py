"""Our histograms and numbers say what Prometheus's own would."""

import random

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client import Histogram as Theirs
from prometheus_client.parser import text_string_to_metric_families

from router.series import Histogram, Numbers

BOUNDS = (0.001, 0.5, 1, 10)


def told(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): round(sample.value, 9)
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_it_says_what_prometheus_would() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    one = Histogram("x_seconds", "A time.", ["model", "way"], buckets=BOUNDS, registry=ours)
    other = Theirs("x_seconds", "A time.", ["model", "way"], buckets=BOUNDS, registry=theirs)
    rng = random.Random(5)
    values = [rng.choice((0.0, 0.001, 0.5, 1.0, 10.0, rng.expovariate(1.0))) for _ in range(500)]
    for value in values:
        labels = rng.choice((("a", "tcp"), ("b", "shm"), ('"\n', "")))
        one.of(*labels).observe(value)
        other.labels(*labels).observe(value)
    assert told(ours) == told(theirs)
    assert len(told(ours)) == 3 * (len(BOUNDS) + 3)


def test_one_nobody_observed_is_described_and_its_name_is_taken() -> None:
    registry = CollectorRegistry()
    Histogram("y_seconds", "Another.", ["model"], buckets=BOUNDS, registry=registry)
    assert b"# TYPE y_seconds histogram" in generate_latest(registry)
    assert told(registry) == {}
    with pytest.raises(ValueError, match="y_seconds"):
        Histogram("y_seconds", "Again.", ["model"], buckets=BOUNDS, registry=registry)


@pytest.mark.parametrize("is_gauge", [False, True])
def test_numbers_say_what_prometheus_would(is_gauge: bool) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    one = Numbers("x", "Some.", ["model", "way"], registry=ours, is_gauge=is_gauge)
    other = (Gauge if is_gauge else Counter)("x", "Some.", ["model", "way"], registry=theirs)
    for labels, more in ((("a", "tcp"), 1), (("b", "shm"), 7), (("a", "tcp"), 3), (('"\n', ""), 0)):
        one.of(*labels).value += more
        other.labels(*labels).inc(more)
    assert told(ours) == told(theirs)
    assert len(told(ours)) == 3
    kind = b"gauge" if is_gauge else b"counter"
    lines = [line for line in generate_latest(ours).splitlines() if b"TYPE" in line]
    assert [line.split()[-1] for line in lines] == [kind]
    with pytest.raises(ValueError, match="x"):
        Numbers("x", "Again.", [], registry=ours)


def test_a_number_without_labels_is_there_from_the_start() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    Numbers("y", "One.", [], registry=ours).of()
    Counter("y", "One.", registry=theirs)
    assert told(ours) == told(theirs) == {("y_total", ()): 0}
