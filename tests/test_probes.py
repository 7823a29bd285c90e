"""Signals captured beside fused attention equal what eager attention maps say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import zoo
from oracle import Truth
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from vlmprune.adapters.patching import patch
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import (
    ClsAttention,
    Cut,
    Features,
    LastRowAttention,
    Method,
    PixelSeed,
    Place,
    ReceivedAttention,
    Selection,
    Signal,
    VisualTokens,
)

CLOSE = {"atol": 2e-6, "rtol": 1e-4}
TOWER_LAYERS = range(5)
ROWS = {"single": zoo.SINGLE, "batch": zoo.BATCH}
LAYOUTS = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


@dataclass(frozen=True, kw_only=True)
class Recorder(Method):
    """Writes down what it is given and keeps the first tokens."""

    name: ClassVar[str] = "recorder"
    place: ClassVar[Place] = Place.BEFORE_LLM
    wants: tuple[Signal, ...]
    layer: int = 0
    seen: list[VisualTokens] = field(default_factory=list)

    def needs(self, shape):
        return self.wants

    def cuts(self, shape):
        return (Cut(self.layer),)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert set(self.wants) <= set(tokens.signals)
        self.seen.append(tokens)
        return Selection(kept=torch.arange(keep))


@dataclass(frozen=True, kw_only=True)
class DecoderRecorder(Recorder):
    place: ClassVar[Place] = Place.DECODER


def call(recorder: Recorder, keep: float = 0.5) -> MethodCall:
    return MethodCall(method=recorder, budget=Budget("keep_ratio", keep))


def record(case, attention, rows, *recorders: Recorder, run=None) -> list[list[VisualTokens]]:
    """What each recorder saw of each image in one prefill."""
    model = case.model(attention)
    patch(model, [call(r, 0.5 / (i + 1)) for i, r in enumerate(recorders)])
    with torch.no_grad():
        (run or model)(**case.inputs(rows))
    for recorder in recorders:
        assert len(recorder.seen) == len(zoo.images(rows))
    return [recorder.seen for recorder in recorders]


def tower_maps(case, rows) -> list[list[torch.Tensor]]:
    """[layer][image]: eager attention of the vision tower (heads, queries, keys), raster order for
    LLaVA, the tower's own window order for Qwen."""
    model, inputs = case.reference("eager"), case.inputs(rows)
    if not case.qwen:
        out = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
        return [list(layer) for layer in out.attentions]
    return _qwen_maps(model.model.visual, inputs)


def _qwen_maps(visual, inputs) -> list[list[torch.Tensor]]:
    """By hand from q and k: the tower returns no maps."""
    maps: list[list[torch.Tensor]] = []
    sizes = inputs["image_grid_thw"].prod(-1).tolist()

    def spy(module, args, kwargs):
        x = args[0]
        segments = kwargs["cu_seqlens"]
        cos, sin = (e[:, None] for e in kwargs["position_embeddings"])
        q, k, _ = module.qkv(x).view(len(x), 3, module.num_heads, -1).unbind(1)
        half = q.shape[-1] // 2

        def rotate(z):
            return z * cos + torch.cat([-z[..., half:], z[..., :half]], -1) * sin

        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / q.shape[-1] ** 0.5
        owner = torch.bucketize(torch.arange(len(x)), segments, right=True)
        scores = scores.masked_fill(owner[:, None] != owner[None], -torch.inf).softmax(-1)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        maps.append([scores[:, s : s + n, s : s + n] for s, n in zip(starts, sizes, strict=True)])

    hooks = [b.attn.register_forward_pre_hook(spy, with_kwargs=True) for b in visual.blocks]
    try:
        visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def to_tokens(case, name: str, per_patch: torch.Tensor) -> torch.Tensor:
    """Received attention per patch -> per visual token in raster order."""
    if not case.qwen:
        return per_patch[1:] if case.shape.tower.has_cls else per_patch
    units = per_patch.view(-1, 4).mean(1)
    window_index, _ = modeling_qwen2_5_vl.get_vision_window_index(
        torch.tensor([zoo.QWEN_GRIDS[name]]), spatial_merge_size=2, window_size=16, patch_size=4
    )
    return units[torch.argsort(window_index)]


@zoo.ALL
@zoo.ATTENTION
@LAYOUTS
def test_received_attention(case, attention, rows):
    wants = tuple(ReceivedAttention(layer) for layer in TOWER_LAYERS)
    (seen,) = record(case, attention, rows, Recorder(wants=wants))
    maps = tower_maps(case, rows)
    for image, name in enumerate(zoo.images(rows)):
        for want in wants:
            found = seen[image].signals[want]
            columns = maps[want.layer][image].mean(0).sum(0)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, to_tokens(case, name, columns), **CLOSE)
    assert found.shape == (case.num_tokens(name),)
    assert 0.5 < found.mean() < 1.5 and found.std() > 0.01


