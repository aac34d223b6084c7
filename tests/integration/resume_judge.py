"""What an interrupted stream may differ in from an undisturbed one, and how clear a decision was.

A difference is excused on torch alone, and only where the decision at the first differing token
hangs on less than `MARGIN`. For greedy ones that is the distance of the two best logits. For drawn
ones it is the distance of the random number from the ends of the chosen token's interval, as noise
of e in the logits moves a cumulative probability by 2e at most; and the token must stay the same
when each threshold (`top_k`, `top_p`, `min_p`) moves by one token or by `MARGIN`. Logits are those
that options have changed.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from protocol.blocks import unpack_ids
from protocol.jobs import Tokens
from protocol.sampling import Sampling
from router.choices import ChoiceSpec
from tests.integration.resume_said import Said, differences, worst_distance
from tests.integration.resume_world import BLOCK_SIZE, NUM_BLOCKS, Cut, Stream
from tests.unit.worker.tiny_llama import Bench
from text.assets import load_assets
from text.tokenizer import Tokenizer
from worker.engine.grammar import GrammarCompiler
from worker.engine.runner import Chunk
from worker.engine.torch_logits import adjust, is_adjusted
from worker.engine.torch_sampling import kept_tokens, uniform

MARGIN = 1e-3
EXCUSED_SHARE = 0.01
"""Of all interrupted streams."""


@dataclass(frozen=True)
class Decision:
    """One output token, decided anew from all tokens before it."""

    token: int
    margin: float


def decide(logits: Tensor, sampling: Sampling, index: int) -> Decision:
    """The token of a row of logits that the options have changed already."""
    if sampling.temperature == 0:
        best = logits.topk(2)
        return Decision(int(logits.argmax()), float(best.values[0] - best.values[1]))
    number = uniform(sampling.seed, index)
    found = [_drawn(logits, variant, number) for variant in _variants(sampling)]
    is_clear = len({token for token, _ in found}) == 1
    return Decision(found[0][0], min(margin for _, margin in found) if is_clear else 0.0)


def _drawn(logits: Tensor, sampling: Sampling, number: float) -> tuple[int, float]:
    """The token at `number`, and how far that is from its neighbours'."""
    ids, probabilities = kept_tokens(logits, sampling)
    ends = probabilities.cumsum(0) / probabilities.sum()
    at = min(int(torch.searchsorted(ends, number, right=True)), len(ids) - 1)
    distances = (ends[:-1] - number).abs()
    return int(ids[at]), float(distances.min()) if len(ids) > 1 else float("inf")


def _variants(sampling: Sampling) -> Iterator[Sampling]:
    """As asked, and with every threshold a little lower and higher."""
    yield sampling
    for step in (-1, 1):
        if sampling.top_k > 0:
            yield replace(sampling, top_k=max(1, sampling.top_k + step))
        if sampling.top_p < 1:
            yield replace(sampling, top_p=min(1.0, sampling.top_p + step * MARGIN))
        if sampling.min_p > 0:
            yield replace(sampling, min_p=max(0.0, sampling.min_p + step * MARGIN))


