"""What a router says to one worker: mailbox `jobs.<worker>.<incarnation>`.

Jobs are idempotent: a job that the worker already has makes it send that job's state again.
"""

import msgspec

from protocol.handoff import KvHandle
from protocol.sampling import Sampling


class Tokens(msgspec.Struct, tag="t", array_like=True, frozen=True):
    """A prompt as packed 32-bit token ids."""

    packed: bytes


class Body(msgspec.Struct, tag="b", array_like=True, frozen=True):
    """A prompt that only an external engine can read: the client's JSON as it came."""

    endpoint: str
    json: bytes


Prompt = Tokens | Body


class Prefill(msgspec.Struct, tag="P", array_like=True, frozen=True, kw_only=False):
    """Compute KV for prompt + output, sample one token, lend the blocks."""

    attempt: int
    choice: str
    prompt: Prompt
    sampling: Sampling
    output: bytes = b""
    """Packed ids that the client already has (a resume); they are not sampled again."""
    chars_sent: int = 0
    """Characters of the output's text that were already released."""
    cache_salt: str = ""


class Decode(msgspec.Struct, tag="D", array_like=True, frozen=True):
    """Continue after `output`. With a handle its blocks are pulled; without, prefilled here."""

    attempt: int
    choice: str
    prompt: Prompt
    sampling: Sampling
    handle: KvHandle | None = None
    output: bytes = b""
    chars_sent: int = 0
    cache_salt: str = ""


class Cancel(msgspec.Struct, tag="C", array_like=True, frozen=True):
    """Stop the attempt, whatever it is doing; unknown attempts are ignored."""

    attempt: int


class Renew(msgspec.Struct, tag="W", array_like=True, frozen=True):
    """Keep these handles for another lease."""

    handle_ids: list[str]


class Release(msgspec.Struct, tag="L", array_like=True, frozen=True):
    """These handles are not needed any more."""

    handle_ids: list[str]


class Replay(msgspec.Struct, tag="R", array_like=True, frozen=True):
    """Send the state of `attempt` again, and its tokens from output index `index` on."""

    attempt: int
    index: int


class Done(msgspec.Struct, tag="E", array_like=True, frozen=True):
    """These attempts' outcomes have arrived; forget them."""

    attempts: list[int]


class Ping(msgspec.Struct, tag="?", array_like=True, frozen=True):
    """Answered on the reply subject with `Pong`: is this incarnation alive?"""


class GetAssets(msgspec.Struct, tag="A", array_like=True, frozen=True):
    """Answered on the reply subject with the encoded model assets, or empty if not `digest`."""

    digest: str


class GetKvSnapshot(msgspec.Struct, tag="S", array_like=True, frozen=True):
    """Answered on the reply subject with `KvSnapshot`."""


Job = Prefill | Decode | Cancel | Renew | Release | Replay | Done | Ping | GetAssets | GetKvSnapshot


class JobEnvelope(msgspec.Struct, array_like=True, frozen=True):
    """All that one turn of a router's loop has to say to one worker."""

    router: str
    jobs: list[Job]


class Pong(msgspec.Struct, array_like=True, frozen=True):
    worker: str
    incarnation: str
