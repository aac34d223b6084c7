"""Two small tokenizers trained here, as model folders, and transformers as the reference."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from text.assets import byte_assets, load_assets
from text.tokenizer import Tokenizer

SPECIAL = [
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|im_start|>",
    "<|im_end|>",
]
CORPUS = [
    "The router reads a request, counts its tokens and looks for a worker that has the prefix.",
    "A prefill worker computes the blocks of the prompt and hands a handle to a decode worker.",
    "größer Straße éléphant naïve 你好世界 こんにちは 😀 1 2 3 10 100 def add(a, b): return a",
] * 3


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_tokens(["<|r0|>", "<think>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 1)]
    )
    return inner


def byte_fallback_tokenizer() -> tokenizers.Tokenizer:
    """As Llama 2's: spaces are `▁`, what is not in the vocabulary is bytes."""
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz▁.,"),
        limit_alphabet=40,
    )
    inner.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    description = json.loads(inner.to_str())
    # trained as special ones; in real folders byte tokens are plain vocabulary
    description["added_tokens"] = description["added_tokens"][:3]
    inner = tokenizers.Tokenizer.from_str(json.dumps(description))
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return inner


def write_folder(folder: Path, inner: tokenizers.Tokenizer, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    model = {"model_type": "llama", "max_position_embeddings": 4096, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 6]}))
    return folder


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("byte_level"), byte_level_tokenizer())


@pytest.fixture(scope="session")
def byte_fallback_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte_fallback")
    return write_folder(
        folder, byte_fallback_tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


@pytest.fixture(scope="session")
def byte_level(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.from_assets(load_assets(byte_level_folder))


@pytest.fixture(scope="session")
def byte_fallback(byte_fallback_folder: Path) -> Tokenizer:
    return Tokenizer.from_assets(load_assets(byte_fallback_folder))


@pytest.fixture(scope="session")
def all_tokenizers(byte_level: Tokenizer, byte_fallback: Tokenizer) -> dict[str, Tokenizer]:
    made = {"byte_level": byte_level, "byte_fallback": byte_fallback}
    made["bytes"] = Tokenizer.from_assets(byte_assets())
    return made


@pytest.fixture(scope="session")
def reference(byte_level_folder: Path) -> Callable[..., str]:
    """`apply_chat_template` of transformers for any template."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(str(byte_level_folder))

    def render(template: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        kwargs.setdefault("add_generation_prompt", True)
        return str(
            theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
        )

    return render
