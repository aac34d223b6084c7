"""What `/cluster_info` says of the pairs of workers."""

from router.pairs import TransferPairs, Way, joined


def test_pairs_are_counted_by_the_way_they_go_now() -> None:
    pairs = TransferPairs()
    pairs.used("p2", "d1", Way("shm", "auto"), 5)
    pairs.used("p1", "d1", Way("nixl", "auto: CMA works"), 10)
    pairs.used("p1", "d1", Way("nixl", "auto: CMA works"), 10)
    first, second = pairs.for_people()
    assert first == {
        "from": "p1",
        "to": "d1",
        "transport": "nixl",
        "reason": "auto: CMA works",
        "transfers": 2,
        "bytes": 20,
    }
    assert second["from"] == "p2"
    pairs.used("p1", "d1", Way("tcp", "nixl: failed before"), 3)
    assert (pairs.for_people()[0]["transport"], pairs.for_people()[0]["transfers"]) == ("tcp", 1)


def test_the_pairs_used_longest_ago_go_first() -> None:
    pairs = TransferPairs(max_pairs=2)
    for source in ("p1", "p2", "p1", "p3"):
        pairs.used(source, "d", Way("shm", "auto"), 1)
    assert [pair["from"] for pair in pairs.for_people()] == ["p1", "p3"]


def test_what_two_routers_have_seen_is_one_list() -> None:
    ours, theirs = TransferPairs(), TransferPairs()
    ours.used("p1", "d1", Way("shm", "auto"), 10)
    theirs.used("p1", "d1", Way("shm", "auto"), 5)
    theirs.used("p0", "d1", Way("tcp", "asked"), 1)
    pairs = joined(ours.for_people(), theirs.for_people())
    said = [(pair["from"], pair["to"], pair["transfers"], pair["bytes"]) for pair in pairs]
    assert said == [("p0", "d1", 1, 1), ("p1", "d1", 2, 15)]
    assert ours.for_people()[0]["transfers"] == 1, "each remembers its own alone"
