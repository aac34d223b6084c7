"""Everything that reads bytes or values which others wrote: how, valid examples, typed errors.

`covers` names the places in the packages (`file:function`, or `file:` and the module's constant)
whose decoding an entry reaches; `test_registry` finds those places by itself and fails if one is
missing here. `check` holds what was accepted against what the rest of the code relies on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from protocol import codec
from protocol.bus import Message
from protocol.errors import BadMessage, ClientError, ConfigError
from protocol.events import Beat, EventEnvelope, KvSnapshot
from protocol.fragments import PART_HEADER, Joiner, split
from protocol.ids import is_name
from protocol.jobs import JobEnvelope, Pong
from protocol.openai import decode_chat, decode_completion
from protocol.out import OutEnvelope
from protocol.subjects import Subjects
from protocol.worker_info import WorkerInfo, problem
from tests.fuzz import engines, fronts
from tests.fuzz.mutations import Form
from tests.unit.protocol.wire_examples import examples
from text.assets import AssetsError
from text.chat import MessagesError
from text.template import TemplateError
from worker.engine.grammar import GrammarError
from worker.engine.sequences import SequenceRefused
from worker.engine.vllm.wire import WireError
from worker.transfer.reactor import Broken
from worker.transfer.tcp_wire import (
    Request,
    Status,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)

SUBJECTS: Final = Subjects("fuzz")


def _anything(_value: Any) -> None: ...


@dataclass(frozen=True)
class Decoder:
    name: str
    decode: Callable[[bytes], Any]
    corpus: Callable[[], list[bytes]]
    allowed: tuple[type[BaseException], ...]
    form: Form = "bytes"
    check: Callable[[Any], None] = _anything
    covers: tuple[str, ...] = ()


def _wire(kind: type) -> Callable[[], list[bytes]]:
    @cache
    def corpus() -> list[bytes]:
        return [
            codec.encode_info(message) if kind is WorkerInfo else codec.encode(message)  # type: ignore[arg-type]
            for message in examples().values()
            if isinstance(message, kind)
        ]

    return corpus


def _encodes_again(value: Any) -> None:
    """What was read can be sent on, and then it is the same."""
    again = codec.encode(value)
    readers: dict[Any, Callable[[bytes], Any]] = {
        JobEnvelope: codec.decode_jobs,
        OutEnvelope: codec.decode_out,
        EventEnvelope: codec.decode_events,
        KvSnapshot: codec.decode_snapshot,
    }
    read = readers.get(type(value))
    if read is not None and codec.encode(read(again)) != again:
        raise AssertionError("does not come back as it went")


# -- parts of large payloads


def _parts(data: bytes) -> list[Message]:
    """A line for each part's header; the rest of the line is its payload."""
    found = []
    for line in data.split(b"\n"):
        head, _, payload = line.partition(b"|")
        text = head.decode("latin-1")
        found.append(Message("s", payload, headers={PART_HEADER: text}))
    return found


def _join(data: bytes) -> Joiner:
    joiner = Joiner(max_bytes=4096, max_joins=8)
    for at, part in enumerate(_parts(data)):
        joiner.add(part, float(at))
    return joiner


def _is_bounded(joiner: Joiner) -> None:
    held = sum(len(part) for join in joiner._joins.values() for part in join.parts)
    if len(joiner) > 8 or joiner.held_bytes > 4096 or held != joiner.held_bytes:
        raise AssertionError(f"{len(joiner)} joins, {joiner.held_bytes} bytes, really {held}")


def _part_lines() -> list[bytes]:
    lines = [
        (headers or {})[PART_HEADER].encode() + b"|" + payload.replace(b"\n", b" ")
        for payload, headers in split(b"x" * 500, None, max_payload=200, part_id="a.1")
    ]
    return [b"\n".join(lines), b"\n".join(lines[:-1]), b"\n".join(lines + lines)]


# -- names


def _subject(data: bytes) -> object:
    text = data.decode("latin-1")
    return SUBJECTS.gone_worker(text), SUBJECTS.client_of(text), SUBJECTS.endpoint_of(text)


