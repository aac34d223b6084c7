"""KV in the arena's blocks as torch sees it, and attention over it.

A block is one contiguous piece `[layer, k/v, kv_head, token, dim]`. The unfilled rest of a block is
zero: attention over padding meets no numbers of whoever had the block before, and a handed-over
block carries none. Layers that look back only so far (a sliding window) have all of the KV too, and
a mask of their own. It knows no weights, no sampling and no pool.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from worker.engine.runner import Chunk
from worker.engine.torch_config import LlamaConfig

_MIN_GROUP_BLOCKS: Final = 16
"""Decoding sequences of up to so many blocks share a call, and beyond it those within a factor 2:
padding costs at most as much again."""
_READ_BYTES: Final = 4 << 20
"""Decoding sequences share a call while a layer's copy of their KV is no larger: it is read again
at once, out of a cache."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start .. stop - 1` of a step that attend in one call.

    Either one token of each of several sequences, or several tokens of one sequence.
    """

    start: int
    stop: int
    single_tokens: bool
    length: int
    """Tokens of the longest context, the part's own included."""
    index: Tensor | None
    """Where its KV stands (see `PagedKv.read`); None: its own rows are all the context."""
    masks: Mapping[int | None, Tensor | None]
    """Added to the scores, by the layer's window. None: everybody sees all of it, or (no `index`)
    it is causal."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one step, one row each."""

    ids: Tensor
    positions: Tensor
    blocks: Tensor
    """Where each row's KV goes: the block ..."""
    offsets: Tensor
    """... and the token in it."""
    parts: list[Part]
    wanted: Tensor | None
    """Rows that are looked at after the last layer; None: all."""
    last_rows: Tensor
    """The last row of each chunk among the wanted ones, in the order of the chunks; nonsense for a
    chunk of which nothing is wanted."""
    fresh: list[int]
    """Blocks that get their first token and are not filled."""


