"""Make the demo model: a small Llama trained on the English of Python's own documentation.

The text comes from the running interpreter alone (`demo_model_text`), so anybody can make the
model again. It learns two things on the same text: to continue it, and to continue it as the
assistant of a chat whose user gave the first words. Its greedy continuations read as technical
English, so a swapped layer or a stale KV block shows as nonsense.

The shipped weights saw 8 million tokens, forty times the text, in several stints on a busy machine,
each begun with `--resume`; two idle cores need about half an hour for that many:
`python scripts/train_demo_model.py --minutes 35 --bf16 --compile`.
Needs torch >= 2.9 (Muon), tokenizers and transformers. It knows nothing of serving.
"""

import argparse
import json
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from demo_model_text import corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

PAD, BOS, END, SYSTEM, USER, ASSISTANT = range(6)
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB_SIZE = 3072
MAX_POSITIONS = 4096
ROPE_THETA = 10000.0
TOKENS_PER_STEP = 4096
LENGTHS = (256, 256, 1024, 2048)  # of the sequences of one step, drawn anew for each
CHAT_CHARS = 250  # a turn ends with the paragraph that reaches this
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Continue the text.",
    "You write clear technical English.",
    "Complete the sentence and explain it.",
)
SAMPLES = (
    "Return the",
    "Raise an exception if",
    "The default value is",
    "This module provides",
)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'system' if message['role'] == 'developer' else message['role'] %}
    {%- if role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role: ' + role) }}
    {%- endif %}
    {{- '<|' + role + '|>' }}
    {%- set content = message['content'] %}
    {%- if content is string %}
        {{- content }}
    {%- elif content %}
        {%- for part in content %}
            {%- if part['type'] != 'text' %}
                {{- raise_exception('this model reads text only, not ' + part['type']) }}
            {%- endif %}
            {{- part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": SPECIAL[BOS],
    "eos_token": SPECIAL[END],
    "pad_token": SPECIAL[PAD],
    "model_max_length": MAX_POSITIONS,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}
GENERATION_CONFIG = {
    "bos_token_id": BOS,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "do_sample": False,
    "max_new_tokens": 256,  # for requests that ask for no number
}

# ---- tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` tokens that puts <|bos|> before plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS)]
    )
    return tokenizer


# ---- examples -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Examples:
    """Turns prose into token sequences: plain text and chats, cut anew in every epoch."""

    modules: list[list[str]]
    tokenizer: Tokenizer
    rng: random.Random

    def batches(self) -> Iterator[Tensor]:
        """Endless batches [sequences, length + 1] of token ids."""
        passages = self._shuffled()
        while True:
            length = self.rng.choice(LENGTHS)
            yield torch.tensor(
                [self._row(passages, length + 1) for _ in range(TOKENS_PER_STEP // length)]
            )

    def _row(self, passages: Iterator[list[int]], length: int) -> list[int]:
        """Whole passages from <|bos|> on, as a server sees them; the last one is cut."""
        row: list[int] = []
        while len(row) < length:
            row += next(passages)
        return row[:length]

    def _shuffled(self) -> Iterator[list[int]]:
        """Strangers side by side: from its neighbours the model could tell what comes next."""
        while True:
            epoch = [ids for module in self.modules for ids in self._passages(module)]
            self.rng.shuffle(epoch)
            yield from epoch

    def _passages(self, module: list[str]) -> list[list[int]]:
        """The module cut into plain passages and chats of one or more turns."""
        passages: list[list[int]] = []
        in_chat, at = False, 0
        while at < len(module):
            chat = self.rng.random() < 0.6
            end = self._end(module, at, CHAT_CHARS if chat else self._plain_chars())
            text = "\n\n".join(module[at:end])
            if not chat:
                passages.append([BOS, *self._encode(text), END])
            elif in_chat and self.rng.random() < 0.2:
                passages[-1] += self._turn(text)
            else:
                passages.append([BOS, *self._system(), *self._turn(text)])
            in_chat, at = chat, end
        return passages

    def _end(self, module: list[str], begin: int, chars: float) -> int:
        """Where a passage ends that has at least so many characters, if the module has them."""
        length, end = 0, begin
        while length < chars and end < len(module):
            length += len(module[end])
            end += 1
        return end

    def _plain_chars(self) -> float:
        return math.exp(self.rng.uniform(math.log(100), math.log(3000)))

    def _system(self) -> list[int]:
        if self.rng.random() < 0.8:
            return []
        return [SYSTEM, *self._encode(self.rng.choice(SYSTEM_PROMPTS)), END]

    def _turn(self, text: str) -> list[int]:
        """The first words are the user's, what follows is the assistant's, blank and all."""
        gaps = [gap.start() for gap in re.finditer(r"\s+", text)]
        cut = gaps[min(self.rng.randrange(12), len(gaps) - 1)]
        user, assistant = self._encode(text[:cut]), self._encode(text[cut:])
        return [USER, *user, END, ASSISTANT, *assistant, END]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


# ---- training -----------------------------------------------------------------------------------


def new_model() -> LlamaForCausalLM:
    """An untrained model: grouped-query attention, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


class Training:
    """The state of one run. What it has learned so far can be saved at any step."""

    def __init__(self, options: argparse.Namespace, examples: Examples) -> None:
        self.options = options
        self.model = new_model()
        if options.resume is not None:
            self.model.load_state_dict(
                LlamaForCausalLM.from_pretrained(options.resume).state_dict()
            )
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        known = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in known]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        )
        self.done = 0.0  # part of the time that is over
        self.tokens = 0
        self.batches = examples.batches()

    def run(self, checkpoint: Callable[[], None]) -> None:
        """Train until the time is over; `checkpoint` is called every five minutes."""
        start = time.monotonic()
        compiled = torch.compile(self._loss, dynamic=False)
        loss_of = compiled if self.options.compile else self._loss
        loss, reported, saved = math.nan, 0.0, 0.0
        while (elapsed := time.monotonic() - start) < self.options.minutes * 60:
            self.done = elapsed / (self.options.minutes * 60)
            if elapsed - reported >= 20:
                speed, left = self.tokens / elapsed, self.options.minutes * 60 - elapsed
                print(
                    f"{elapsed:5.0f} s  loss {loss:.3f}  {self.tokens / 1e6:.2f} M tokens"
                    f"  {speed:.0f} tokens/s  ETA {left:.0f} s",
                    flush=True,
                )
                reported = elapsed
            if elapsed - saved >= 300:
                checkpoint()
                saved = elapsed
            now = self._step(loss_of)
            loss = now if math.isnan(loss) else 0.98 * loss + 0.02 * now

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.bf16):
            logits = self.model(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def _step(self, loss_of: Callable[[Tensor, Tensor], Tensor]) -> float:
        batch = next(self.batches)
        loss = loss_of(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm_up = min(1.0, (self.tokens + TOKENS_PER_STEP) / (50 * TOKENS_PER_STEP))
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * self.done)) / 2
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.options.learning_rate * warm_up * cosine
            optimizer.step()
            optimizer.zero_grad()
        self.tokens += batch.shape[0] * (batch.shape[1] - 1)
        return float(loss)


# ---- the folder ---------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model folder, weights in bfloat16; each file appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        rounded = new_model()
        rounded.load_state_dict(model.state_dict())
        rounded.bfloat16().save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | {"rope_theta": ROPE_THETA})
        write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
        write_json(folder / "generation_config.json", GENERATION_CONFIG)
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)
            path.replace(out / path.name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON file as people like to read it."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def sample(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Print greedy continuations, of plain text and as a chat."""
    generate: Callable[..., Tensor] = cast("Any", model).generate
    for prompt in SAMPLES:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        for kind, prefix in (("text", [BOS, *ids]), ("chat", [BOS, USER, *ids, END, ASSISTANT])):
            inputs = torch.tensor([prefix])
            answer = generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=60,
                do_sample=False,
            )
            print(f"{kind}: {prompt} |{tokenizer.decode(answer[0, len(prefix) :].tolist())}")


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Train Baton's demo model.")
    parser.add_argument("--out", type=Path, default=Path("baton/demo_model"), metavar="DIR")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="saved here on the way")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="begin with these weights")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the training")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true", help="faster where the CPU has avx512_bf16")
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    return parser.parse_args()


def main() -> None:
    """Gather the text, train, save, show samples."""
    options = arguments()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    modules = corpus()
    if options.resume is not None:
        tokenizer = Tokenizer.from_file(str(options.resume / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer("\n\n".join(module) for module in modules)
    examples = Examples(modules, tokenizer, random.Random(options.seed))
    training = Training(options, examples)
    characters = sum(len(text) for module in modules for text in module)
    weights = sum(p.numel() for p in training.model.parameters())
    print(f"{characters} characters of {len(modules)} modules, {weights} weights", flush=True)

    def checkpoint() -> None:
        if options.checkpoints is not None:
            save(training.model, tokenizer, options.checkpoints)

    training.run(checkpoint)
    save(training.model, tokenizer, options.out)
    sample(training.model, tokenizer)


if __name__ == "__main__":
    main()
