"""The demo model as it is shipped: small, loadable, of the promised shape, and fluent.

Says nothing of how it is served; the weights may be trained anew without a change here.
"""

import copy
import functools
import importlib
import inspect
import json
import re
import struct
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

import baton

FOLDER = Path(baton.__file__).parent / "demo_model"
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
DOCUMENTED = ("argparse", "asyncio", "collections", "email", "functools", "logging", "os", "re")


def read_json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return content


def render(messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
    def raise_exception(reason: str) -> None:
        raise ValueError(reason)

    settings = read_json("tokenizer_config.json")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(settings["chat_template"]).render(
        messages=messages,
        bos_token=settings["bos_token"],
        eos_token=settings["eos_token"],
        add_generation_prompt=add_generation_prompt,
    )


@functools.cache
def vocabulary() -> set[str]:
    """Words of the language reference and of a few modules' docstrings, in lower case."""
    texts = list(topics.values())
    for name in DOCUMENTED:
        module = importlib.import_module(name)
        members = [member for _, member in inspect.getmembers(module, callable)]
        methods = [
            m for member in members if inspect.isclass(member) for m in vars(member).values()
        ]
        texts += [d for d in map(inspect.getdoc, [module, *members, *methods]) if d]
    return {word for text in texts for word in words(text)}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_folder_holds_the_five_files_in_less_than_8_megabytes() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}

    assert set(sizes) == FILES
    assert sum(sizes.values()) <= 8_000_000


def test_config_says_grouped_query_attention_and_tied_embeddings() -> None:
    config = read_json("config.json")

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    assert config["max_position_embeddings"] == 4096
    assert config["rope_theta"] == 10000.0


def test_weights_have_the_shapes_of_the_config_and_no_second_embedding() -> None:
    config = read_json("config.json")
    with (FOLDER / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    width, kv_width = (
        config["head_dim"] * config[heads]
        for heads in ("num_attention_heads", "num_key_value_heads")
    )
    hidden, layers = config["hidden_size"], range(config["num_hidden_layers"])

    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert "lm_head.weight" not in header
    assert header["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], hidden]
    for layer in (f"model.layers.{i}.self_attn" for i in layers):
        assert header[f"{layer}.q_proj.weight"]["shape"] == [width, hidden]
        assert header[f"{layer}.k_proj.weight"]["shape"] == [kv_width, hidden]
        assert header[f"{layer}.v_proj.weight"]["shape"] == [kv_width, hidden]


def test_tokenizer_and_configs_agree_on_size_and_special_tokens() -> None:
    config, generation = read_json("config.json"), read_json("generation_config.json")
    settings = read_json("tokenizer_config.json")
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    assert tokenizer.get_vocab_size() == config["vocab_size"]
    for name in ("bos", "eos", "pad"):
        token_id = tokenizer.token_to_id(settings[f"{name}_token"])
        assert token_id == config[f"{name}_token_id"] == generation[f"{name}_token_id"]
    assert "repetition_penalty" not in generation


@pytest.mark.parametrize(
    "text",
    ["Return the", "  def f(x):\n\treturn x  # tabs", "Größe, 大きさ, 🎽", "<|end|> said he"],
)
def test_plain_text_gets_bos_and_survives_the_round_trip(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    ids = tokenizer.encode(text).ids

    assert ids[0] == tokenizer.token_to_id("<|bos|>")
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text


def test_template_renders_roles_parts_and_the_generation_prompt() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief.\n"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Ret"}, {"type": "text", "text": "urn"}],
        },
        {"role": "assistant", "content": " it."},
        {"role": "user", "content": "  Raise"},
    ]
    history = "<|bos|><|system|>Be brief.\n<|end|><|user|>Return<|end|><|assistant|> it.<|end|>"

    assert render(messages) == history + "<|user|>  Raise<|end|><|assistant|>"
    assert render(messages, add_generation_prompt=False) == history + "<|user|>  Raise<|end|>"
    assert render([{"role": "assistant", "content": None}]).startswith(
        "<|bos|><|assistant|><|end|>"
    )


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "4"}, "unknown role: tool"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "not image_url"),
    ],
)
def test_template_refuses_what_the_model_cannot_read(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        render([message])


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def continuation(model: Any, *, in_chat: bool) -> str:
    """What the model makes of "Return the", greedily, in at most 48 tokens."""
    torch = pytest.importorskip("torch")
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    prompt = render([{"role": "user", "content": "Return the"}]) if in_chat else "Return the"
    inputs = torch.tensor([tokenizer.encode(prompt, add_special_tokens=not in_chat).ids])
    output = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=48, do_sample=False
    )
    text: str = tokenizer.decode(output[0, inputs.shape[1] :].tolist())
    return text


def reads_as_english(text: str) -> bool:
    spoken, known = words(text), vocabulary()
    plain = sum(c.isascii() and (c.isalpha() or c in " \n.,:;'\"()_-") for c in text)
    return (
        plain >= 0.9 * len(text)
        and len(spoken) >= 5
        and sum(word in known for word in spoken) >= 0.7 * len(spoken)
        and len(set(spoken)) >= 0.4 * len(spoken)  # it does not run in circles
    )


@pytest.mark.parametrize("in_chat", [False, True], ids=["text", "chat"])
def test_greedy_continuation_reads_as_technical_english(model: Any, in_chat: bool) -> None:
    text = continuation(model, in_chat=in_chat)

    assert reads_as_english(text), text


@pytest.mark.parametrize("in_chat", [False, True], ids=["text", "chat"])
def test_continuation_of_swapped_layers_is_nonsense(model: Any, in_chat: bool) -> None:
    swapped = copy.deepcopy(model)
    first, *middle, last = swapped.model.layers
    swapped.model.layers = type(swapped.model.layers)([last, *middle, first])

    text = continuation(swapped, in_chat=in_chat)

    assert not reads_as_english(text), text
