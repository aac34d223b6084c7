"""Layers that look back only so far, across every border of chunks, blocks and windows."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.worker.model_families import MISTRAL, QWEN3, spread
from tests.unit.worker.tiny_llama import (
    BLOCK,
    NULL,
    Bench,
    bench_of,
    chunk_of,
    make_model,
    prompt_of,
    reference,
)

TOLERANCE = 1e-4
WINDOWS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]
LENGTH = 5 * BLOCK + 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("windows")
    return {w: make_model(root / str(w), **MISTRAL, sliding_window=w) for w in WINDOWS}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5, 1000])
def test_chunks_shorter_and_longer_than_the_window(
    folders: dict[int, Path], window: int, size: int
) -> None:
    ids = prompt_of(LENGTH)
    blocks = random.Random(window).sample(range(96), 6)
    with bench_of(folders[window]) as bench:
        ours = bench.in_chunks(blocks, ids, size)
    assert spread(ours, reference(folders[window]).logits(ids)).largest < TOLERANCE


@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1, BLOCK + 2])
def test_contexts_as_long_as_the_window(folders: dict[int, Path], length: int) -> None:
    """The last token that sees all, and the first that does not."""
    ids = prompt_of(length)
    folder = folders[BLOCK + 1]
    for sizes in ((1000,), (length - 1 or 1, 1), (1,)):
        with bench_of(folder) as bench:
            ours = bench.in_chunks([3, 5], ids, *sizes)
        assert spread(ours, reference(folder).logits(ids)).largest < TOLERANCE


def test_the_window_counts(folders: dict[int, Path], tmp_path: Path) -> None:
    """What the other tests rely on: one token more or less gives other logits, from where it is
    beyond the window on."""
    ids = prompt_of(LENGTH)
    full = make_model(tmp_path, **MISTRAL, sliding_window=NULL)
    found: dict[int | None, Tensor] = {}
    for window, folder in (*folders.items(), (None, full)):
        with bench_of(folder) as bench:
            found[window] = bench.in_chunks([0, 1, 2, 3, 4, 5], ids, 9)
    for window in folders:
        before = spread(found[window][:window], found[None][:window])
        assert before.largest < TOLERANCE
        assert spread(found[window][window:], found[None][window:]).largest > 0.1
    assert spread(found[BLOCK], found[BLOCK + 1]).largest > 0.1


@pytest.mark.parametrize("named", [False, True], ids=["all_slide", "some_slide"])
def test_many_in_one_step_at_all_lengths(tmp_path: Path, named: bool) -> None:
    """Sequences that decode together, and chunks beside them, each with its own borders."""
    some = {
        **QWEN3, "head_dim": 8, "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }  # fmt: skip
    folder = make_model(tmp_path, **(some if named else MISTRAL), sliding_window=BLOCK + 3)
    lengths = [2, 130, BLOCK + 3, BLOCK + 4, 129, 260, 3, 17, 40, 70]
    prompts = [prompt_of(length, salt=2) for length in lengths]
    with bench_of(folder, num_blocks=200) as bench:
        free = random.Random(3).sample(range(200), 200)
        tables = [[free.pop() for _ in range(-(-length // BLOCK))] for length in lengths]
        bench.logits(
            [chunk_of(t, ids[:-1]) for t, ids in zip(tables[:8], prompts[:8], strict=True)]
        )
        bench.logits(
            [chunk_of(t, ids[:20]) for t, ids in zip(tables[8:], prompts[8:], strict=True)]
        )
        chunks = [
            chunk_of(table, ids[start:], start)
            for table, ids, start in zip(
                tables, prompts, [*(length - 1 for length in lengths[:8]), 20, 20], strict=True
            )
        ]
        ours = bench.logits(chunks)
    for logits, ids in zip(ours, prompts, strict=True):
        theirs = reference(folder).logits(ids)[-len(logits) :]
        assert spread(logits, theirs).largest < TOLERANCE


def test_masks_are_made_where_something_is_hidden(folders: dict[int, Path]) -> None:
    """A model without windows, or a context within them, pays nothing for windows."""
    bench = Bench(folders[3 * BLOCK])
    chunks = [chunk_of([0, 1], prompt_of(1), 9), chunk_of([2, 3], prompt_of(2 * BLOCK))]
    parts = bench.runner.kv.plan(chunks).parts
    assert [part.masks for part in parts] == [{3 * BLOCK: None}] * 2
    late = bench.runner.kv.plan([chunk_of([0, 1, 2, 3], prompt_of(1), 3 * BLOCK)]).parts[0]
    mask = late.masks[3 * BLOCK]
    assert mask is not None
    assert torch.equal(mask.flatten().isinf().nonzero().flatten(), torch.tensor([0]))
    bench.arena.close()
