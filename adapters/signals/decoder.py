"""What methods inside the decoder declared, read while its layers run on a prompt.

A reader is given a signal, the batch, and what a hook shows of the layer; it notes a value for each
image. `table` says what each signal is read from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...prune import scores
from ...prune.answers.functions import check_read
from ...prune.contract import (
    GistAttention,
    Hidden,
    LayerKeys,
    LayerValues,
    MeanHidden,
    ModuleStep,
    Neurons,
    ReceivedInLayer,
    RotaryAffinity,
    RotaryMeans,
    Rows,
    TextAttention,
    TextHidden,
    TextKeys,
    TextValues,
)
from ..layer_names import LayerNames
from ..sequence.batch import Batch, Here

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, (B or 1, length, D_head) each."""
Turn = Callable[[Any, Tensor, Rotary], Tensor]
"""How an attention module turns queries or keys (B, H, Q, D_head) to their positions."""


# --- Attention --------------------------------------------------------------------------------


@dataclass
class Heads:
    """Queries, keys and values of a layer as its attention uses them."""

    query: Tensor
    """(B, H, length, D_head)"""
    key: Tensor
    """(B, H_kv, S, D_head): stored ones first; a static cache is longer."""
    value: Tensor
    """As `key`."""
    scale: float
    softcap: float | None = None
    """The most that a logit approaches."""
    share: float = 1.0
    """Of the layer's heads, how many these are: the others are out."""

    def rows(self, row: int, columns: Tensor) -> Tensor:
        """Queries of some columns of a row: (H, R, D_head)."""
        return self.query[row][:, columns]


