"""The small files that say how a model reads and writes text, as one value with a digest.

Workers load them from a model folder, routers get them over the wire; both build the same tokenizer
and the same chat template from the same value. It knows nothing of who sends it, nor of weights.
"""

import hashlib
from pathlib import Path
from typing import Any

import msgspec

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATE_JSON_FILE = "chat_template.json"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
BYTE_TOKENIZER_FILE = "baton_byte_tokenizer.json"
EXTRA_TEMPLATES_FOLDER = "additional_chat_templates"

FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_JSON_FILE,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
)
MAX_BYTES = 64 * 1024 * 1024
MAX_FILES = 64
BYTE_ROLES = ("system", "user", "assistant", "tool")
BYTE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] if message['role'] in roles else 'user' }}|>"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class AssetsError(Exception):
    """The files are missing, damaged or too large. The message is one line for the operator."""


class ModelAssets(msgspec.Struct, frozen=True):
    """File name to content, and the digest of all of them. Build it with `make_assets`."""

    files: dict[str, bytes]
    digest: str
    """sha256 in hex over the sorted names and contents."""

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; empty where the file is absent. Errors: AssetsError."""
        content = self.files.get(name)
        if content is None:
            return {}
        return _json_object(name, content)


def make_assets(files: dict[str, bytes]) -> ModelAssets:
    """Assets of these files. Errors: AssetsError where they are too many or too large."""
    _check_size(files)
    return ModelAssets(files=dict(files), digest=_digest(files))


def load_assets(folder: Path) -> ModelAssets:
    """Read the text files of a Hugging Face model folder. Errors: AssetsError."""
    if not folder.is_dir():
        raise AssetsError(f"model folder {folder} does not exist or is not a folder")
    files: dict[str, bytes] = {}
    for path in _candidates(folder):
        name = path.relative_to(folder).as_posix()
        files[name] = _read(path)
        if name.endswith(".json"):
            _json_object(str(path), files[name])
    if TOKENIZER_FILE not in files:
        raise AssetsError(f"model folder {folder} has no {TOKENIZER_FILE}")
    return make_assets(files)


def byte_assets(
    name: str = "simulated", *, max_context: int = 1 << 20, max_new_tokens: int = 256
) -> ModelAssets:
    """Assets that need no folder: one token per byte, a begin, an end and one marker per role.

    `max_new_tokens` is what an answer gets that asks for no number: the engine behind these assets
    may never end one by itself.
    """
    marker = {"name": name, "roles": BYTE_ROLES, "max_context": max_context}
    config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "roles": BYTE_ROLES}
    files = {
        BYTE_TOKENIZER_FILE: msgspec.json.encode(marker),
        TOKENIZER_CONFIG_FILE: msgspec.json.encode(config),
        GENERATION_CONFIG_FILE: msgspec.json.encode({"max_new_tokens": max_new_tokens}),
        CHAT_TEMPLATE_FILE: _byte_template().encode(),
    }
    return make_assets(files)


def encode(assets: ModelAssets) -> bytes:
    """The assets as bytes for the wire."""
    return msgspec.msgpack.encode(assets)


def decode(data: bytes | bytearray | memoryview) -> ModelAssets:
    """The assets from the wire. Errors: AssetsError if malformed, too large or altered."""
    if len(data) > MAX_BYTES + 65536:
        raise AssetsError(f"model assets are {len(data)} bytes, the limit is {MAX_BYTES}")
    try:
        assets = msgspec.msgpack.decode(data, type=ModelAssets)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AssetsError(f"model assets cannot be decoded: {error}") from error
    _check_size(assets.files)
    if assets.digest != _digest(assets.files):
        raise AssetsError("model assets do not match their digest")
    return assets


def _byte_template() -> str:
    roles = ", ".join(f"'{role}'" for role in BYTE_ROLES)
    return "{% set roles = [" + roles + "] %}" + BYTE_TEMPLATE


def _candidates(folder: Path) -> list[Path]:
    named = [folder / name for name in FILES]
    extra = sorted((folder / EXTRA_TEMPLATES_FOLDER).glob("*.jinja"))
    return [path for path in (*named, *extra) if path.is_file()]


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise AssetsError(f"{path} is larger than {MAX_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise AssetsError(f"{path} cannot be read: {error.strerror or error}") from error
    if content.startswith(b"version https://git-lfs"):
        raise AssetsError(f"{path} is a Git LFS pointer, not the file itself")
    return content


def _json_object(where: str, content: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AssetsError(f"{where} is damaged or cut short: {error}") from error


def _check_size(files: dict[str, bytes]) -> None:
    if len(files) > MAX_FILES:
        raise AssetsError(f"model assets have {len(files)} files, the limit is {MAX_FILES}")
    total = sum(map(len, files.values()))
    if total > MAX_BYTES:
        raise AssetsError(f"model assets are {total} bytes, the limit is {MAX_BYTES}")


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()