class PagedKv:
    """The arena as a tensor `[num_blocks, layer, 2, kv_head, token, dim]`."""

    def __init__(
        self, memory: Tensor, *, block_size: int, config: LlamaConfig, dtype: torch.dtype
    ) -> None:
        """`memory` is all bytes of the arena, wherever they are: it is computed there."""
        heads, dim, layers = config.num_kv_heads, config.head_dim, config.num_layers
        blocks = memory.view(dtype)
        self.blocks = blocks.view(-1, layers, 2, heads, block_size, dim)
        self.block_size = block_size
        self.device = memory.device
        self._heads, self._dim, self._dtype = heads, dim, dtype
        self._windows = config.windows
        self._layers = [self.blocks[:, layer] for layer in range(layers)]
        # One row is a head's part of a block. A layer's rows are the same rows, shifted.
        rows = blocks.view(-1, block_size * dim)
        self._rows = [rows[layer * 2 * heads :] for layer in range(layers)]
        self._rows_per_block = layers * 2 * heads
        self._layer_bytes = 2 * heads * block_size * dim * dtype.itemsize
        """Of one layer in one block."""
        self._row_of_head = torch.arange(2 * heads, device=self.device).view(2, 1, heads, 1)

    def plan(self, chunks: Sequence[Chunk], *, only_wanted: bool = False) -> Batch:
        """Arrange the tokens: single ones first, by length of context, then the longer chunks.

        `only_wanted`: after the last layer nobody looks at rows that are neither sampled from nor
        scored.
        """
        order = sorted(
            range(len(chunks)), key=lambda i: (_group(chunks[i], self.block_size), chunks[i].start)
        )
        ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        fresh: list[int] = []
        wanted: list[int] = []
        ends = [0] * len(chunks)
        size = self.block_size
        for index in order:
            chunk = chunks[index]
            own = range(chunk.start, chunk.start + len(chunk.ids))
            ids.extend(chunk.ids)
            positions.extend(own)
            blocks.extend([chunk.blocks[position // size] for position in own])
            if chunk.scored or not only_wanted:
                wanted.extend(range(len(ids) - len(chunk.ids), len(ids)))
            elif chunk.sample:
                wanted.append(len(ids) - 1)
            ends[index] = len(wanted) - 1
            if own.stop % size and own.stop - own.stop % size >= own.start:
                fresh.append(blocks[-1])
        at = self._tensor(positions)
        return Batch(
            ids=self._tensor(ids),
            positions=at,
            blocks=self._tensor(blocks),
            offsets=at % size,
            parts=self._parts([chunks[index] for index in order]),
            wanted=self._tensor(wanted) if len(wanted) < len(ids) else None,
            last_rows=self._tensor(ends),
            fresh=fresh,
        )

    def clear_fresh(self, batch: Batch) -> None:
        """Before the first layer writes."""
        for block in batch.fresh:
            self.blocks[block].zero_()

    def write(self, layer: int, batch: Batch, kv: Tensor) -> None:
        """`kv` is `[row, 2, kv_head, dim]`."""
        self._layers[layer][batch.blocks, :, :, batch.offsets] = kv

    def read(self, layer: int, index: Tensor, num_sequences: int) -> Tensor:
        """`[2, sequence, kv_head, token, dim]`, whole blocks, in one copy."""
        read = self._rows[layer].index_select(0, index)
        return read.view(2, num_sequences, self._heads, -1, self._dim)

    def attend(self, layer: int, batch: Batch, query: Tensor, kv: Tensor) -> Tensor:
        """`query` is `[row, head, dim]`, `kv` the rows' own, written before; the result is
        `[row, head * dim]`."""
        results = [
            (self._attend_singles if part.single_tokens else self._attend_chunk)(
                layer, part, query[part.start : part.stop], kv[part.start : part.stop]
            )
            for part in batch.parts
        ]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _attend_singles(self, layer: int, part: Part, query: Tensor, kv: Tensor) -> Tensor:
        count = part.stop - part.start
        assert part.index is not None
        keys, values = self.read(layer, part.index, count)[..., : part.length, :]
        # The query heads that share a KV head stand where SDPA expects the tokens of one query.
        grouped = query.reshape(count, self._heads, -1, self._dim)
        attended = functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=part.masks[self._windows[layer]]
        )
        return attended.reshape(count, -1)

    def _attend_chunk(self, layer: int, part: Part, query: Tensor, kv: Tensor) -> Tensor:
        count = part.stop - part.start
        mask = part.masks[self._windows[layer]]
        if part.index is None:
            both = kv.permute(1, 2, 0, 3).contiguous()
        else:
            both = self.read(layer, part.index, 1)[:, 0, :, : part.length]
        grouped = query.reshape(count, self._heads, -1, self._dim).permute(1, 2, 0, 3)
        keys, values = both.unsqueeze(2).expand(-1, -1, grouped.shape[1], -1, -1)
        attended = functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=mask, is_causal=part.index is None and mask is None
        )
        return attended.permute(2, 0, 1, 3).reshape(count, -1)

    # planning

    def _parts(self, chunks: Sequence[Chunk]) -> list[Part]:
        parts = []
        row = first = 0
        while first < len(chunks):
            last = self._end_of_singles(chunks, first)
            if last == first:
                last = first + 1
                parts.append(self._chunk_part(chunks[first], row))
            else:
                parts.append(self._singles_part(chunks[first:last], row))
            row, first = parts[-1].stop, last
        return parts

    def _end_of_singles(self, chunks: Sequence[Chunk], first: int) -> int:
        """Up to there, from `first` on, they decode in one call; `first` if that is no decoding."""
        group = _group(chunks[first], self.block_size)
        if group > 0:
            return first
        last = first + 1
        while last < len(chunks) and _group(chunks[last], self.block_size) == group:
            width = chunks[last].start // self.block_size + 1
            if (last + 1 - first) * width * self._layer_bytes > _READ_BYTES:
                break
            last += 1
        return last

    def _singles_part(self, chunks: Sequence[Chunk], row: int) -> Part:
        lengths = [chunk.start + 1 for chunk in chunks]
        longest = max(lengths)
        ends = self._tensor(lengths).unsqueeze(1)

        def mask(window: int | None) -> Tensor | None:
            if min(lengths) == longest and window is None:
                return None
            key = torch.arange(longest, device=self.device)
            hidden = key >= ends
            if window is not None:
                hidden |= key < ends - window
            return self._forbidden(hidden).view(len(chunks), 1, 1, longest)

        index = self._index([chunk.blocks for chunk in chunks], lengths)
        return Part(row, row + len(chunks), True, longest, index, self._masks(longest, mask))

    def _chunk_part(self, chunk: Chunk, row: int) -> Part:
        count, start = len(chunk.ids), chunk.start
        length = start + count

        def mask(window: int | None) -> Tensor | None:
            if start == 0 and window is None:
                return None
            query = torch.arange(start, length, device=self.device).unsqueeze(1)
            key = torch.arange(length, device=self.device)
            hidden = key > query
            if window is not None:
                hidden |= key <= query - window
            return self._forbidden(hidden)

        index = self._index([chunk.blocks], [length]) if start else None
        return Part(row, row + count, False, length, index, self._masks(length, mask))

    def _masks(
        self, length: int, mask: Callable[[int | None], Tensor | None]
    ) -> dict[int | None, Tensor | None]:
        """For each window of the layers. One that is longer than the context hides nothing."""
        built: dict[int | None, Tensor | None] = {}
        masks: dict[int | None, Tensor | None] = {}
        for window in set(self._windows):
            narrow = window if window is not None and window < length else None
            if narrow not in built:
                built[narrow] = mask(narrow)
            masks[window] = built[narrow]
        return masks

    def _index(self, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
        """Rows of the sequences' blocks in the order `[k/v, sequence, kv_head, block]`."""
        counts = [-(-length // self.block_size) for length in lengths]
        width = max(counts)
        padded = []
        for table, count in zip(tables, counts, strict=True):
            used = list(table[:count])
            # A sequence is padded with a block of its own: nobody else's numbers come near it.
            padded.append(used + used[:1] * (width - count))
        rows = self._tensor(padded).mul_(self._rows_per_block).view(1, len(tables), 1, width)
        return (rows + self._row_of_head).view(-1)

    def _forbidden(self, hidden: Tensor) -> Tensor:
        scores = torch.zeros(hidden.shape, dtype=self._dtype, device=self.device)
        return scores.masked_fill_(hidden, float("-inf"))

    def _tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def _group(chunk: Chunk, block_size: int) -> int:
    """Chunks of equal negative groups decode together; 1: a chunk of its own. Sorts in order."""
    if len(chunk.ids) > 1:
        return 1
    num_blocks = chunk.start // block_size + 1
    return -(max(num_blocks, _MIN_GROUP_BLOCKS) - 1).bit_length()
