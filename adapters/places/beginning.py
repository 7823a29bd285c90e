"""A prefill with visual tokens begins: the text model is given fewer of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ...prune.budget import Stage
from ...prune.contract import Place, Selection
from ...prune.errors import UnsupportedFeatureError
from ..both_ways import Given
from ..cache.pruned import PrunedState, make_pruned, pruned_state
from ..cache_names import CACHE, cache_given
from ..checks.calls import refuse_cache, refuse_forgetting, refuse_thinned
from ..encoded import Encoded
from ..family import Modality
from ..patch_setup import Setup
from ..report import Last, StageReport
from ..reporting import in_encoder, layers_read, remarks, states_remark
from ..sequence.batch import Batch
from ..sequence.layout import Layout
from ..sequence.placed import PlacedImage
from ..sequence.positions import PositionIds
from .cache_attend import note_prefix
from .choosing import Chosen
from .compression import Compression
from .entries import attend_budget, entries_to_keep
from .layer_inputs import LayerInputs
from .placing import place
from .prefill import Prefill


def begin(
    encoded: Mapping[Modality, Encoded],
    visual: Mapping[Modality, Tensor],
    kwargs: dict[str, Any],
    chosen: Chosen | None,
    given: Given | None,
) -> tuple[Prefill | None, Last]:
    """Shorten the text model's keyword arguments, in place.

    Args:
        visual: (B, L) bool, the columns of the placeholders of each modality.
        kwargs: arguments of the text model.
        chosen: selections made earlier in the same generate(), reused and added to.
        given: what a core was given that makes the decoder's masks itself, and passes those.

    Returns:
        the prefill (None where nothing is cut: the arguments are untouched), and its report.
    """
    embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
    numbered = kwargs.get("position_ids")
    if given is not None:
        mask, numbered = given.mask, given.position_ids
    cache: Any = cache_given(kwargs)
    state = pruned_state(cache)
    setup = _setup(encoded.values(), state)
    real = _real(embeds, mask)
    images, samples = place(setup, encoded, visual)
    repeats = len(embeds) // samples
    somewhere = torch.stack(list(visual.values())).any(0)
    text = real & ~somewhere
    last = _report(setup, images, text.sum(1)[::repeats], encoded.values())
    keeps = entries_to_keep(setup, images, last.text_tokens)
    acts = keeps is not None or setup.thinned or any(image.plan for image in images)
    if state is None and not acts:
        return None, last

    keep = real.clone()
    for image in images:
        image.mark(keep)
    first = Layout.of(keep)
    if cache is None and _wants_cache(kwargs, setup.config):
        cache = kwargs[CACHE] = DynamicCache(config=setup.config)
    _refuse(setup, state, cache, images, acting=keeps is not None, generating=chosen is not None)
    if setup.thinned:
        shown = {int(row) for image in images for row in image.rows}
        refuse_thinned(setup, cache, (len(shown), len(embeds)), generating=chosen is not None)
    if cache is not None:
        state = _prune_cache(setup, cache, mask, real.shape[1], real.device)
        stored = int(cache.physical_length())
        behind = min(_trailing_text(real, somewhere), first.length)
        state.uncroppable = stored + first.length - behind
        attend_budget(state, keeps, repeats, stored)
        state.core, state.heads = {}, {}  # an earlier prompt's
    ids = _given_positions(kwargs, cache)
    if keeps is not None and state is not None:
        note_prefix(setup, state, cache, ids, real)
    earlier = None if state is None else state.segments[0].shift
    counted = _padding_counted(mask, numbered)
    inputs = LayerInputs(
        setup=setup,
        batch=Batch(images, real, text, embeds, setup.final_norm, setup.turned_back, counted),
        layout=first,
        positions=PositionIds(ids, images, real, first.keep if _repacks(setup, images) else None),
        cache=cache,
        state=state,
        both_ways=None if given is None else given.both_ways,
    )
    compression = Compression.of(setup, cache, keeps, samples, repeats)
    prefill = Prefill(inputs, last, chosen, compression)
    _shorten(kwargs, inputs, earlier, masked=given is not None)
    return prefill, last


def _shorten(
    kwargs: dict[str, Any], inputs: LayerInputs, earlier: Tensor | None, *, masked: bool
) -> None:
    """The text model's arguments as they are for what enters it, in place.

    Args:
        earlier: (B, 1), how many positions earlier turns closed up.
        masked: whether the core has made the decoder's masks.
    """
    first = inputs.layout
    kwargs["position_ids"] = inputs.positions.entering(first, earlier)
    kwargs["inputs_embeds"] = first.shorten(kwargs["inputs_embeds"])
    for name in inputs.setup.by_token:
        if kwargs.get(name) is not None:
            kwargs[name] = first.shorten(kwargs[name])
    if isinstance(wanted := kwargs.get("logits_to_keep"), int) and wanted > 1:
        # The last layers would go on with so many columns, of which some are dropped tokens'.
        kwargs["logits_to_keep"] = 0
    kwargs["attention_mask"] = inputs.padding
    if inputs.padding is None and inputs.cache is None:
        # Without mask and cache, gaps in the positions would read as packed sequences.
        kwargs["attention_mask"] = first.valid
    if masked:
        kwargs["attention_mask"] = _masks(inputs, kwargs["inputs_embeds"])


def _refuse(
    setup: Setup,
    state: PrunedState | None,
    cache: Any,
    images: Sequence[PlacedImage],
    *,
    acting: bool,
    generating: bool,
) -> None:
    """Refuse caches that a method cannot take entries out of.

    Args:
        state: of a cache that an earlier prompt shortened.
        acting: whether a method on the cache does something here.
    """
    if acting:
        refuse_cache(setup, cache, shortened=state is not None)
    elif state is not None and state.setup.on_cache not in (None, setup.on_cache):
        refuse_cache(state.setup, cache, shortened=True)
    forgets = next((s for image in images for s in image.plan if s.cut.below), None)
    if forgets is not None:
        refuse_forgetting(forgets.call.name, cache, generating=generating)


def _repacks(setup: Setup, images: Sequence[PlacedImage]) -> bool:
    """Whether positions close up before the first layer."""
    ahead = {s.place for image in images for s in image.plan if s.place < Place.DECODER}
    return any(setup.positions[place] == "repacked" for place in ahead)


def _masks(inputs: LayerInputs, embeds: Tensor) -> Any:
    """What a core would have made for the embeddings that enter: a mask, or one of each kind."""
    config = inputs.setup.config
    if getattr(config, "layer_types", None) is None:
        return inputs.mask(0, 0, embeds)
    firsts = {kind: config.layer_types.index(kind) for kind in set(config.layer_types)}
    return {kind: inputs.mask(0, layer, embeds) for kind, layer in firsts.items()}


def _real(embeds: Tensor, mask: Any) -> Tensor:
    """(B, L) bool: no padding."""
    if mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UnsupportedFeatureError(
            "A custom 4-D attention mask cannot be shortened with the visual tokens: pass the "
            "2-D padding mask of the processor, or unpatch the model."
        )
    return mask[:, -embeds.shape[1] :].to(embeds.device, torch.bool)


def _prune_cache(
    setup: Setup, cache: Any, mask: Tensor | None, length: int, device: torch.device
) -> PrunedState:
    """The state of a cache that `length` columns are fed to; `mask` covers stored ones, too."""
    new = pruned_state(cache) is None
    state = make_pruned(cache, setup)
    if new and mask is not None and mask.shape[1] > length:
        for segment in state.segments:  # a text prefix, cached before the image came
            segment.padding = mask[:, :-length].to(device, torch.bool)
    return state


def _given_positions(kwargs: Mapping[str, Any], cache: Any) -> Tensor:
    """The caller's position ids, (B | 1, L) or (axes, B, L)."""
    embeds, ids = kwargs["inputs_embeds"], kwargs.get("position_ids")
    length = embeds.shape[1]
    if ids is None:
        seen = cache.get_seq_length() if cache is not None else 0
        ids = torch.arange(length, device=embeds.device)[None] + seen
    return ids[..., -length:].to(embeds.device)


