"""docs/metrics.md is what routers and workers have."""

from scripts.write_metrics_doc import TARGET, document, router_families, worker_families


def test_the_page_is_up_to_date() -> None:
    assert TARGET.read_text() == document()


def test_every_family_shows_its_labels() -> None:
    families = [*router_families(), *worker_families()]
    assert len(families) > 30
    assert all(family.samples for family in families)
