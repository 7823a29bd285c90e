"""Signals captured beside fused attention equal what eager attention maps say."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from kit import zoo
from kit.oracle import Truth
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from vlmprune.adapters.family import IMAGE, VIDEO
from vlmprune.adapters.patching import patch
from vlmprune.adapters.registry import family_of
from vlmprune.prune import scores as probes
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import (
    AttentionToCls,
    BeforeLLM,
    ClsAttention,
    ClsAttentionOneHead,
    ClsFeatures,
    ClsLogits,
    Cut,
    EncoderFeatures,
    Features,
    InDecoder,
    Keys,
    PixelSeed,
    Place,
    ReceivedAttention,
    Selection,
    Signal,
    TextAttention,
    VisualTokens,
)

CLOSE = {"atol": 2e-6, "rtol": 1e-4}
FEATURES_CLOSE = {"atol": 1e-5, "rtol": 1e-4}
TOWER_LAYERS = range(5)
ROWS = {"single": zoo.SINGLE, "batch": zoo.BATCH}
LAYOUTS = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
EVERYTHING = pytest.mark.parametrize(
    ("case", "rows", "attention"),
    [
        pytest.param(case, rows, attention, id=f"{attention}-{case.name}-{name}")
        for case in [*zoo.CASES.values(), zoo.GONE]
        for name, rows in (ROWS | {"videos": case.layout.videos}).items()
        if name != "videos" or case.layout.takes_videos
        for attention in ("sdpa", "eager")
        if case not in zoo.OTHER_CASES or (name != "single" and attention == "sdpa")
    ],
)


@dataclass(frozen=True, kw_only=True)
class Recorder(BeforeLLM):
    """Writes down what it is given of whole images and keeps the last tokens."""

    name: ClassVar[str] = "recorder"
    scopes = ("image",)
    newline_policies = ("drop", "keep", "compete")
    wants: tuple[Signal, ...]
    seen: list[VisualTokens] = field(default_factory=list)

    def needs(self, shape):
        return self.wants

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert set(self.wants) <= set(tokens.signals)
        self.seen.append(tokens)
        return Selection(kept=torch.arange(tokens.num_tokens - keep, tokens.num_tokens))


@dataclass(frozen=True, kw_only=True)
class DecoderRecorder(InDecoder):
    """The same in the decoder."""

    name: ClassVar[str] = "decoder-recorder"
    wants: tuple[Signal, ...]
    layer: int
    seen: list[VisualTokens] = field(default_factory=list)

    needs, select = Recorder.needs, Recorder.select

    def cuts(self, shape):
        return (Cut(Place.DECODER, self.layer),)


def call(recorder: Recorder | DecoderRecorder, keep: float = 0.5) -> MethodCall:
    return MethodCall(method=recorder, budget=Budget("keep_ratio", keep))


def record(case, attention, rows, *recorders, run=None) -> list[list[VisualTokens]]:
    """What each recorder saw of each image in one prefill: in the decoder in the order of the
    prompts, before the LLM images first and videos behind."""
    model = case.model(attention)
    patch(model, [call(r, 0.5 / (i + 1)) for i, r in enumerate(recorders)])
    with torch.no_grad():
        (run or model)(**case.inputs(rows))
    for recorder in recorders:
        assert len(recorder.seen) == len(zoo.images(rows))
    return [recorder.seen for recorder in recorders]


# --- What the encoder computes, by hand --------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """An image, or a video: what the encoder computed of its tiles or frames."""

    name: str
    tiling: object
    queries: list[torch.Tensor]
    """Per layer (tiles, H, S, D_head), as attention uses them."""
    keys: list[torch.Tensor]
    hidden: torch.Tensor
    """(tiles, S, C): what the projector reads, CLS included."""
    place: Callable[[torch.Tensor], torch.Tensor]
    """(tiles, S without CLS, width) -> (P, width): values in the order of the prompt's patches,
    as the model itself packs, crops, scales and pools features."""

    def attention(self, layer: int) -> torch.Tensor:
        """(tiles, H, queries, keys)."""
        return self.logits(layer).softmax(-1)

    def logits(self, layer: int) -> torch.Tensor:
        q, k = self.queries[layer], self.keys[layer]
        return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5

    def patches(self, values: torch.Tensor) -> torch.Tensor:
        """(tiles, S, ...) with a value for CLS, where there is one -> (P, ...)."""
        flat = values.flatten(2) if values.dim() > 2 else values[..., None]
        return self.place(flat).view(-1, *values.shape[2:])


@functools.cache
def encode(case: zoo.Case, rows) -> list[Encoded]:
    """All images, then all videos, of a batch on the unpatched model."""
    model, inputs = case.reference("eager"), case.inputs(rows)
    if case.packed:
        return [
            image
            for kind, given in zoo.encoder_inputs(inputs).items()
            for image in _encode_qwen(case, model.model, kind, given, rows)
        ]
    if model.config.model_type == "mistral3":
        return [_encode_pixtral(case, model.model.vision_tower, name) for name in zoo.images(rows)]
    if model.config.model_type == "lfm2_vl":
        return [_encode_siglip2(case, model.model, name) for name in zoo.images(rows)]
    if model.config.model_type == "gemma4":
        names = sorted(zoo.images(rows), key=lambda name: name in zoo.FRAMES)
        return [_encode_gemma4(case, model.model.vision_tower, name) for name in names]
    found = []
    family, side = family_of(model), zoo.SIDE
    skip = int(case.shape.tower.has_cls)
    for kind, given in zoo.encoder_inputs(inputs).items():
        tower = family.of({"image": IMAGE, "video": VIDEO}[kind]).vision_tower
        queries, keys, hidden = _tower_reads(model.model, tower, kind, given)
        seen = [
            (name, alone)
            for row in rows
            for name in zoo.images([row])
            if (name in zoo.FRAMES) == (kind == "video")
            for alone in [sum(n not in zoo.FRAMES for n in zoo.images([row])) == 1]
        ]
        start = 0
        for i, (name, alone) in enumerate(seen):
            tiling = case.tiling(name, alone)
            count = sum(len(b.row_sizes) * len(b.column_sizes) for b in tiling.blocks)
            here = slice(start, start + count)
            start += count

            def place(values, mean=True, kind=kind, given=given, i=i):
                values = values[:, skip:]
                if (of_tokens := zoo.fact(model, "of_tokens")) is not None:
                    return of_tokens(model.model, values, mean)
                if kind == "video":
                    core = model.model
                    pool = getattr(core, "apply_pooling", None) or core.vision_resampler
                    return pool(values).flatten(0, 1)
                if "image_sizes" not in given:
                    return values[0]
                size = given["image_sizes"][i : i + 1]
                options = {}
                if hasattr(model.config, "vision_aspect_ratio"):
                    options["vision_aspect_ratio"] = model.config.vision_aspect_ratio
                else:
                    options["vision_feature_select_strategy"] = "default"
                assert values.shape[1] == side * side
                return model.model.pack_image_features([values], size, **options)[0][0]

            found.append(
                Encoded(
                    name,
                    tiling,
                    [q[here] for q in queries],
                    [k[here] for k in keys],
                    hidden[here],
                    place,
                )
            )
        assert start == len(hidden)
    return found


@torch.no_grad()
def _tower_reads(core, tower, kind: str, given: dict):
    """Queries and keys of every layer, and what the projector read, of all pictures."""
    reads: dict[str, list[torch.Tensor]] = {"q_proj": [], "k_proj": []}
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda module, args, output, into=into: into.append(output)
        )
        for attention in tower.modules()
        for name, into in reads.items()
        if hasattr(attention, name)
    ]
    hidden = []
    last = getattr(tower, "transformer", tower)  # of Ovis 2, behind which patches are shuffled
    hooks.append(last.register_forward_hook(lambda module, args, output: hidden.append(output)))
    try:
        getattr(core, f"get_{kind}_features")(**given, return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    heads = tower.config.num_attention_heads
    split = {
        name: [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in found]
        for name, found in reads.items()
    }
    layers = getattr(core.config, "vision_feature_layer", None)
    if layers is None or hidden[0].hidden_states is None:  # the last one
        return split["q_proj"], split["k_proj"], hidden[0].last_hidden_state
    layers = [layers] if isinstance(layers, int) else layers
    read = torch.cat([hidden[0].hidden_states[layer] for layer in layers], -1)
    return split["q_proj"], split["k_proj"], read


@torch.no_grad()
def _encode_qwen(case: zoo.Case, core, kind: str, given: dict, rows) -> list[Encoded]:
    """The encoder runs on all images at once, Qwen2.5 in window order."""
    visual = core.visual
    queries: list[list[torch.Tensor]] = []
    keys: list[list[torch.Tensor]] = []
    masks: list[list[torch.Tensor]] = []
    sizes = given[f"{kind}_grid_thw"].prod(-1).tolist()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def spy(module, args, kwargs):
        x, segments = args[0], kwargs["cu_seqlens"]
        cos, sin = (e[:, None] for e in kwargs["position_embeddings"])
        q, k, _ = module.qkv(x).view(len(x), 3, module.num_heads, -1).unbind(1)
        half = q.shape[-1] // 2

        def rotate(z):
            return z * cos + torch.cat([-z[..., half:], z[..., :half]], -1) * sin

        owner = torch.bucketize(torch.arange(len(x)), segments, right=True)
        apart = torch.where(owner[:, None] == owner[None], 0.0, -torch.inf)
        for into, z in ((queries, rotate(q)), (keys, rotate(k))):
            into.append([part.transpose(0, 1)[None] for part in z.split(sizes)])
        masks.append([apart[s : s + n, s : s + n] for s, n in zip(starts, sizes, strict=True)])

    hooks = [b.attn.register_forward_pre_hook(spy, with_kwargs=True) for b in visual.blocks]
    hooks.append(visual.merger.register_forward_pre_hook(lambda module, args: last.append(args[0])))
    last: list[torch.Tensor] = []
    try:
        getattr(core, f"get_{kind}_features")(**given)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    names = [n for n in zoo.images(rows) if (n in zoo.FRAMES) == (kind == "video")]
    merged = sum(sizes) // len(last[0])  # patches in a row that the merger reads
    for i, name in enumerate(names):
        hidden = last[0].split([size // merged for size in sizes])[i][None]
        image = EncodedMasked(
            name,
            case.tiling(name),
            [layer[i] for layer in queries],
            [layer[i] for layer in keys],
            hidden,
            functools.partial(_raster, name, case.shape.tower.full_attention is not None),
            [layer[i] for layer in masks],
        )
        found.append(image)
    return found


def _projected(core, rows: torch.Tensor) -> torch.Tensor:
    """Where the projector reads the rows as they are."""
    projector = getattr(core, "multi_modal_projector", None)
    return (projector or core.connector.modality_projection)(rows)


@dataclass(frozen=True)
class EncodedMasked(Encoded):
    """Of pictures of which none sees another."""

    masks: list[torch.Tensor]

    def logits(self, layer: int) -> torch.Tensor:
        return super().logits(layer) + self.masks[layer]


@torch.no_grad()
def _encode_pixtral(case: zoo.Case, tower, name: str) -> Encoded:
    """A picture on its own, as if there were no other in the batch, and so no mask."""
    queries, keys = [], []

    def spy(module, args, kwargs):
        x = kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"]
        for into, projection in ((queries, module.q_proj), (keys, module.k_proj)):
            z = projection(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            half = z.shape[-1] // 2
            into.append(z * cos + torch.cat([-z[..., half:], z[..., :half]], -1) * sin)

    hooks = [
        layer.attention.register_forward_pre_hook(spy, with_kwargs=True)
        for layer in tower.transformer.layers
    ]
    try:
        hidden = tower(case.layout.pixels(name)).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    rows, columns = case.grid(name)

    def place(values, mean=True):
        patches = values[0].unflatten(0, (2 * rows, 2 * columns))
        tokens = [
            patches[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(0, 1)
            for r, c in itertools.product(range(rows), range(columns))
        ]
        return torch.stack([t.mean(0) if mean else t.flatten() for t in tokens])

    return Encoded(name, case.tiling(name), queries, keys, hidden, place)


@torch.no_grad()
def _encode_siglip2(case: zoo.Case, core, name: str) -> Encoded:
    """Each picture of an image on its own, so that nothing is padded; one behind the other, and
    none sees another."""
    reads, sizes = [], []
    for patches, size in case.layout.seen(name):
        given = {
            "pixel_values": patches[None],
            "spatial_shapes": torch.tensor([size]),
            "pixel_attention_mask": torch.ones(1, len(patches), dtype=torch.long),
        }
        reads.append(_tower_reads(core, core.vision_tower, "image", given))
        sizes.append(size)
    of_queries, of_keys, hidden = zip(*reads, strict=True)
    queries, keys = (
        [torch.cat(layer, 2) for layer in zip(*of, strict=True)] for of in (of_queries, of_keys)
    )
    counts = torch.tensor([rows * columns for rows, columns in sizes])
    owner = torch.arange(len(sizes)).repeat_interleave(counts)
    apart = torch.where(owner[:, None] == owner[None], 0.0, -torch.inf)

    def place(values, mean=True):
        tokens = []
        for part, (rows, columns) in zip(values[0].split(counts.tolist()), sizes, strict=True):
            squares = part.unflatten(0, (rows, columns))[None]
            own = core.multi_modal_projector.pixel_unshuffle(squares).flatten(0, 2)
            tokens.append(own.unflatten(1, (4, -1)).mean(1) if mean else own)
        return torch.cat(tokens)

    read, masks = torch.cat(hidden, 1), [apart] * len(queries)
    return EncodedMasked(name, case.tiling(name), queries, keys, read, place, masks)


class EncodedGemma4(Encoded):
    def logits(self, layer: int) -> torch.Tensor:
        return self.queries[layer] @ self.keys[layer].mT  # which are normed instead


@torch.no_grad()
def _encode_gemma4(case: zoo.Case, tower, name: str) -> Encoded:
    """An image, or the frames of a video, on its own and without any padding."""
    queries, keys = [], []
    pixels, (_, height, width) = case.layout.pixels(name), zoo.PATCH_GRIDS[name]
    cells = itertools.product(range(height), range(width))
    places = torch.tensor([(x, y) for y, x in cells]).expand(len(pixels), -1, -1)

    def spy(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        tables = zip(*(t.split(6, -1) for t in kwargs["position_embeddings"]), strict=True)
        tables = [(cos[:, None], sin[:, None]) for cos, sin in tables]
        for into, projection, norm in (
            (queries, module.q_proj, module.q_norm),
            (keys, module.k_proj, module.k_norm),
        ):
            z = norm(projection(x).unflatten(-1, (4, 12))).transpose(1, 2)
            parts = [  # the first half of a head turns with the column, the second with the row
                part * cos + torch.cat([-part[..., 3:], part[..., :3]], -1) * sin
                for part, (cos, sin) in zip(z.split(6, -1), tables, strict=True)
            ]
            into.append(torch.cat(parts, -1))

    hooks = [
        layer.self_attn.register_forward_pre_hook(spy, with_kwargs=True)
        for layer in tower.encoder.layers
    ]
    try:
        hidden = tower(pixels, places).last_hidden_state[None]
    finally:
        for hook in hooks:
            hook.remove()

    def place(values):
        squares = values.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return torch.nn.functional.avg_pool2d(squares, 2).flatten(2).mT.flatten(0, 1)

    return EncodedGemma4(name, case.tiling(name), queries, keys, hidden, place)


def _raster(name: str, windowed: bool, values: torch.Tensor, mean: bool = True) -> torch.Tensor:
    """Values of patches as the blocks see them (1, P * 4, width) -> per visual token in raster
    order."""
    units = values[0].unflatten(0, (-1, 4))
    if windowed:
        window_index, _ = modeling_qwen2_5_vl.get_vision_window_index(
            torch.tensor([zoo.PATCH_GRIDS[name]]),
            spatial_merge_size=2,
            window_size=16,
            patch_size=4,
        )
        units = units[torch.argsort(window_index)]
    return units.mean(1) if mean else units.flatten(1)


# --- Signals of the encoder --------------------------------------------------------------------


def expected_signal(case: zoo.Case, signal: Signal, image: Encoded) -> torch.Tensor:
    match signal:
        case ReceivedAttention(layer):
            return image.patches(image.attention(layer).mean(1).sum(1))
        case ClsAttention(layer):
            return image.patches(image.attention(layer).mean(1)[:, 0])
        case ClsLogits(layer):
            return image.patches(image.logits(layer).mean(1)[:, 0])
        case ClsAttentionOneHead(layer):
            q, k = (x.transpose(1, 2).flatten(2) for x in (image.queries[layer], image.keys[layer]))
            return image.patches((q[:, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, 0])
        case AttentionToCls(layer):
            return image.patches(image.attention(layer).mean(1)[..., 0])
        case Keys(layer):
            return image.patches(image.keys[layer].transpose(1, 2))
        case EncoderFeatures():
            merged = case.shape.tower.merge_unit > 1
            if merged and image.hidden.shape[:2] == (1, image.tiling.num_patches):
                return image.hidden[0]  # the encoder has merged patches itself
            if merged:
                return image.place(image.hidden, mean=False)
            return image.patches(image.hidden)
        case ClsFeatures():  # of the tiles of which something is left
            blocks = image.tiling.blocks
            left = [r * c > 0 for b in blocks for r in b.row_sizes for c in b.column_sizes]
            return image.hidden[torch.tensor(left), 0]
    raise NotImplementedError(signal)


OF_EVERY_ENCODER = (ReceivedAttention, Keys)
OF_CLS = (ClsAttention, ClsLogits, ClsAttentionOneHead, AttentionToCls)


@EVERYTHING
def test_signals_of_encoder_layers(case, attention, rows):
    kinds = OF_EVERY_ENCODER + (OF_CLS if case.shape.tower.has_cls else ())
    wants = tuple(kind(layer) for kind in kinds for layer in TOWER_LAYERS)
    (seen,) = record(case, attention, rows, Recorder(wants=wants))
    for tokens, image in zip(seen, encode(case, rows), strict=True):
        for want in wants:
            found = tokens.signals[want]
            assert found.dtype == torch.float32 and len(found) == image.tiling.num_patches
            close = FEATURES_CLOSE if isinstance(want, Keys | ClsLogits) else CLOSE
            torch.testing.assert_close(found, expected_signal(case, want, image), **close)
            assert found.std() > 1e-3
            if isinstance(want, ReceivedAttention):
                assert 0.5 < found.mean() < 1.5
            if isinstance(want, ClsAttention) and len(image.hidden) == 1:
                assert found.sum() < 1  # the CLS column is dropped, not renormalised


@EVERYTHING
def test_what_the_projector_reads(case, attention, rows):
    wants = (EncoderFeatures(), Features())
    if case.shape.tower.has_cls and case.shape.tower.merge_unit == 1:
        wants += (ClsFeatures(),)
    (seen,) = record(case, attention, rows, Recorder(wants=wants))
    core = case.reference(attention).model
    project = zoo.fact(core, "projected", _projected)
    for tokens, image in zip(seen, encode(case, rows), strict=True):
        for want in (EncoderFeatures(), ClsFeatures()):
            if want in wants:
                expected = expected_signal(case, want, image)
                size = max(1.0, float(expected.std()))  # Gemma 4 makes them larger
                found = tokens.signals[want] / size
                torch.testing.assert_close(found, expected / size, **FEATURES_CLOSE)
        if image.name in case.layout.resampled and len(image.hidden) > 1:
            continue  # scaled or pooled after the projector, which is not linear
        with torch.no_grad():
            if case.packed:
                units = tokens.signals[EncoderFeatures()]
                merged = 1 if hasattr(core.visual, "downsample") else 4
                projected = core.visual.merger(units.view(-1, units.shape[-1] // merged))
            else:
                projected = project(core, tokens.signals[EncoderFeatures()])
        torch.testing.assert_close(projected, tokens.signals[Features()], atol=1e-4, rtol=1e-4)


# --- Signals of the decoder --------------------------------------------------------------------


@zoo.turns("how", itertools.product(["sdpa", "eager"], ROWS, [0, 1, 3]), zoo.WHOLE_CASES)
def test_last_row_attention(case, how):
    attention, rows, layer = how[0], ROWS[how[1]], how[2]
    cut = min(layer + 1, 3)
    want = TextAttention(cut - 1)
    (seen,) = record(case, attention, rows, DecoderRecorder(wants=(want,), layer=cut))
    out = case.reference("eager")(**case.inputs(rows), output_attentions=True)
    truth, image = Truth(case.reference("eager"), case.inputs(rows)), 0
    for row, spec in enumerate(truth.rows):
        for places in spec.images:
            expected = out.attentions[cut - 1][row].mean(0)[-1, spec.columns[places]]
            torch.testing.assert_close(seen[image].signals[want], expected, **CLOSE)
            image += 1


@zoo.WHOLE
@LAYOUTS
def test_last_row_attention_after_an_earlier_cut_sees_what_is_alive(case, rows):
    want = TextAttention(1)
    first = Recorder(wants=())
    _, seen = record(case, "sdpa", rows, first, DecoderRecorder(wants=(want,), layer=2))
    inputs = case.inputs(rows)
    kept = [
        tiling.patches(torch.device("cpu"))[-round(0.5 * tiling.num_tokens) :]
        for tiling in case.tilings(rows)
    ]
    truth = Truth(case.reference("eager"), inputs, [(0, kept)], "original")
    repacked = Truth(case.reference("eager"), inputs, [(0, kept)], "repacked")
    expected = [x for b in range(len(rows)) for x in truth.last_row(b, 1)]
    alternative = [x for b in range(len(rows)) for x in repacked.last_row(b, 1)]
    for tokens, alive, one, two in zip(seen, kept, expected, alternative, strict=True):
        assert torch.equal(tokens.alive, alive)
        assert tokens.num_tokens == len(alive)
        found = tokens.signals[want]
        if case.fixed_positions:
            torch.testing.assert_close(found, one, **CLOSE)
        else:  # whichever the two methods' defaults give together; it is one of them
            assert min((found - one).abs().max(), (found - two).abs().max()) < 2e-6


@zoo.each(("attention", "newlines"), itertools.product(["sdpa", "eager"], ["drop", "compete"]))
def test_features_tiling_and_shape(case, attention, newlines):
    recorder = Recorder(wants=(Features(),), newlines=newlines)
    (seen,) = record(case, attention, zoo.BATCH, recorder)
    truth = Truth(case.reference(attention), case.inputs(zoo.BATCH))
    features = [row.embeds[image] for row in truth.rows for image in row.images]
    for tokens, tiling, expected in zip(seen, case.tilings(zoo.BATCH), features, strict=True):
        if newlines == "drop":
            expected, tiling = expected[tiling.patches(expected.device)], tiling.without_newlines()
        torch.testing.assert_close(tokens.signals[Features()], expected, **CLOSE)
        assert tokens.num_tokens == len(expected)
        assert tokens.tiling == tiling
        assert tokens.shape == case.shape
        assert tokens.alive is None


@zoo.ALL
def test_the_pixel_seed_is_the_images_own(case):
    seeds: dict[tuple, int] = {}
    for rows in (zoo.BATCH, zoo.SINGLE, (("B", 2), (3, "A", 2)), ((3, "B", 2, "C", 2),)):
        rows = tuple(row if isinstance(row[0], int) else (2, *row) for row in rows)
        (seen,) = record(case, "sdpa", rows, Recorder(wants=(PixelSeed(),)))
        # Some models see less of an image that is not alone.
        keys = zip(zoo.images(rows), case.tilings(rows), strict=True)
        for tokens, key in zip(seen, keys, strict=True):
            seed = tokens.signals[PixelSeed()]
            assert seed.dtype == torch.int64 and seed.dim() == 0
            assert seeds.setdefault(key, int(seed)) == int(seed)
    assert len(set(seeds.values())) == len(seeds) >= 3


@zoo.ALL
def test_probes_do_not_change_a_bit(case):
    wants = tuple(ReceivedAttention(layer) for layer in TOWER_LAYERS)
    if case.shape.tower.has_cls:
        wants += tuple(ClsAttention(layer) for layer in TOWER_LAYERS)
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    before = case.reference()(**inputs).logits
    tower = Recorder(wants=wants)
    attention = TextAttention(case.shape.decoder.attends_before(3))
    decoder = DecoderRecorder(wants=(attention,), layer=3)
    # The contract skips methods that keep everything; 0.99 of a few tokens rounds to all but the
    # probes of the other image's method still run. So record first, then compare the features.
    patch(model, [call(tower, 0.5), call(decoder, 0.4)])
    model(**inputs)
    given = zoo.encoder_inputs(inputs)["image"]
    features = model.model.get_image_features(**given, return_dict=True).pooler_output
    expected = Truth(case.reference(), inputs)
    flat = [row.embeds[image] for row in expected.rows for image in row.images]
    assert torch.equal(torch.cat(list(features)), torch.cat(flat))
    patch(model, call(DecoderRecorder(wants=(attention,), layer=3), 1.0))
    assert torch.equal(model(**inputs).logits, before)


@zoo.WHOLE
def test_signals_reach_the_method_through_generate_and_beams(case):
    wants = (ReceivedAttention(3), Features(), PixelSeed())
    (plain,) = record(case, "sdpa", zoo.BATCH, Recorder(wants=wants))
    model = case.model()
    recorder = Recorder(wants=wants)
    patch(model, call(recorder))
    model.generate(**case.inputs(zoo.BATCH), max_new_tokens=2, num_beams=2, do_sample=False)
    assert len(recorder.seen) == len(plain), "one choice per image, not one per beam"
    for found, expected in zip(recorder.seen, plain, strict=True):
        for want in wants:
            torch.testing.assert_close(found.signals[want], expected.signals[want], **CLOSE)


def test_an_accelerator_has_fewer_chunks_within_a_bound_of_memory():
    for heads, length in ((16, 577), (32, 4096), (16, 10**6)):
        query = torch.empty(1, heads, length, 64, device="meta")
        chunk = probes.chunk_of(query, query)
        of_one = 4 * heads * length
        assert chunk == probes._QUERY_CHUNK or chunk * of_one <= probes._CHUNK_BYTES
        assert (chunk + 1) * of_one > probes._CHUNK_BYTES  # and as many as fit


def test_scores_do_not_depend_on_the_chunk(monkeypatch):
    query, key = torch.randn(2, 2, 3, 50, 8)
    expected = probes.received(query, key, 0.3), probes.to_cls(query, key, 0.3)
    monkeypatch.setattr(probes, "chunk_of", lambda *_: 7)
    torch.testing.assert_close(probes.received(query, key, 0.3), expected[0])
    torch.testing.assert_close(probes.to_cls(query, key, 0.3), expected[1])
