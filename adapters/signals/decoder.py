"""Reading what methods inside the decoder declared, while its layers run on a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...prune import scores
from ...prune.answers import asked_rows, check_read
from ...prune.contract import (
    Hidden,
    LayerSignal,
    MeanHidden,
    ModuleStep,
    Neurons,
    ReceivedInLayer,
    RotaryAffinity,
    Rows,
    TextAttention,
)
from ..sequence.layout import Layout
from ..sequence.placed import PlacedImage

Rotary = tuple[Tensor, Tensor]


@dataclass
class Prompts:
    """The caller's batch: which columns are text, and which text rows the methods ask."""

    images: list[PlacedImage]
    real: Tensor
    """(B, L) bool: no padding."""
    text: Tensor
    """(B, L) bool: real and not visual."""
    embeds: Tensor
    """(B, L, D): what entered the LLM."""

    def __post_init__(self) -> None:
        self._asked: dict[tuple[int, Rows], Tensor] = {}

    def asked(self, number: int, rows: Rows) -> Tensor:
        """Columns of the text rows that image `number` is scored by, (R,) ascending."""
        key = (number, rows)
        if key not in self._asked:
            self._asked[key] = self._find(self.images[number], rows)
        return self._asked[key]

    def _find(self, image: PlacedImage, rows: Rows) -> Tensor:
        columns = torch.arange(self.real.shape[1], device=self.real.device)
        last = torch.where(self.real[image.row], columns, -1).argmax()[None]
        if rows == "last":
            return last
        behind = self.text[image.row].clone()
        behind[: int(image.columns[-1]) + 1] = False
        columns = behind.nonzero()[:, 0]
        if not len(columns):
            return last
        if callable(rows):
            entered = self.embeds[image.row].detach()
            visual = entered[image.columns[image.encoded.slots]]
            columns = asked_rows(columns, rows(visual.float(), entered[columns].float()))
        return columns

    def part(self, image: PlacedImage, of: str) -> Tensor:
        """(L,) bool: the query (from the prompt's last image on) or what is before it."""
        same = [other for other in self.images if other.sample == image.sample]
        first = int(same[-1].columns[0])
        columns = torch.arange(self.real.shape[1], device=self.real.device)
        if of == "query":
            return self.real[image.row] & (columns >= first)
        if len(same) == 1:
            return self.text[image.row]
        return self.real[image.row] & (columns < first)


@dataclass(frozen=True)
class Here:
    """The batch as it enters the current layer."""

    layout: Layout
    past: int
    """Columns that this layer stored before this prefill."""
    valid: Tensor | None
    """(B, past + length) bool; None: all are tokens."""
    window: int | None
    """Keys that a row sees at most."""

    def place(self, image: PlacedImage, columns: Tensor, device: torch.device) -> Tensor:
        """Where columns of the caller's sequence are now, in the image's row; on the device of the
        layer, which need not be that of the batch."""
        return self.layout.place[image.row, columns].to(device)

    def rows_of(self, image: PlacedImage, device: torch.device) -> Tensor:
        """Where the rows of an image are now: (K,)."""
        return self.place(image, image.columns[image.slots], device)

    def seen(self, row: int, columns: Tensor) -> Tensor | None:
        """(R, S) bool: the keys that rows at `columns` of the shortened batch see."""
        keys = torch.arange(self.past + self.layout.length, device=columns.device)
        at = self.past + columns[:, None]
        seen = keys <= at
        if self.window is not None:
            seen &= keys > at - self.window
        if self.valid is not None:
            seen &= self.valid[row].to(columns.device)
        return seen

    def holding(self, past: int) -> Here:
        """The same where only the last `past` columns are left: a window forgets."""
        if past >= self.past:
            return self
        valid = self.valid
        if valid is not None:
            valid = valid[:, -(past + self.layout.length) :]
        return replace(self, past=past, valid=valid)

    def entries(self, row: int) -> int:
        """Tokens of a row in the shortened batch."""
        return self.layout.counts[row]


def hear_attention(
    needs: list[LayerSignal], prompts: Prompts, here: Here, query: Tensor, key: Tensor, scale: float
) -> None:
    """Read `TextAttention` and `ReceivedInLayer` of a layer from its queries and keys."""
    here = here.holding(key.shape[2] - here.layout.length)
    past = here.past
    key = key[:, :, : past + here.layout.length]  # a static cache is longer
    received: dict[int, Tensor] = {}
    for number, image in enumerate(prompts.images):
        columns = here.rows_of(image, key.device)
        for need in needs:
            if isinstance(need, TextAttention) and not need.ahead:
                asked = here.place(image, prompts.asked(number, need.rows), key.device)
                rows = query[image.row][:, asked]
                image.hear(need, _attention(need, image, here, columns, asked, rows, key, scale))
            elif isinstance(need, ReceivedInLayer):
                if image.row not in received:
                    received[image.row] = received_in(here, image.row, query, key, scale)
                first = past + here.layout.length - len(received[image.row])
                image.hear(need, received[image.row][past + columns - first])