@dataclass
class HeadsAhead:
    """What a layer that is about to be cut would make of its uncut input."""

    attention: Any
    normed: Tensor
    """(B, length, D): what its attention would be given."""
    projected: Tensor
    """(B, length, H_kv * D_head): the key projection of it."""
    rotary: Rotary
    key: Tensor
    """(B, H_kv, S, D_head): stored ones first."""
    names: LayerNames
    turn: Turn
    """How the model turns heads."""

    @classmethod
    def of(
        cls,
        layer: Any,
        hidden: Tensor,
        rotary: Rotary,
        stored: Tensor | None,
        names: LayerNames,
        turn: Turn,
    ) -> HeadsAhead:
        """From the input (B, length, D) of a decoder layer, and the keys (B, H_kv, past, D_head)
        that it stored earlier."""
        attention = layer.self_attn
        normed = getattr(layer, names.norm)(hidden)
        projected = attention.k_proj(normed)
        with torch.no_grad():
            key = turn(attention, names.heads(attention, "k", projected), rotary)
            key = key if stored is None else torch.cat([stored, key], 2)
        return cls(attention, normed, projected, rotary, key, names, turn)

    @property
    def scale(self) -> float:
        return self.attention.scaling

    @property
    def softcap(self) -> float | None:
        """The most that a logit approaches."""
        return getattr(self.attention, "attn_logit_softcapping", None)

    def rows(self, row: int, columns: Tensor) -> Tensor:
        """Queries of some columns of a row: (H, R, D_head)."""
        at = row if self.rotary[0].shape[0] > 1 else 0
        cos, sin = (table[at : at + 1, columns] for table in self.rotary)
        given = self.attention.q_proj(self.normed[row : row + 1, columns])
        heads = self.names.heads(self.attention, "q", given)
        return self.turn(self.attention, heads, (cos, sin))[0]

    def unturned(self, row: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (H, n, D_head) and keys (H_kv, n, D_head) of some columns, as projected."""
        query = self.attention.q_proj(self.normed[row : row + 1, columns])
        key = self.projected[row : row + 1, columns]
        found = (self.names.heads(self.attention, n, x)[0] for n, x in (("q", query), ("k", key)))
        query, key = found
        return query.detach(), key.detach()


def text_attention(
    need: TextAttention, batch: Batch, here: Here, heads: Heads | HeadsAhead
) -> None:
    """From the rows that are asked alone."""
    here, key = _held(here, heads.key)
    for number, image in enumerate(batch.images):
        columns = here.rows_of(image, key.device)
        asked = _asked(batch, here, number, need.rows, key.device)
        everything = here.valid is None and here.window is None and need.rows == "last"
        seen = None if everything else here.seen(image.row, asked)
        rows = heads.rows(image.row, asked)
        if need.heads == "max" and not need.each:
            given = (rows, key[image.row], seen, heads.scale, heads.softcap)
            image.hear(need, scores.largest_of(*given)[here.past + columns])
            continue
        maps = scores.attention_of(rows, key[image.row], seen, heads.scale, heads.softcap)
        maps = maps[..., here.past + columns]
        image.hear(need, maps.permute(2, 0, 1) if need.each else maps.mean((0, 1)))


def _asked(batch: Batch, here: Here, number: int, rows: Rows, device: torch.device) -> Tensor:
    """Where the rows that an image is scored by are now: (R,)."""
    image = batch.images[number]
    if rows == "image" and len(image.slots):
        return here.rows_of(image, device)
    return here.place(image, batch.asked(number, "last" if rows == "image" else rows), device)


def received(need: ReceivedInLayer, batch: Batch, here: Here, heads: Heads) -> None:
    """From all rows, once for all images of a prompt."""
    here, key = _held(here, heads.key)
    of_rows: dict[int, Tensor] = {}
    for image in batch.images:
        row, columns = image.row, here.rows_of(image, key.device)
        if row not in of_rows:
            of_rows[row] = received_in(here, row, heads, key)
        first = here.layout.length - len(of_rows[row])
        image.hear(need, of_rows[row][columns - first])


def received_in(here: Here, row: int, heads: Heads, key: Tensor) -> Tensor:
    """Attention that the tokens of one row receive: (n,), n tokens in the shortened batch; `key`
    are those of `heads` that `here` knows."""
    count = here.entries(row)
    past = here.past
    earlier = key[row, :, :past]
    if here.valid is not None:
        earlier = earlier[:, here.valid[row, :past].to(key.device)]
        past = earlier.shape[1]
    key = torch.cat([earlier, key[row, :, -count:]], 1) if past else key[row, :, -count:]
    query, sight = heads.query[row, :, -count:], here.sight(row, past, count)
    found = scores.received_of(query, key, past, heads.scale, sight, heads.softcap)[past:]
    return found * heads.share if heads.share < 1 else found  # heads that are out give nothing


def layer_keys(need: LayerKeys, batch: Batch, here: Here, heads: Heads | HeadsAhead) -> None:
    """Of the images' rows."""
    here, key = _held(here, heads.key)
    for image in batch.images:
        columns = here.past + here.rows_of(image, key.device)
        keys = batch.keys(need.layer, image.row, key[image.row][:, columns].detach())
        image.hear(need, keys.transpose(0, 1))


def gist_attention(need: GistAttention, batch: Batch, here: Here, heads: HeadsAhead) -> None:
    """From heads that are not turned, of everything alive up to each image's last token."""
    for image in batch.images:
        device = heads.normed.device
        part = batch.real[image.row] & here.layout.keep[image.row]
        part = part[: int(image.columns[-1]) + 1].nonzero()[:, 0]
        query, key = heads.unturned(image.row, here.place(image, part, device))
        found = scores.gist_attention(query, key, heads.scale)
        own = torch.searchsorted(part, image.columns[image.slots])
        image.hear(need, found[own.to(device)])


def text_keys(need: TextKeys, batch: Batch, here: Here, heads: Heads) -> None:
    """Of the text behind each image."""
    here, key = _held(here, heads.key)
    for number, image in enumerate(batch.images):
        asked = here.place(image, batch.asked(number, "text"), key.device)
        keys = key[image.row][:, here.past + asked].detach()
        image.hear(need, batch.keys(need.layer, image.row, keys).transpose(0, 1))


def layer_values(need: LayerValues, batch: Batch, here: Here, heads: Heads) -> None:
    """Of the images' rows."""
    here, value = _held(here, heads.value)
    for image in batch.images:
        columns = here.past + here.rows_of(image, value.device)
        image.hear(need, value[image.row][:, columns].detach().float().transpose(0, 1))


def text_values(need: TextValues, batch: Batch, here: Here, heads: Heads) -> None:
    """Of text behind each image, or of all."""
    here, value = _held(here, heads.value)
    for number, image in enumerate(batch.images):
        columns = batch.asked(number, "text")
        if need.part == "all":
            columns = batch.text[image.row].nonzero()[:, 0]
        asked = here.past + here.place(image, columns, value.device)
        image.hear(need, value[image.row][:, asked].detach().float().transpose(0, 1))


def _held(here: Here, key: Tensor) -> tuple[Here, Tensor]:
    """The batch with the stored columns that are left, and their keys (or values) and the new
    ones."""
    here = here.holding(key.shape[2] - here.layout.length)
    return here, key[:, :, : here.past + here.layout.length]


# --- Input and modules of a layer -------------------------------------------------------------


def hidden(need: Hidden, batch: Batch, here: Here, given: Tensor) -> None:
    """From the layer's input (B, length, D)."""
    for image in batch.images:
        rows = given[image.row, here.rows_of(image, given.device)]
        image.hear(need, batch.final_norm(rows) if need.normed else rows)


def text_hidden(need: TextHidden, batch: Batch, here: Here, given: Tensor) -> None:
    """From the layer's input (B, length, D)."""
    for number, image in enumerate(batch.images):
        asked = here.place(image, batch.asked(number, "text"), given.device)
        rows = given[image.row, asked].detach()
        image.hear(need, batch.final_norm(rows) if need.normed else rows)


def mean_hidden(need: MeanHidden, batch: Batch, here: Here, given: Tensor) -> None:
    """From the layer's input (B, length, D)."""
    for image in batch.images:
        part = batch.part(image, need.of) & here.layout.keep[image.row]
        columns = here.place(image, part.nonzero()[:, 0], given.device)
        image.hear(need, given[image.row, columns].detach().float().mean(0))


def rotary_affinity(need: RotaryAffinity, batch: Batch, here: Here, rotary: Rotary) -> None:
    """From the layer's rotary tables."""
    for number, image in enumerate(batch.images):
        columns = here.rows_of(image, rotary[0].device)
        asked = _asked(batch, here, number, need.rows, rotary[0].device)
        at = image.row if rotary[0].shape[0] > 1 else 0
        cos, sin = (table[at].detach().float() for table in rotary)
        product = cos[columns] @ cos[asked].T + sin[columns] @ sin[asked].T
        image.hear(need, product / cos.shape[-1] ** 0.5)


@dataclass(frozen=True)
class Angles:
    """By how much a layer turns the heads of the shortened batch's columns."""

    ids: Callable[[], Tensor]
    """(B | 1, length) or (axes, B | 1, length)"""
    tables: Callable[[Tensor], Rotary]
    """Cosines and sines of some of them."""


def rotary_means(need: RotaryMeans, batch: Batch, here: Here, angles: Angles) -> None:
    """From positions, as tables no longer say what each axis is."""
    ids = angles.ids()
    axes = ids[-3:] if ids.dim() == 3 else ids[None]
    for image in batch.images:
        at = image.row if axes.shape[1] > 1 else 0
        own = axes[:, at, here.rows_of(image, ids.device)]
        if batch.counted is not None:
            own = own - batch.counted[image.row].to(own.device)
        cos, sin = angles.tables(own if len(own) == 1 else own.expand(len(own), *own.shape))
        image.hear(need, scores.rotary_means(cos, sin))


def module_step(need: ModuleStep, batch: Batch, here: Here, before: Tensor, after: Tensor) -> None:
    """From a module's input and output, (B, length, D) each."""
    of_rows: dict[int, Tensor] = {}
    for image in batch.images:
        row, columns = image.row, here.rows_of(image, after.device)
        count = here.entries(row)
        if row not in of_rows:
            own = (values[row, -count:].detach().float() for values in (before, after))
            of_rows[row] = check_read(need, need.read(*own), count)
        image.hear(need, of_rows[row][columns - (here.layout.length - count)])


def neurons(need: Neurons, batch: Batch, here: Here, activations: Tensor) -> None:
    """From the input of an MLP's last projection, (B, length, M)."""
    for number, image in enumerate(batch.images):
        device = activations.device
        visual = activations[image.row, here.rows_of(image, device)]
        asked = here.place(image, batch.asked(number, "text"), device)
        read = need.read(visual.detach(), activations[image.row, asked].detach())
        image.hear(need, check_read(need, read, len(visual)).float())