def _name(data: bytes) -> str:
    text = data.decode("utf-8", "replace")
    return text if is_name(text) else ""


def _is_subject(name: str) -> None:
    if name:
        SUBJECTS.jobs(name, name)


# -- discovery


def _is_worker(info: WorkerInfo) -> None:
    SUBJECTS.jobs(info.worker_id, info.incarnation)
    if problem(info) or info.layout.block_size < 1 or info.capacity.num_blocks < 1:
        raise AssertionError(f"accepted {info}")


def _messages(*kinds: tuple[str, Any, type]) -> list[Decoder]:
    return [
        Decoder(
            f"protocol.{name}",
            decode,
            _wire(kind),
            (BadMessage,),
            "msgpack",
            _encodes_again,
            covers=(f"protocol/codec.py:_{name}",),
        )
        for name, decode, kind in kinds
    ]


DECODERS: Final[tuple[Decoder, ...]] = (
    *_messages(
        ("jobs", codec.decode_jobs, JobEnvelope),
        ("out", codec.decode_out, OutEnvelope),
        ("events", codec.decode_events, EventEnvelope),
        ("beat", codec.decode_beat, Beat),
        ("pong", codec.decode_pong, Pong),
        ("snapshot", codec.decode_snapshot, KvSnapshot),
    ),
    Decoder(
        "protocol.info", codec.decode_info, _wire(WorkerInfo), (BadMessage,), "json",
        covers=("protocol/codec.py:_info",),
    ),
    Decoder("protocol.parts", _join, _part_lines, (), check=_is_bounded),
    Decoder(
        "protocol.subjects", _subject,
        lambda: [SUBJECTS.gone("r", "w", "i").encode(), SUBJECTS.client("r", "7").encode(),
                 SUBJECTS.api("chat.completions").encode()],
        (),
    ),
    Decoder("protocol.names", _name, lambda: [b"worker-1", b"a" * 64], (), check=_is_subject),
    Decoder(
        "discovery.value", fronts.registry_value, _wire(WorkerInfo), (fronts.Unreadable,), "json",
        _is_worker, covers=("discovery/changes.py:_decoder",),
    ),
    Decoder(
        "openai.chat", decode_chat, fronts.chat_bodies, (ClientError,), "json",
        covers=("protocol/openai.py:_chat",),
    ),
    Decoder(
        "openai.completion", decode_completion, fronts.completion_bodies, (ClientError,), "json",
        covers=("protocol/openai.py:_completion",),
    ),
    Decoder(
        "front.chat", fronts.front_chat, fronts.chat_bodies, (ClientError,), "json",
        fronts.check_prepared,
        covers=("router/grammar_options.py:_parsed", "text/chat.py:_arguments"),
    ),
    Decoder(
        "front.completion", fronts.front_completion, fronts.completion_bodies, (ClientError,),
        "json", fronts.check_prepared,
    ),
    Decoder(
        "text.messages", fronts.messages, fronts.message_lists, (MessagesError, fronts.Unreadable),
        "json",
    ),
    Decoder("text.assets", fronts.assets, fronts.asset_bytes, (AssetsError,), "msgpack",
            covers=("text/assets.py:decode",)),
    Decoder(
        "text.tokenizer", fronts.tokenizer, fronts.tokenizer_files, (AssetsError,), "json",
        covers=("text/assets.py:_json_object",),
    ),
    Decoder("text.tokenizer_config", fronts.tokenizer_config, fronts.tokenizer_config_files,
            (AssetsError,), "json"),
    Decoder("text.generation_config", fronts.generation_config, fronts.generation_config_files,
            (AssetsError,), "json"),
    Decoder("text.template", fronts.template, fronts.templates, (TemplateError,), "text"),
    Decoder(
        "config.router", fronts.router_file, fronts.router_files, (ConfigError,), "text",
        covers=("baton/settings.py:load_settings", "baton/settings.py:_read"),
    ),
    Decoder("config.worker", fronts.worker_file, fronts.worker_files, (ConfigError,), "text"),
    Decoder("config.environment", fronts.environment, fronts.environments, (ConfigError,), "json"),
    Decoder("config.processes", fronts.processes_file, fronts.processes_files, (ConfigError,),
            "json", covers=("baton/up.py:open_processes",)),
    Decoder("router.block_hashes", fronts.block_hashes, fronts.many_hashes, (), "bytes",
            lambda index: index.validate(),
            covers=("router/scheduling/prefix_index.py:_keys_of",)),
    Decoder(
        "tcp.request", lambda data: decode_request(_sized(data, 32)),
        lambda: [encode_request(Request(3, 7, 2**63, 8192))], (Broken,),
        covers=("worker/transfer/tcp_wire.py:decode_request",),
    ),
    Decoder(
        "tcp.reply", lambda data: decode_reply(_sized(data, 16)),
        lambda: [encode_reply(status, 4096) for status in Status], (Broken,),
        covers=("worker/transfer/tcp_wire.py:decode_reply",),
    ),
    Decoder(
        "vllm.answer", engines.answer, engines.answers, (WireError,), "json",
        covers=("worker/engine/vllm/wire.py:_answers",),
    ),
    Decoder("vllm.sse", engines.sse, engines.streams, (WireError,), "text"),
    Decoder(
        "vllm.models", engines.models, engines.model_lists, (ConfigError,), "json",
        covers=("worker/engine/vllm/facts.py:read_models",),
    ),
    Decoder("vllm.metrics", engines.metrics, engines.expositions, (ValueError,), "text"),
    Decoder("vllm.version", engines.version, engines.versions, (), "json",
            covers=("worker/engine/vllm/watch.py:read_version",)),
    Decoder(
        "vllm.kv_events", engines.kv_batch, engines.kv_batches, (ValueError, OverflowError),
        "msgpack", engines.check_index,
        covers=("worker/engine/vllm/kv_index.py:_batches",),
    ),
    Decoder("vllm.kv_frames", engines.kv_frames, engines.frame_lists, (),
            covers=("worker/engine/vllm/kv_index.py:read_frames",)),
    Decoder(
        "vllm.handle", engines.vllm_handle, engines.vllm_handles, (SequenceRefused,), "msgpack",
        covers=("worker/engine/vllm/handles.py:check_handle",),
    ),
    Decoder("engine.grammar", engines.grammar, engines.schemas, (GrammarError,), "json",
            covers=("worker/engine/grammar.py:_checked",)),
    Decoder("engine.job", engines.job, _wire(JobEnvelope), (BadMessage, ValueError), "msgpack"),
    Decoder("engine.weights_index", engines.weights_index, engines.weights_indexes,
            (ConfigError,), "json", covers=("worker/engine/torch_weights.py:_listed",)),
)  # fmt: skip

EXEMPT: Final = {
    "worker/transfer/nixl_interfaces.py:_v4_addresses": "the kernel's answer",
    "worker/transfer/ucx_listener.py:_has_spoken": "the kernel's answer",
    "router/streams.py:_untaken": "the kernel's answer",
    "worker/transfer/tcp_sink.py:_receive": "eight bytes: every value is one",
    "worker/transfer/ucx_sink.py:_exchange": "eight bytes: every value is one",
    "worker/engine/simulated_choice.py:_number": "a digest of our own",
    "worker/engine/torch_sampling.py:uniform": "a digest of our own",
    "router/scheduling/prefix_index.py:_mask": "a digest of our own",
    "baton/up.py:_get_json": "the answer of a process that we started; what is no object is none",
    "router/admin.py:_cluster_info": "the answer of a router with our own parent",
    "baton/up.py:_say_how_to_ask": "only encodes",
    "baton/logs.py:format": "only encodes",
}
"""Not what others wrote, and why; `baton/bench*` talk to themselves."""


def _sized(data: bytes, size: int) -> bytes:
    """A header is read whole or not at all."""
    return data[:size].ljust(size, b"\0")
