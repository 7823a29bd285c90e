"""Any model of vLLM with patches in one row and M-RoPE: kept tokens have their true positions.

The classes here stand in front of vLLM's own; `travelling` says how positions reach the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from ....prune.contract import EncoderFeatures, Features, Signal
from ....prune.tiling import Block, Tiling
from ..engine import check_engine
from ..served import OF_ATTENTION, WORD
from ..sizes import served_of
from ..travelling import CHANNELS, Span, digits, offsets, shortened
from .processor import KEEP, MODALITIES, Processor
from .questions import TEXT, embedded

from vllm.multimodal.inputs import (  # isort: skip  (behind the version's check)
    MultiModalFeatureSpec,
    MultiModalFieldConfig,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)


def tiling(grid: Sequence[int], merge: int) -> Tiling:
    """Of frames, rows and columns of patches: a block per frame, which the encoder sees alone."""
    frames, rows, columns = map(int, grid)
    return Tiling((Block((rows // merge,), (columns // merge,)),) * frames)


class GridProcessor(Processor):
    """Items that come with their grid."""

    def _tilings(
        self, modality: str, found: Mapping[str, Any]
    ) -> Sequence[Sequence[Tiling]] | None:
        if f"{modality}_grid_thw" not in found or f"{modality}_embeds" in found:
            return None
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return [[tiling(grid, merge)] for grid in found[f"{modality}_grid_thw"].tolist()]


class PrunedModel:
    """A model of vLLM whose images and videos enter the LLM with the tokens that the method
    keeps, where they were."""

    fields: tuple[str, ...] = ("image_grid_thw", "video_grid_thw")
    """What positions of an item depend on."""
    config: Any
    visual: Any
    language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        served = served_of(config, getattr(config, WORD))
        check_engine(vllm_config, served, travels=True)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._served = served
        self._width = config.get_text_config().hidden_size
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self._offsets = torch.zeros(3, rows, dtype=torch.int64)  # one place, as graphs want it

    # --- positions ---------------------------------------------------------------------------

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Positions of a prompt with kept tokens: text has those of the prompt of whole images."""
        whole: list[int] = []
        features, spans, done = [], [], 0
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            here = feature.mm_position
            whole += input_tokens[done : here.offset]
            done = here.offset + here.length
            tokens = input_tokens[here.offset : done]
            if f"{KEEP}_{feature.modality}" in feature.data:
                kept, tokens = len(tokens), self._tokens(feature)
                spans.append(Span(len(whole), len(tokens), kept))
            place = PlaceholderRange(offset=len(whole), length=len(tokens))
            features.append(replace(feature, mm_position=place))
            whole += tokens
        whole += input_tokens[done:]
        positions, _ = super().get_mrope_input_positions(whole, features)  # type: ignore[misc]
        return shortened(positions, spans)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> Tensor:
        """Rows of a step; what positions of kept tokens have beyond their placeholders' is noted
        for `forward`."""
        self._offsets.zero_()
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            channels = torch.cat([rows[:, -CHANNELS:] for rows in multimodal_embeddings])
            self._offsets[:, : len(input_ids)][:, is_multimodal] = offsets(channels)
            multimodal_embeddings = [rows[:, :-CHANNELS] for rows in multimodal_embeddings]
        embeds: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embeds

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        positions = positions + self._offsets[:, : positions.shape[-1]]
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]

    def _tokens(self, item: Any) -> list[int]:
        """A whole item in a prompt: its placeholders, and text between them."""
        grid = item.data[f"{item.modality}_grid_thw"].data
        count = int(grid.prod()) // self.visual.spatial_merge_size**2
        return [self._placeholder(item.modality)] * count

    def _placeholder(self, modality: str) -> int:
        found: int = getattr(self.config, f"{modality}_token_id")
        return found

    # --- the choice --------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """(K, D + channels) of each item; vLLM calls it with items of one modality."""
        (modality,) = (one for one in MODALITIES if f"{one}_grid_thw" in kwargs)
        keeps, texts = (kwargs.pop(f"{word}_{modality}", None) for word in (KEEP, TEXT))
        grids = kwargs[f"{modality}_grid_thw"].tolist()
        with self._reading(grids) as read:
            whole = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if keeps is None:  # given as embeddings
            return [torch.cat([one, one.new_zeros(len(one), CHANNELS)], dim=1) for one in whole]
        words = embedded(self.language_model, texts, len(grids), whole[0].device)
        found = []
        for i, (keep, rows) in enumerate(zip(keeps.flatten().tolist(), whole, strict=True)):
            signals = {need: values[i] for need, values in read.items()} | words[i]
            item = self._item(modality, {n: kwargs[n][i] for n in self.fields if n in kwargs})
            found.append(self._entering(item, *self._chosen(grids[i], rows, keep, signals)))
        return found

    def _item(self, modality: str, fields: Mapping[str, Any]) -> Any:
        """An item as vLLM describes those of a prompt, alone in it."""
        field = MultiModalFieldConfig.batched(modality).field
        data = {name: MultiModalFieldElem(data=one, field=field) for name, one in fields.items()}
        return MultiModalFeatureSpec(
            data=MultiModalKwargsItem(data),
            modality=modality,
            identifier="",
            mm_position=PlaceholderRange(offset=0, length=0),
        )

    def _chosen(
        self, grid: Sequence[int], rows: Tensor, keep: int, signals: dict[Signal, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of an item that enter the LLM, (K, ...), among its visual tokens the places that
        they take, and the tokens whose positions they have: (K,) each."""
        if keep == len(rows):
            every = torch.arange(keep, device=rows.device)
            return rows, every, every
        features, deeper = rows[:, : self._width], rows[:, self._width :]
        signals[Features()] = features
        given = {need: signals[need] for need in self._served.needs}
        chosen = self._served.choose(
            tiling(grid, self.visual.spatial_merge_size), given, features, keep
        )
        entering = chosen.emit(features, self._project)[chosen.slots]
        both = torch.cat([entering, deeper[chosen.sources]], dim=1)
        return both, chosen.slots, chosen.sources

    def _entering(self, item: Any, rows: Tensor, slots: Tensor, sources: Tensor) -> Tensor:
        """An item's rows with the text between them, and the offsets of all."""
        tokens = self._tokens(item)
        at, _ = super().get_mrope_input_positions(tokens, [item])  # type: ignore[misc]
        ids = torch.tensor(tokens)  # on the host, which is not to wait for the device
        is_visual = ids == self._placeholder(item.modality)
        places = [mask.nonzero()[:, 0] for mask in (is_visual, ~is_visual)]
        ids, at, visual, text = (one.to(rows.device) for one in (ids, at, *places))
        columns = torch.cat([visual[slots], text])
        at = torch.cat([at[:, visual[sources]], at[:, text]], dim=1)
        if len(text):
            words = self.language_model.embed_input_ids(ids[text]).to(rows)
            rows = torch.cat([rows, pad(words, (0, rows.shape[1] - words.shape[1]))])
        order = columns.argsort()
        return torch.cat([rows, digits(at, rows.dtype)], dim=1)[order]

    def _project(self, units: Tensor) -> Tensor:
        """Merged rows of the encoder (n, unit * C) as the LLM sees them."""
        patches = rearrange(units, "n (u c) -> (n u) c", u=self.visual.spatial_merge_size**2)
        projected: Tensor = self.visual.merger(patches)
        return projected

    @contextmanager
    def _reading(self, grids: Sequence[Sequence[int]]) -> Iterator[dict[Signal, Sequence[Tensor]]]:
        """What the method declared of the encoder, per item in the order of its tokens; there when
        the encoder has run."""
        seen: dict[Signal, Tensor] = {}
        needs: tuple[Any, ...] = self._served.needs
        read: dict[Signal, Sequence[Tensor]] = {}
        with ExitStack() as hooks:
            for need in needs:
                if (reader := OF_ATTENTION.get(type(need))) is not None:
                    module = self.visual.blocks[need.layer].attn.attn
                    hook = partial(_hear_attention, seen, need, reader)
                elif need == EncoderFeatures():
                    # Its norm: vLLM calls a merger that it may compile without the hooks of it.
                    module = next(self.visual.merger.children())
                    hook = partial(_hear_rows, seen, need)
                else:
                    continue
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield read
        for need, values in seen.items():
            units = self._units(values, grids)
            whole = need == EncoderFeatures()
            read[need] = [one.flatten(1) if whole else one.mean(1) for one in units]

    def _units(self, values: Tensor, grids: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        """Of patches (S, ...) as the blocks see them those behind each token, per item."""
        unit = self.visual.spatial_merge_size**2
        units = self._in_order(rearrange(values, "(n u) ... -> n u ...", u=unit), grids)
        sizes = [frames * rows * columns // unit for frames, rows, columns in grids]
        return units.split(sizes)

    def _in_order(self, units: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Units as the blocks see them in the order of the tokens."""
        return units


def _hear_attention(
    seen: dict[Signal, Tensor], need: Signal, reader: Any, module: Any, args: Any, kwargs: Any
) -> None:
    """vLLM's attention is given all segments in one row, (1, S, H, D_head), and their bounds."""
    query, key = (rearrange(kwargs[word], "b s h d -> b h s d") for word in ("query", "key"))
    sizes = kwargs["cu_seqlens"].diff().tolist()
    pairs = zip(query.split(sizes, 2), key.split(sizes, 2), strict=True)
    seen[need] = torch.cat([reader(q, k, module.scale) for q, k in pairs], dim=1)[0]


def _hear_rows(
    seen: dict[Signal, Tensor], need: Signal, module: Any, args: Any, kwargs: Any
) -> None:
    rows: Tensor = args[0]
    seen[need] = rows.reshape(-1, rows.shape[-1])
