"""The batch of a prefill: as the caller gave it, and as it enters the current layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...prune.answers.functions import asked_rows
from ...prune.contract import Rows
from ...prune.sight import Sight
from .layout import Layout
from .placed import PlacedImage


@dataclass
class Batch:
    """The caller's batch: which columns are text, and which text rows the methods ask."""

    images: list[PlacedImage]
    real: Tensor
    """(B, L) bool: no padding."""
    text: Tensor
    """(B, L) bool: real and not visual."""
    embeds: Tensor
    """(B, L, D): what entered the LLM."""
    final_norm: Callable[[Tensor], Tensor]
    """The norm behind the last layer, of rows (n, D)."""
    turned_back: Callable[[int, Tensor, Tensor], Tensor]
    """Keys (H_kv, n, D_head) of a layer at positions so much lower (0-d)."""
    counted: Tensor | None
    """(B,): how many columns of padding on its left a row's positions count; None: none."""

    def __post_init__(self) -> None:
        self._asked: dict[tuple[int, Rows], Tensor] = {}

    def asked(self, number: int, rows: Rows) -> Tensor:
        """Columns of the text rows that image `number` is scored by, (R,) ascending."""
        key = (number, rows)
        if key not in self._asked:
            self._asked[key] = self._find(self.images[number], rows)
        return self._asked[key]

    def keys(self, layer: int, row: int, keys: Tensor) -> Tensor:
        """Keys (H_kv, n, D_head) of a row's tokens, turned as if nothing was padded."""
        if self.counted is None:
            return keys
        return self.turned_back(layer, keys, self.counted[row].to(keys.device))

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
    blocks: Tensor | None = None
    """(B, length): the block whose rows see each other both ways, -1: none; None: no blocks."""
    windowed: bool = True
    """Whether the window counts within a block, too."""

    def sight(self, row: int, past: int, count: int) -> Sight:
        """What the last `count` tokens of a row see of them and of `past` keys before."""
        if self.blocks is None:
            return Sight(self.window)
        blocks = pad(self.blocks[row, self.layout.length - count :], (past, 0), value=-1)
        return Sight(self.window, blocks, self.windowed)

    def place(self, image: PlacedImage, columns: Tensor, device: torch.device) -> Tensor:
        """Where columns of the caller's sequence are now, in the image's row; on the device of the
        layer, which need not be that of the batch."""
        return self.layout.place[image.row, columns].to(device)

    def rows_of(self, image: PlacedImage, device: torch.device) -> Tensor:
        """Where the rows of an image are now: (K,)."""
        return self.place(image, image.columns[image.slots], device)

    def seen(self, row: int, columns: Tensor) -> Tensor | None:
        """(R, S) bool: the keys that rows at `columns` of the shortened batch see."""
        length = self.layout.length
        sight = self.sight(row, self.past, length)
        seen = sight.seen(self.past + columns, self.past + length)
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
