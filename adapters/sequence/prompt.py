"""Where the images and the text are in a prompt, before anything was encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...prune.errors import UnsupportedFeatureError
from ..modality import Modality


@dataclass(frozen=True)
class Prompt:
    """Token ids (B, L) as the caller gave them, and which of them are placeholders."""

    ids: Tensor
    mask: Tensor | None
    """(B, L) padding mask; None: everything is real."""
    placeholders: Mapping[Modality, int]
    """Token id of the placeholders of each modality."""
    words: bool = True
    """Whether ids are those of words; else numbers that are equal where embeddings are."""

    @classmethod
    def of_embeds(
        cls, embeds: Tensor, mask: Tensor | None, placeholders: Mapping[Modality, Tensor]
    ) -> Prompt:
        """Of embeddings (B, L, D), in which placeholders have those that are given, (D,)."""
        known = list(placeholders.values())
        rows = torch.cat([torch.stack(known).to(embeds), embeds.detach().flatten(0, 1)])
        numbers = rows.unique(dim=0, return_inverse=True)[1]
        found = numbers[: len(known)].tolist()
        ids = numbers[len(known) :].view(embeds.shape[:2])
        return cls(ids, mask, dict(zip(placeholders, found, strict=True)), words=False)

    def rows(self) -> Iterator[Tensor]:
        """Ids of each prompt without padding: (L,)."""
        mask = self.mask
        if mask is None or mask.dim() != 2:  # who shortens the prompt refuses others
            yield from self.ids
            return
        for ids, real in zip(self.ids, mask[:, -self.ids.shape[1] :].bool(), strict=True):
            yield ids[real]

    def texts(self, modality: Modality, counts: Sequence[int]) -> list[Tensor]:
        """Ids of the text that belongs to each image, (T,): what stands between it and the next
        image (or video), or before it where nothing follows.

        Args:
            counts: visual tokens of each image of `modality`, in batch order.
        """
        found, todo = [], list(counts)
        for row, ids in enumerate(self.rows()):
            visual = torch.isin(ids, torch.tensor(list(self.placeholders.values())).to(ids))
            columns = (ids == self.placeholders[modality]).nonzero()[:, 0].tolist()
            while columns:
                count = todo.pop(0) if todo else 0
                if not 0 < count <= len(columns):
                    raise UnsupportedFeatureError(
                        f"Row {row} has {len(columns)} {modality.name} placeholders left for an "
                        f"{modality.name} of {count} tokens: input_ids and {modality.name}s do not "
                        f"belong together."
                    )
                found.append(_between(ids, visual, columns[0], columns[count - 1]))
                del columns[:count]
        if len(found) != len(counts):
            raise UnsupportedFeatureError(
                f"{len(counts)} {modality.name}s came with placeholders for {len(found)}: "
                f"input_ids and {modality.name}s do not belong together."
            )
        return found


def _between(ids: Tensor, visual: Tensor, first: int, last: int) -> Tensor:
    after = visual[last + 1 :].nonzero()
    end = int(after[0]) + last + 1 if len(after) else len(ids)
    if end > last + 1:
        return ids[last + 1 : end]
    before = visual[:first].nonzero()
    start = int(before[-1]) + 1 if len(before) else 0
    return ids[start:first]