@pytest.mark.parametrize("name", [n for n, c in zoo.CASES.items() if c.shape.tower.has_cls])
@zoo.ATTENTION
@LAYOUTS
def test_cls_attention(name, attention, rows):
    case = zoo.CASES[name]
    wants = tuple(ClsAttention(layer) for layer in TOWER_LAYERS)
    (seen,) = record(case, attention, rows, Recorder(wants=wants))
    maps = tower_maps(case, rows)
    for image in range(len(seen)):
        for want in wants:
            expected = maps[want.layer][image].mean(0)[0, 1:]
            torch.testing.assert_close(seen[image].signals[want], expected, **CLOSE)
            assert expected.sum() < 1  # the CLS column is dropped, not renormalised


@zoo.ALL
@zoo.ATTENTION
@LAYOUTS
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_last_row_attention(case, attention, rows, layer):
    cut = min(layer + 1, 3)
    want = LastRowAttention(cut - 1)
    (seen,) = record(case, attention, rows, DecoderRecorder(wants=(want,), layer=cut))
    out = case.reference("eager")(**case.inputs(rows), output_attentions=True)
    truth, image = Truth(case.reference("eager"), case.inputs(rows)), 0
    for row, spec in enumerate(truth.rows):
        for places in spec.images:
            expected = out.attentions[cut - 1][row].mean(0)[-1, spec.columns[places]]
            torch.testing.assert_close(seen[image].signals[want], expected, **CLOSE)
            image += 1


@zoo.ALL
@LAYOUTS
def test_last_row_attention_after_an_earlier_cut_sees_what_is_alive(case, rows):
    want = LastRowAttention(1)
    first = Recorder(wants=())
    _, seen = record(case, "sdpa", rows, first, DecoderRecorder(wants=(want,), layer=2))
    inputs = case.inputs(rows)
    kept = [torch.arange(round(0.5 * case.num_tokens(name))) for name in zoo.images(rows)]
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


@zoo.ALL
@zoo.ATTENTION
def test_features_grid_and_shape(case, attention):
    (seen,) = record(case, attention, zoo.BATCH, Recorder(wants=(Features(),)))
    truth = Truth(case.reference(attention), case.inputs(zoo.BATCH))
    features = [row.embeds[image] for row in truth.rows for image in row.images]
    for tokens, name, expected in zip(seen, zoo.images(zoo.BATCH), features, strict=True):
        torch.testing.assert_close(tokens.signals[Features()], expected, **CLOSE)
        assert tokens.num_tokens == len(expected)
        assert tuple(tokens.grid) == case.grid(name)
        assert tokens.shape == case.shape
        assert tokens.alive is None or torch.equal(tokens.alive, torch.arange(len(expected)))


@zoo.ALL
def test_the_pixel_seed_is_the_images_own(case):
    seeds: dict[str, int] = {}
    for rows in (zoo.BATCH, zoo.SINGLE, (("B", 2), (3, "A", 2)), ((3, "B", 2, "C", 2),)):
        rows = tuple(row if isinstance(row[0], int) else (2, *row) for row in rows)
        (seen,) = record(case, "sdpa", rows, Recorder(wants=(PixelSeed(),)))
        for tokens, name in zip(seen, zoo.images(rows), strict=True):
            seed = tokens.signals[PixelSeed()]
            assert seed.dtype == torch.int64 and seed.dim() == 0
            assert seeds.setdefault(name, int(seed)) == int(seed)
    assert len(set(seeds.values())) == 3


@zoo.ALL
def test_probes_do_not_change_a_bit(case):
    wants = tuple(ReceivedAttention(layer) for layer in TOWER_LAYERS)
    if case.shape.tower.has_cls:
        wants += tuple(ClsAttention(layer) for layer in TOWER_LAYERS)
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    before = case.reference()(**inputs).logits
    tower = Recorder(wants=wants)
    decoder = DecoderRecorder(wants=(LastRowAttention(2),), layer=3)
    # The contract skips methods that keep everything; 0.99 of a few tokens rounds to all but the
    # probes of the other image's method still run. So record first, then compare the features.
    patch(model, [call(tower, 0.5), call(decoder, 0.4)])
    model(**inputs)
    features = model.model.get_image_features(
        **{k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")},
        return_dict=True,
    ).pooler_output
    expected = Truth(case.reference(), inputs)
    flat = [row.embeds[image] for row in expected.rows for image in row.images]
    assert all(torch.equal(a, b) for a, b in zip(features, flat, strict=True))
    patch(model, call(DecoderRecorder(wants=(LastRowAttention(2),), layer=3), 1.0))
    assert torch.equal(model(**inputs).logits, before)


@zoo.ALL
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
