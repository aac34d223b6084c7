"""A pull of two blocks, the ends it may have, and sinks in which it has come some way."""

from protocol.blocks import pack_ids
from protocol.handoff import KvHandle, RankKv, TcpOffer
from protocol.out import FailureCode
from worker.handoff.ends import TransferEnd
from worker.handoff.sink import (
    Command,
    FreeBlocks,
    PostData,
    PostWord,
    Pull,
    PullFailed,
    Quarantine,
    Sink,
)

NONCE = 77
HASH = b"h" * 16
OK = TransferEnd(ok=True)
HELD = TransferEnd(ok=True, word=NONCE)
GONE = TransferEnd(ok=True, word=0)
BROKEN = TransferEnd(ok=False, reason="reset by peer")
LOST = "the source let go of the blocks"


def handle(
    *,
    num_tokens: int = 32,
    block_size: int = 16,
    content_hash: bytes = HASH,
    blocks: bytes = pack_ids((7, 8)),
    nonce: int = NONCE,
    num_ranks: int = 1,
) -> KvHandle:
    rank = RankKv(blocks, 0, nonce, [TcpOffer("127.0.0.1", 1)])
    ranks = [rank] * num_ranks
    return KvHandle("h", "p", "1", num_tokens, block_size, content_hash, 30.0, ranks)


PULL = Pull(handle(), HASH, (1, 2), (7, 8), 32)
MINE = PULL.local_blocks


def make(
    *, num_scratch: int = 4, max_tokens_in_flight: int | None = None, block_size: int | None = 16
) -> Sink:
    return Sink(
        num_scratch=num_scratch,
        max_tokens_in_flight=max_tokens_in_flight,
        timeout_s=60.0,
        max_quarantined_blocks=2,
        block_size=block_size,
    )


def ends(**given: int) -> dict[str, int]:
    names = ("ready", "abandoned", "handle_mismatch", "lease_lost", "transfer_failed")
    return dict.fromkeys(names, 0) | given


def pulling(sink: Sink) -> None:
    assert sink.begin(1, PULL, 0.0) == [PostData(1, PULL)]


def checking(sink: Sink) -> None:
    pulling(sink)
    assert sink.data_ended(1, OK, 1.0) == [PostWord(1, 0)]


def fenced_data(sink: Sink) -> None:
    pulling(sink)
    assert sink.abandon(1, 2.0) == [Quarantine(1, MINE)]


def fenced_word(sink: Sink) -> None:
    checking(sink)
    assert sink.abandon(1, 2.0) == [Quarantine(1, MINE)]


def failed(code: FailureCode, message: str) -> list[Command]:
    return [PullFailed(1, code, message), FreeBlocks(1, MINE)]


def waiting(sink: Sink) -> None:
    for pull_id in (11, 12, 13, 14):
        sink.begin(pull_id, PULL, 0.0)
    assert sink.begin(1, PULL, 0.0) == []