def _padding_counted(mask: Any, position_ids: Tensor | None) -> Tensor | None:
    """(B,): columns in front of each row's first token, cached ones included, where the model
    numbers columns; None where positions are given or there is no padding mask."""
    if position_ids is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask.bool().int().argmax(1)


def _setup(encoded: Iterable[Encoded], state: PrunedState | None) -> Setup:
    """What images were encoded with is what they enter the LLM with; an earlier image in the cache
    keeps its segments."""
    encoded = list(encoded)
    setup = encoded[0].setup
    if any(other.setup.calls != setup.calls for other in encoded):
        raise UnsupportedFeatureError(
            "The images and the videos of this call were encoded with different budgets or "
            "methods: encode them together."
        )
    setup.check_images(sum(len(one.images) for one in encoded))
    return setup if state is None else setup.on_cache_of(state.setup)


def _report(
    setup: Setup, images: list[PlacedImage], text: Tensor, encoded: Iterable[Encoded]
) -> Last:
    """What is known before the decoder runs; `text` (samples,) counts the text tokens."""
    said = remarks([(image.encoded.num_tokens, image.encoded.calls) for image in images])
    last = Last(
        tilings=[image.encoded.tiling for image in images],
        kept=[image.tokens for image in images],
        order=[image.order for image in images],
        tokens_kept=[len(image.slots) for image in images],
        members=[image.members for image in images],
        image_sample=[image.sample for image in images],
        text_tokens=text.tolist(),
        plans=[image.plan for image in images],
        positions=setup.reported_positions,
        num_layers=setup.shape.decoder.num_layers,
        layers_read=layers_read(setup),
        recorded=setup.record,
        unranked={call.name: call.method.unranked for call in setup.calls},
        stopwatches=list({id(image.stopwatch): image.stopwatch for image in images}.values()),
        note=" ".join(filter(None, (states_remark(setup), said))) or None,
    )
    last.encoder = [entering for one in encoded for entering in one.entering]
    left = [image.encoded.encoded for image in images]
    if any(one is not None for one in left):
        everything = [torch.arange(i.encoded.num_tokens, device=i.slots.device) for i in images]
        whole = [Selection(kept=all_) for all_ in everything]
        own = [one or all_ for one, all_ in zip(left, whole, strict=True)]
        last.stages.append(in_encoder(setup, own))
    before = _before_llm(images)
    if before:
        report = StageReport(
            before[0].call.name,
            Place.BEFORE_LLM,
            before[0].layer,
            last.kept,
            setup.positions[Place.BEFORE_LLM],
            order=last.order,
            groups=last.members,
            rows=last.order,
            members=last.members,
        )
        if setup.record:
            report = replace(report, scores=[image.encoded.selection.scores for image in images])
        last.stages.append(report)
    return last


def _before_llm(images: Sequence[PlacedImage]) -> list[Stage]:
    """Cuts before the LLM."""
    return [stage for image in images for stage in image.plan if stage.place is Place.BEFORE_LLM]


def _trailing_text(real: Tensor, visual: Tensor) -> int:
    """Text tokens after the last visual one, in the row that has fewest of them."""
    after = visual.flip(1).cumsum(1).flip(1) == 0
    counts = (real & after).sum(1).masked_fill(~visual.any(1), real.shape[1])
    return int(counts.min())  # the host waits here


def _wants_cache(kwargs: Mapping[str, Any], config: Any) -> bool:
    use_cache = kwargs.get("use_cache")
    return bool(config.use_cache if use_cache is None else use_cache)