def received_in(here: Here, row: int, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that the tokens of one row receive: (n,), n tokens in the shortened batch."""
    count = here.entries(row)
    past = here.past
    earlier = key[row, :, :past]
    if here.valid is not None:
        earlier = earlier[:, here.valid[row, :past].to(key.device)]
        past = earlier.shape[1]
    key = torch.cat([earlier, key[row, :, -count:]], 1) if past else key[row, :, -count:]
    return scores.received_of(query[row, :, -count:], key, past, scale, here.window)[past:]


def _attention(
    need: TextAttention,
    image: PlacedImage,
    here: Here,
    columns: Tensor,
    asked: Tensor,
    rows: Tensor,
    key: Tensor,
    scale: float,
) -> Tensor:
    everything = here.valid is None and here.window is None and need.rows == "last"
    seen = None if everything else here.seen(image.row, asked)
    maps = scores.attention_of(rows, key[image.row], seen, scale)[..., here.past + columns]
    return maps.permute(2, 0, 1) if need.each else maps.mean((0, 1))


def hear_ahead(
    needs: list[LayerSignal],
    prompts: Prompts,
    here: Here,
    layer: Any,
    hidden: Tensor,
    rotary: Rotary,
    stored: Tensor | None,
) -> Tensor:
    """Read `TextAttention(ahead=True)` of a layer that is about to be cut.

    Args:
        layer: the decoder layer.
        hidden: (B, length, D), its uncut input.
        stored: (B, H_kv, past, D_head), keys that it stored earlier.

    Returns:
        (B, length, H_kv * D_head), its key projection of the uncut input.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    projected: Tensor = attention.k_proj(normed)
    with torch.no_grad():
        key = _turned(attention, "k", projected, rotary)
        if stored is not None:
            key = torch.cat([stored, key], 2)
        for number, image in enumerate(prompts.images):
            columns = here.rows_of(image, key.device)
            for need in needs:
                if not (isinstance(need, TextAttention) and need.ahead):
                    continue
                asked = here.place(image, prompts.asked(number, need.rows), key.device)
                at = image.row if rotary[0].shape[0] > 1 else 0
                tables = rotary[0][at : at + 1, asked], rotary[1][at : at + 1, asked]
                given = attention.q_proj(normed[image.row : image.row + 1, asked])
                rows = _turned(attention, "q", given, tables)[0]
                found = _attention(need, image, here, columns, asked, rows, key, attention.scaling)
                image.hear(need, found)
    return projected


def _turned(attention: Any, name: str, projected: Tensor, rotary: Rotary) -> Tensor:
    """Projected queries or keys (B, Q, ...) as attention uses them: (B, H, Q, D_head)."""
    heads = projected.view(*projected.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{name}_norm", None)
    heads = (heads if norm is None else norm(heads)).transpose(1, 2)
    turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    turned: Tensor = turn(heads, heads[:, :0], *rotary)[0]
    return turned


def hear_input(needs: list[LayerSignal], prompts: Prompts, here: Here, hidden: Tensor) -> None:
    """Read `Hidden` and `MeanHidden` of the layer whose input (B, length, D) this is."""
    for image in prompts.images:
        for need in needs:
            if isinstance(need, Hidden):
                columns = here.rows_of(image, hidden.device)
                image.hear(need, hidden[image.row, columns])
            elif isinstance(need, MeanHidden):
                part = prompts.part(image, need.of) & here.layout.keep[image.row]
                columns = here.place(image, part.nonzero()[:, 0], hidden.device)
                image.hear(need, hidden[image.row, columns].detach().float().mean(0))


def hear_positions(needs: list[LayerSignal], prompts: Prompts, here: Here, rotary: Rotary) -> None:
    """Read `RotaryAffinity` of a layer from its rotary tables, (B or 1, length, D_head) each."""
    for number, image in enumerate(prompts.images):
        for need in needs:
            if isinstance(need, RotaryAffinity):
                columns = here.rows_of(image, rotary[0].device)
                asked = here.place(image, prompts.asked(number, need.rows), rotary[0].device)
                at = image.row if rotary[0].shape[0] > 1 else 0
                cos, sin = (table[at].detach().float() for table in rotary)
                product = cos[columns] @ cos[asked].T + sin[columns] @ sin[asked].T
                image.hear(need, product / cos.shape[-1] ** 0.5)


def hear_step(
    needs: list[LayerSignal],
    module: str,
    prompts: Prompts,
    here: Here,
    before: Tensor,
    after: Tensor,
) -> None:
    """Read `ModuleStep` from a module's input and output, (B, length, D) each."""
    for need in needs:
        if not (isinstance(need, ModuleStep) and need.module == module):
            continue
        values: dict[int, Tensor] = {}
        for image in prompts.images:
            row, columns = image.row, here.rows_of(image, after.device)
            count = here.entries(row)
            if row not in values:
                read = need.read(
                    before[row, -count:].detach().float(), after[row, -count:].detach().float()
                )
                values[row] = check_read(need, read, count)
            first = here.layout.length - count
            image.hear(need, values[row][columns - first])


def hear_neurons(
    needs: list[LayerSignal], prompts: Prompts, here: Here, activations: Tensor
) -> None:
    """Read `Neurons` from the input of an MLP's last projection, (B, length, M)."""
    for number, image in enumerate(prompts.images):
        for need in needs:
            if isinstance(need, Neurons):
                device = activations.device
                visual = activations[image.row, here.rows_of(image, device)]
                asked = here.place(image, prompts.asked(number, "text"), device)
                text = activations[image.row, asked]
                read = need.read(visual.detach(), text.detach())
                image.hear(need, check_read(need, read, len(visual)).float())
