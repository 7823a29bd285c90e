"""InternVL in vLLM, of transformers' format: tiles and a thumbnail, frames with text between them.

An image is the run of its tiles; each frame of a video is an image of its own, as for `patch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ....prune.contract import Signal
from ....prune.tiling import Tiling
from ...family import IMAGE, Call
from ..on_paper import on_paper
from ..served import OF_ATTENTION, WORD
from ..sizes import served_of
from .processor import KEEP
from .questions import TEXT, embedded
from .tiled import PIXELS, TiledModel, TiledProcessor

from vllm.model_executor.models.interns1 import (  # isort: skip  (behind the version's check)
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # isort: skip
from vllm.multimodal.processing import PromptUpdateDetails  # isort: skip


def _call(family: Any, pixels: Tensor) -> Call:
    """The call that encodes the tiles of one image: (tiles, 3, H, W)."""
    return replace(family.call(IMAGE, {IMAGE.pixels: pixels}), parts=(len(pixels),))


def _images(modality: str, tiles: Sequence[int]) -> Sequence[Sequence[int]]:
    """Of items of so many tiles or frames those of each image in them."""
    return [[count] if modality == "image" else [1] * count for count in tiles]


class InternVLInfo(InternS1ProcessingInfo):  # type: ignore[misc]
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """No videos where the method reads the question: between their frames is text that comes
        into the prompt later."""
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()
        config = self.get_hf_config()
        asks = served_of(config, getattr(config, WORD)).asks
        return {"image": limits["image"]} if asks else limits


class InternVLProcessor(TiledProcessor, InternS1MultiModalProcessor):  # type: ignore[misc]
    def _marked(self, ids: Sequence[int]) -> Sequence[int]:
        processor = self.info.get_hf_processor()
        marks = [processor.start_image_token, processor.end_image_token]
        begin, end = processor.tokenizer.convert_tokens_to_ids(marks)
        image = processor.image_token_id
        return [new for one in ids for new in ((begin, one, end) if one == image else (one,))]

    def _tilings(
        self, modality: str, found: Mapping[str, Any]
    ) -> Sequence[Sequence[Tiling]] | None:
        if PIXELS[modality] not in found:
            return None
        family, pixels = on_paper(self.info.get_hf_config()), found[PIXELS[modality]]
        return [
            [family.tilings(_call(family, pixels[:1].expand(n, -1, -1, -1)), ())[0] for n in images]
            for images in _images(modality, found[f"{modality}_num_patches"].tolist())
        ]

    def _placeholders(self, update: Any, fields: Any, index: int) -> Any:
        """Each run of placeholders as long as tokens of its image are kept."""
        whole, item = update.replacement(index), fields[update.modality][index]
        keep = item.get(f"{KEEP}_{update.modality}")
        if keep is None:
            return whole
        visual = int(item[f"{update.modality}_token_id"].data)
        runs = [(token == visual, list(run)) for token, run in groupby(whole.full)]
        each = int(keep.data) // sum(is_visual for is_visual, _ in runs)
        short = [one for is_visual, run in runs for one in (run[:each] if is_visual else run)]
        return PromptUpdateDetails.select_token_id(short, visual)


@MULTIMODAL_REGISTRY.register_processor(
    InternVLProcessor, info=InternVLInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class VlmPruneInternVLForConditionalGeneration(TiledModel, InternS1ForConditionalGeneration):  # type: ignore[misc]
    """vLLM's InternVL with pruned images and videos."""

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """(K, D) of each item; vLLM calls it with items of one modality."""
        counts = {one: kwargs.pop(f"{KEEP}_{one}", None) for one in PIXELS}
        modality = next((one for one, count in counts.items() if count is not None), None)
        if modality is None:
            return super(TiledModel, self).embed_multimodal(**kwargs)
        items = _images(modality, kwargs[f"{modality}_num_patches"].flatten().tolist())
        tiles = [count for images in items for count in images]
        pixels = kwargs[PIXELS[modality]].split(tiles)
        with self._reading() as (rows, read):
            projected = self.extract_feature(torch.cat(pixels)).split(tiles)
        heard = {need: values.split(tiles) for need, values in read.items()}
        words = embedded(
            self.language_model, kwargs.get(f"{TEXT}_{modality}"), len(items), projected[0].device
        )
        seen, found, at = rows[0].split(tiles), [], 0
        keeps = torch.as_tensor(counts[modality]).flatten().tolist()
        for images, keep, word in zip(items, keeps, words, strict=True):
            each = keep // len(images)
            kept = []
            for i in range(at, at + len(images)):
                own = {need: values[i] for need, values in heard.items()}
                call = _call(self._family, pixels[i])
                kept.append(self._kept(call, seen[i], projected[i], each, own, word))
            found.append(torch.cat(kept))
            at += len(images)
        return found

    def _features(self, call: Call, projected: Tensor) -> Tensor:
        return projected.flatten(0, 1)

    @contextmanager
    def _reading(self) -> Iterator[tuple[list[Tensor], dict[Signal, Tensor]]]:
        """While tiles are encoded: the rows that the tower gave, CLS among them, and what the
        method reads of its attention, (tiles, S, ...)."""
        rows: list[Tensor] = []
        read: dict[Signal, Tensor] = {}
        asked: Sequence[Any] = self._served.needs  # those of attention have a layer
        with ExitStack() as hooks:
            hook = self.vision_tower.register_forward_hook(lambda *seen: rows.append(seen[-1]))
            hooks.callback(hook.remove)
            for need in asked:
                if (reader := OF_ATTENTION.get(type(need))) is not None:
                    module = self.vision_tower.encoder.layer[need.layer].attention.attn
                    hook = module.register_forward_pre_hook(partial(_hear, read, need, reader))
                    hooks.callback(hook.remove)
            yield rows, read


def _hear(read: dict[Signal, Tensor], need: Signal, reader: Any, module: Any, args: Any) -> None:
    """vLLM's attention is given queries and keys of all heads side by side: (B, S, H * D_head)."""
    query, key = (rearrange(one, "b s (h d) -> b h s d", h=module.num_heads) for one in args[:2])
    read[need] = reader(query, key, module.scale)
