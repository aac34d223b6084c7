"""Room that is kept for who needs much of it.

A choice that needs a large part of a worker waits for ever in a busy fleet, if shorter ones may
take every place and block that becomes free; and if they may not, all wait for it. So one decode
worker keeps room for it: that is charged to the worker as if the choice was there, and the others
pass. (Backfilling with reservations, as batch schedulers do: Lifka 1995, "The ANL/IBM SP scheduling
system".) It decides where; the placer serves it.
"""

from typing import Final

from router.scheduling.fleet import Worker
from router.scheduling.lifecycle import Choice
from router.scheduling.policy import Want, fits_decode
from router.scheduling.pools import Group
from router.scheduling.tables import Tables

_KEEP_SHARE: Final = 2
"""Half of the workers at most keep room; one, if there is only one."""
_LARGE_SHARE: Final = 8
"""Who needs less of a worker than this part does not wait for long."""


def is_large(group: Group, want: Want) -> bool:
    """Whether it needs much of a decode worker of usual size."""
    pool = group.decode
    num_blocks = sum(tier.num_blocks for tier in pool.tiers.values())
    return want.decode_blocks * _LARGE_SHARE * len(pool.order) >= num_blocks


def keep_room(t: Tables, choice: Choice, group: Group, want: Want) -> bool:
    """The worker that lacks least of what it needs keeps room for it. False if all that may do so
    already, or if there is room, and something else is missing. A look at every decode worker."""
    order = group.decode.order
    keepers = {kept.worker for kept in t.kept.values() if kept.worker.group is group}
    if len(keepers) >= max(1, len(order) // _KEEP_SHARE):
        return False
    best: tuple[int, int, str] | None = None
    keeper: Worker | None = None
    for seat in order:
        worker = seat.worker
        capacity = worker.info.capacity
        if worker.incarnation in want.excluded or want.tokens >= capacity.max_context:
            continue
        if fits_decode(worker, want):
            return False
        if worker.claim or worker in keepers:
            continue
        free = capacity.num_blocks - worker.blocks - worker.foreign_blocks
        lacks = max(0, min(want.decode_blocks, capacity.num_blocks) - free)
        rank = (lacks, worker.running - capacity.max_running, worker.id)
        if best is None or rank < best:
            best, keeper = rank, worker
    if keeper is None:
        return False
    t.keep_room(choice, keeper, want.decode_blocks)
    return True


def has_come(t: Tables, choice: Choice) -> bool:
    """Whether the room that is kept for it is free now."""
    kept = t.kept[choice.id]
    worker = kept.worker
    capacity = worker.info.capacity
    rest = worker.blocks - kept.blocks
    return not (worker.claim or worker.refused) and (
        not rest
        or (
            worker.running <= capacity.max_running
            and worker.blocks + worker.foreign_blocks <= capacity.num_blocks
        )
    )
