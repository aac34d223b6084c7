"""Ids of requests: fresh, equally long, and few system calls."""

from protocol.ids import is_name
from router.http import RequestIds


def test_ids_are_names_and_never_the_same() -> None:
    new = RequestIds()
    ids = [new() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert {len(one) for one in ids} == {24}
    assert all(is_name(one) for one in ids)


def test_one_draw_serves_for_many() -> None:
    draws: list[int] = []

    def random_hex(num_bytes: int) -> str:
        draws.append(num_bytes)
        return "".join(f"{len(draws):02x}{number:022x}" for number in range(num_bytes // 12))

    new = RequestIds(random_hex)
    ids = [new() for _ in range(129)]
    assert draws == [768, 768, 768]
    assert len(set(ids)) == 129