class Judge:
    """One model, one pass over a whole sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self._bench = Bench(folder, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
        self._tokenizer = Tokenizer.from_assets(load_assets(folder))
        self._grammars = GrammarCompiler(self._tokenizer)

    def decisions(self, spec: ChoiceSpec, ids: Sequence[int]) -> list[Decision]:
        """Of every token of the output `ids`."""
        assert isinstance(spec.prompt, Tokens)
        prompt = list(unpack_ids(spec.prompt.packed))
        whole = [*prompt, *ids]
        rows = self._bench.in_chunks(list(range(NUM_BLOCKS)), whole[:-1], len(whole))
        return [
            self._decide(rows[len(prompt) - 1 + i], spec.sampling, whole, len(prompt), i)
            for i in range(len(ids))
        ]

    def _decide(
        self, row: Tensor, sampling: Sampling, whole: list[int], num_prompt: int, index: int
    ) -> Decision:
        history = array("I", whole[: num_prompt + index])
        allowed = None
        if sampling.grammar:
            allowed = self._grammars.state(
                sampling.grammar, history[num_prompt:], ignore_eos=sampling.ignore_eos
            ).allowed
        chunk = Chunk(
            *([], [], 0, True, sampling, index, index),
            history=history,
            num_prompt=num_prompt,
            allowed=allowed,
        )
        row = row.clone()
        if is_adjusted(chunk):
            adjust(row, chunk, self._tokenizer.eos_ids)
        return decide(row, sampling, index)


@dataclass
class Tally:
    """Sums over interrupted streams; `judge` None: nothing is excused."""

    judge: Judge | None
    streams: int = 0
    cuts: int = 0
    decisions: int = 0
    """Tokens that were decided after the first cut."""
    excused: int = 0
    worst_logprob: float = 0.0
    smallest_margin: float = float("inf")
    """Of the undisturbed streams."""
    problems: list[str] = field(default_factory=list)

    def undisturbed(self, name: str, calm: Stream) -> None:
        """It must be what its own tokens, read at once, say."""
        if self.judge is None:
            return
        for spec, said in zip(calm.specs, calm.said, strict=True):
            for i, decision in enumerate(self.judge.decisions(spec, said.ids)):
                self.smallest_margin = min(self.smallest_margin, decision.margin)
                if decision.token != said.ids[i] and decision.margin > MARGIN:
                    self.problems.append(f"{name}: undisturbed, token {i} by {decision.margin:g}")

    def compare(self, name: str, calm: Stream, cuts: Sequence[Cut], stream: Stream) -> None:
        """Note what is not as it should be."""
        self.streams += 1
        self.cuts += stream.num_cut
        where = f"{name}, cut at {[(cut.index, cut.position, cut.code) for cut in cuts]}"
        if stream.error is not None:
            self.problems.append(f"{where}: {stream.error}")
            return
        if stream.num_cut < len(cuts):
            self.problems.append(f"{where}: {stream.num_cut} cuts were made")
        for cut in cuts:
            self.decisions += len(stream.said[cut.index].ids) - cut.position
        differs = False
        for spec, whole, said in zip(calm.specs, calm.said, stream.said, strict=True):
            if whole.ids == said.ids:
                self._same(f"{where}, choice {spec.index}", whole, said)
                continue
            differs = True
            at = _first_difference(whole.ids, said.ids)
            margin = self._margin(spec, whole.ids, at)
            if margin > MARGIN:
                self.problems.append(
                    f"{where}, choice {spec.index}: other tokens from {at} on, by {margin:g}:"
                    f" {whole.ids[at - 1 : at + 4]} / {said.ids[at - 1 : at + 4]}"
                )
        self.excused += differs
        if not differs and stream.usage != calm.usage:
            self.problems.append(f"{where}: usage {stream.usage}, not {calm.usage}")

    def _margin(self, spec: ChoiceSpec, ids: Sequence[int], at: int) -> float:
        if self.judge is None or at >= len(ids):
            return float("inf")
        return self.judge.decisions(spec, ids)[at].margin

    def _same(self, where: str, whole: Said, said: Said) -> None:
        """All that a client sees of equal tokens."""
        tolerance = MARGIN if self.judge is not None else 0.0
        found = differences(whole, said, tolerance=tolerance)
        self.problems += [f"{where}: {one}" for one in found]
        if not found:
            self.worst_logprob = max(self.worst_logprob, worst_distance(whole, said))

    def check(self) -> None:
        """Everything was exact, or excused and rare."""
        print(self.summary())
        assert not self.problems, "\n".join([f"{len(self.problems)}:", *self.problems[:12]])
        assert self.excused <= EXCUSED_SHARE * self.streams
        assert self.judge is not None or not self.excused

    def summary(self) -> str:
        return (
            f"{self.streams} interrupted streams, {self.cuts} cuts, {self.decisions} decisions"
            f" after one, {self.excused} excused, log-probabilities within"
            f" {self.worst_logprob:.1e}, smallest margin {self.smallest_margin:.1e}"
        )


def _first_difference(whole: Sequence[int], said: Sequence[int]) -> int:
    pairs = enumerate(zip(whole, said, strict=False))
    shorter = min(len(whole), len(said))
    return next((at for at, (one, other) in pairs if one != other), shorter)
