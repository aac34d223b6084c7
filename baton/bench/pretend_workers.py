"""A prefill and a decode worker as far as a router can tell: no engine, no KV, only answers.

They hear their jobs over the bus and say nothing until they are asked for what they would say, so
that a measurement can take the making of answers out of what it counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from baton.demo import DEMO_MODEL, demo_model_folder
from protocol.blocks import pack_ids
from protocol.bus import Bus, Message
from protocol.codec import decode_jobs, encode
from protocol.events import LoadReport
from protocol.handoff import KvHandle, Offer, RankKv, ShmOffer, TcpOffer
from protocol.jobs import Decode, GetAssets, JobEnvelope, Prefill, Tokens
from protocol.out import Decoding, Delta, Out, OutEnvelope, Prefilled, StepFrame
from protocol.subjects import Subjects
from protocol.worker_info import Capacity, KvLayout, Role, WorkerInfo
from text.assets import encode as encode_assets
from text.assets import load_assets

_BLOCK: Final = 32
_NUM_BLOCKS: Final = 100_000
_OFFERS: Final[list[Offer]] = [
    ShmOffer("b" * 36, 4711, 12, 13, 1 << 32, 1 << 16, "t" * 32),
    TcpOffer("10.0.0.1", 40_001),
]
_WORD: Final = Delta(0, 0, [300], " word")
"""What each token looks like, but for its place."""


@dataclass(slots=True)
class _Stream:
    """An attempt of the decode worker that goes on."""

    attempt: int
    num_output: int


class PretendWorkers:
    """Both of them, for one router. A request of two tokens ends with the decode worker's first
    one, which rides with the news that decoding has begun; others go on for ever."""

    def __init__(self, bus: Bus, subjects: Subjects, router_id: str) -> None:
        self._bus = bus
        self._subjects = subjects
        self._router_id = router_id
        self._assets = load_assets(demo_model_folder())
        self._prefill = _info("prefill", self._assets.digest)
        self._decode = _info("decode", self._assets.digest)
        self._seq = {"prefill": 0, "decode": 0}
        self._heard: list[JobEnvelope] = []
        self._streams: list[_Stream] = []

    @property
    def infos(self) -> Sequence[WorkerInfo]:
        return (self._prefill, self._decode)

    @staticmethod
    def report() -> LoadReport:
        """Each has nothing to do."""
        return LoadReport(0, 0, _NUM_BLOCKS, _NUM_BLOCKS, 0, 0, 0, 0)

    async def start(self) -> None:
        for info in self.infos:
            subject = self._subjects.jobs(info.worker_id, info.incarnation)
            await self._bus.subscribe(subject, self._on_jobs)

    def _on_jobs(self, message: Message) -> None:
        envelope = decode_jobs(message.payload)
        if any(isinstance(job, GetAssets) for job in envelope.jobs):
            self._bus.publish(message.reply, encode_assets(self._assets))
        else:
            self._heard.append(envelope)

    def heard(self) -> list[JobEnvelope]:
        """What has come since this was last asked."""
        heard, self._heard = self._heard, []
        return heard

    def answers(self, envelopes: Sequence[JobEnvelope]) -> list[Message]:
        """To all jobs of these that want an answer: one message of each worker that has one."""
        jobs = [job for envelope in envelopes for job in envelope.jobs]
        prefilled: list[Out] = [self._prefilled(job) for job in jobs if isinstance(job, Prefill)]
        decoding = self._decoding([job for job in jobs if isinstance(job, Decode)])
        outs = ((self._prefill, prefilled), (self._decode, decoding))
        return [self._message(info, said) for info, said in outs if said]

    def frame(self) -> Message:
        """A step of the decode worker: the next token of each stream."""
        deltas = []
        for stream in self._streams:
            deltas.append(_delta(stream.attempt, stream.num_output))
            stream.num_output += 1
        return self._message(self._decode, [StepFrame(deltas)])

    def _prefilled(self, job: Prefill) -> Prefilled:
        num_tokens = len(_packed(job)) // 4
        blocks = pack_ids(range(-(-num_tokens // _BLOCK)))
        handle = KvHandle(
            f"{job.attempt:032x}", self._prefill.worker_id, self._prefill.incarnation,
            num_tokens, _BLOCK, bytes(16), 30.0, [RankKv(blocks, 7, 1 << 60, _OFFERS)],
        )  # fmt: skip
        return Prefilled(job.attempt, num_tokens, 0, _delta(job.attempt, 0), handle, 0.0, 0.001)

    def _decoding(self, jobs: Sequence[Decode]) -> list[Out]:
        outs: list[Out] = []
        last: list[Delta] = []
        for job in jobs:
            source = job.handle.worker if job.handle is not None else ""
            outs.append(Decoding(job.attempt, 0, "shm", 4096, 0.001, None, source))
            if job.sampling.max_tokens == 2:
                last.append(_delta(job.attempt, 1, is_last=True))
            else:
                self._streams.append(_Stream(job.attempt, 1))
        return [*outs, StepFrame(last)] if last else outs

    def _message(self, info: WorkerInfo, outs: list[Out]) -> Message:
        self._seq[info.role] += 1
        envelope = OutEnvelope(info.worker_id, info.incarnation, self._seq[info.role], outs)
        return Message(self._subjects.out(self._router_id, info.worker_id), encode(envelope))


def packed_prompts(envelopes: Sequence[JobEnvelope]) -> list[bytes]:
    """Of the prefill jobs among these."""
    jobs = (job for envelope in envelopes for job in envelope.jobs)
    return [_packed(job) for job in jobs if isinstance(job, Prefill)]


def _packed(job: Prefill) -> bytes:
    assert isinstance(job.prompt, Tokens)
    return job.prompt.packed


def _delta(attempt: int, index: int, *, is_last: bool = False) -> Delta:
    return Delta(attempt, index, _WORD.ids, _WORD.text, "length" if is_last else "")


def _info(role: Role, assets_digest: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id=f"{role}-0",
        incarnation=f"{role}-1",
        role=role,
        model=DEMO_MODEL,
        model_digest="d",
        layout=KvLayout(_BLOCK, 2048),
        capacity=Capacity(_NUM_BLOCKS, 512, 1 << 20),
        engine="simulated",
        assets_digest=assets_digest,
    )
