"""Heads of a prompt on its way through the layers: those that are out stay out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...prune.contract import InDecoder
from ...prune.thinned import heads as chosen_heads


@dataclass
class AliveHeads:
    """Key heads of a prompt that attention still goes through."""

    kept: dict[int, Tensor] = field(default_factory=dict)
    """By layer, (B, K) ascending; all where nothing stands."""
    given: list[Tensor] = field(default_factory=list)
    """(B, H_kv) float32: what each layer so far gave through them."""

    def at(self, layer: int, method: InDecoder, keep: int, *, debug: bool) -> Tensor:
        """Those of a layer, `keep` of them, chosen where fewer stay than in the layers before."""
        if layer not in self.kept:
            last = self.kept[max(self.kept)] if self.kept else None
            if last is None or keep < last.shape[1]:
                given = torch.stack([one.to(self.given[-1].device) for one in self.given], 1)
                if last is not None:
                    alive = last.to(given.device)[:, None].expand(-1, given.shape[1], -1)
                    given = given.gather(2, alive)
                found = chosen_heads(method, given, keep, debug=debug)
                last = found if last is None else last.to(found.device).gather(1, found)
            self.kept[layer] = last
        return self.kept[layer]
