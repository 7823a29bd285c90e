"""LLaVAs whose pictures are encoded in tiles: a thumbnail, crops on a canvas, newlines.

How tokens lie, how values of tiles become those of an image, and how many there are says the family
that `patch` knows, on paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ....prune.contract import Signal
from ....prune.tiling import Tiling
from ...family import IMAGE, VIDEO, Call, Family
from ...signals.encoder import Images
from ...signals.table import SOURCES
from ..engine import check_engine
from ..on_paper import on_paper
from ..served import WORD, Served
from ..sizes import served_of
from .processor import KEEP, Processor
from .questions import TEXT, embedded
from .towers import reading

PIXELS = {"image": IMAGE.pixels, "video": VIDEO.pixels}


def call_of(family: Family, modality: str, pixels: Any, size: Any) -> Call:
    """The call that encodes one item alone.

    Args:
        pixels: of a video, (T, 3, H, W).
        size: of an image, height and width.
    """
    if modality == "video":
        return family.call(VIDEO, {VIDEO.pixels: pixels[None]})
    return family.call(IMAGE, {"image_sizes": torch.as_tensor(size)[None]})


class TiledProcessor(Processor):
    """Pictures of any size, and videos where vLLM's model has them."""

    def _tilings(
        self, modality: str, found: Mapping[str, Any]
    ) -> Sequence[Sequence[Tiling]] | None:
        if PIXELS[modality] not in found:
            return None
        family = on_paper(self.info.get_hf_config())
        items = found[PIXELS[modality]]
        sizes = found["image_sizes"] if modality == "image" else [None] * len(items)
        calls = [call_of(family, modality, *item) for item in zip(items, sizes, strict=True)]
        return [family.tilings(call, ()) for call in calls]


class TiledModel:
    """A model of vLLM whose images and videos enter the LLM with the tokens that are kept."""

    vision_tower: Any
    multi_modal_projector: Any
    language_model: Any
    image_newline: Tensor
    _served: Served

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        served = served_of(config, getattr(config, WORD))
        check_engine(vllm_config, served)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._served = served
        self._family: Any = on_paper(config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """(K, D) of each item; vLLM calls it with items of one modality."""
        counts = {one: kwargs.pop(f"{KEEP}_{one}", None) for one in PIXELS}
        modality = next((one for one, count in counts.items() if count is not None), None)
        if modality is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        texts = kwargs.pop(f"{TEXT}_{modality}", None)
        items = list(kwargs[PIXELS[modality]])
        sizes = kwargs["image_sizes"] if modality == "image" else [None] * len(items)
        calls = [call_of(self._family, modality, *item) for item in zip(items, sizes, strict=True)]
        tiles = [len(self._family.pictures(call)[0]) for call in calls]  # the rest is padding
        pixels = torch.cat([item[:count] for item, count in zip(items, tiles, strict=True)])
        with reading(self.vision_tower, self._served.needs) as read:
            rows = self.vision_tower(pixels, feature_select_strategy="full")
        projected = self.multi_modal_projector(rows[:, self._served.shape.tower.prefix :])
        parts = zip(rows.split(tiles), projected.split(tiles), strict=True)
        heard = {need: values.split(tiles) for need, values in read.items()}
        keeps = torch.as_tensor(counts[modality]).flatten().tolist()
        words = embedded(self.language_model, texts, len(items), rows.device)
        return [
            self._kept(
                calls[i], seen, whole, keeps[i], {need: heard[need][i] for need in heard}, words[i]
            )
            for i, (seen, whole) in enumerate(parts)
        ]

    def _kept(
        self,
        call: Call,
        rows: Tensor,
        projected: Tensor,
        keep: int,
        read: Mapping[Signal, Tensor],
        words: Mapping[Signal, Tensor],
    ) -> Tensor:
        """The rows of one item that enter the LLM: (keep, D)."""
        features = self._features(call, projected)
        if keep == len(features):
            return features
        (tiling,) = self._family.tilings(call, [features])
        layer = self._family.model.config.vision_feature_layer
        method = self._served.call.method
        images = Images(
            self._family,
            call,
            SimpleNamespace(hidden_states={layer: rows}, last_hidden_state=rows),
            [features],
            [tiling],
            prompt=None,
            clip=None,
            newlines_compete=method.newline_policy == "compete",  # type: ignore[attr-defined]
        )
        known = {need: images.patches(values)[0] for need, values in read.items()} | dict(words)
        signals = {
            need: known[need] if need in known else SOURCES[type(need)].read(images, need)[0]
            for need in self._served.needs
        }
        chosen = self._served.choose(tiling, signals, features, keep)
        emitted = chosen.emit(features, lambda own: self.multi_modal_projector(own[None])[0])
        return emitted[chosen.slots]

    def _features(self, call: Call, projected: Tensor) -> Tensor:
        """Tokens of one item as the LLM would see all of them: (N, D)."""
        if call.modality is IMAGE:
            sizes = call.inputs["image_sizes"]
            (packed,) = self._family.pack([projected], sizes, self.image_newline)
            return torch.as_tensor(packed)
        pooled = self._family.pool(projected).flatten(0, 1)
        return torch.cat([pooled, self.image_newline[None]])
