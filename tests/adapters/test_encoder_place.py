"""Methods inside the vision encoder: every one on every model equals the slow computation, or is
refused; budgets, other places behind it, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
import vlmprune
from kit import skips, zoo
from kit.beside_oracle import budget_of, check_generated, check_kept, generated
from kit.reported import truth_of
from vlmprune.prune.contract import BeforeLLM, InEncoder, Place
from vlmprune.prune.registry import method_class

NAMES = [name for name in vlmprune.methods() if issubclass(method_class(name), InEncoder)]
RESTORING = [name for name in NAMES if method_class(name).restores]
REMOVING = [name for name in NAMES if name not in RESTORING]
BEFORE_LLM = [name for name in vlmprune.methods() if issubclass(method_class(name), BeforeLLM)]
PLAIN = "tome"
NATIVE = {"tome": {"r": 3}}
"""Fields without which a method needs a budget."""
NO_RESAMPLING = [c for c in zoo.CASES.values() if not set(c.layout.resampled) & set("ABCD")]


def patched(model, case, name: str, **given):
    """A handle; None where the encoder is none for this method, having seen that it is refused."""
    try:
        return vlmprune.patch(model, name, **given)
    except (vlmprune.UnsupportedModelError, vlmprune.MissingSignalError) as refused:
        assert name in str(refused)
        return None


@pytest.mark.parametrize(
    ("case", "attention", "budget", "positions", "name"),
    [
        pytest.param(case, *given, name, id=f"{name}-{given[0]}-{given[2]}-{case.name}")
        for case, given in itertools.product(
            NO_RESAMPLING,
            [
                ("sdpa", {"keep_ratio": 0.4}, "original"),
                ("eager", {"keep_tokens": 20}, "original"),
                ("sdpa", {"keep_ratio": 0.4}, "repacked"),
            ],
        )
        if given[0] == "sdpa" or case.name in zoo.TWO_NAMES
        if given[2] == "original" or case.name == zoo.TWO_NAMES[0]
        for name in zoo.asked(case, REMOVING)
    ],
)
def test_equals_the_oracle(case, attention, budget, positions, name):
    model = case.model(attention)
    handle = patched(model, case, name, positions=positions, **budget)
    if handle is None:
        skips.skip("no signal", name)
    alone = {}
    for rows in (zoo.SINGLE, zoo.BATCH):
        inputs = case.inputs(rows)
        with torch.no_grad():
            out = generated(model, inputs) if rows == zoo.BATCH else model(**inputs)
        kept = check_kept(case, rows, handle, lambda n: budget_of(budget, n))
        for image, indices in zip(zoo.images(rows), kept, strict=True):
            assert torch.equal(alone.setdefault(image, indices), indices), "depends on the batch"
        assert [s.place for s in handle.last.stages] == [Place.ENCODER] * handle.last.pruned
    check_generated(truth_of(case, inputs, model, handle), out, inputs, handle)


@zoo.asking(
    REMOVING,
    [c for c in zoo.CASES.values() if c.layout.takes_videos and not c.layout.resampled],
)
def test_videos_equal_the_oracle(case, name):
    model = case.model()
    handle = patched(model, case, name, keep_ratio=0.4)
    if handle is None:
        skips.skip("no signal", name)
    inputs = case.inputs(case.layout.videos)
    out = generated(model, inputs)
    check_kept(case, case.layout.videos, handle, lambda n: budget_of({"keep_ratio": 0.4}, n))
    check_generated(truth_of(case, inputs, model, handle), out, inputs, handle)


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("name", [n for n in REMOVING if not method_class(n).needs_budget])
def test_the_methods_own_numbers_hold_without_a_budget(case, name):
    model = case.model()
    handle = patched(model, case, name, **NATIVE.get(name, {}))
    if handle is None:
        skips.skip("no signal", name)
    inputs = case.inputs(zoo.BATCH)
    out = generated(model, inputs)
    method = handle.methods[0].method
    if case.name == zoo.TWO_NAMES[0]:  # a picture an image
        expected = method.block_counts(handle._engine.setup.shape.tower, zoo.SIDE**2, None)
        assert set(handle.last.tokens_kept) == {expected[-1]}
    assert handle.last.pruned
    check_generated(truth_of(case, inputs, model, handle), out, inputs, handle)


@zoo.asking(NAMES)
def test_keeping_everything_is_the_unpatched_model_bit_for_bit(case, name):
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    with torch.no_grad():
        dense = model(**inputs).logits
        handle = patched(model, case, name, keep_ratio=1.0)
        if handle is None:
            skips.skip("no signal", name)
        assert torch.equal(model(**inputs).logits, dense)
        assert handle.last.encoder == [] and not handle.last.stages
        handle.remove()
        assert torch.equal(model(**inputs).logits, dense)


BEHIND = [
    ["divprune"],
    ["cls_topk"],
    ["fastv"],
    ["sparsevlm"],
    ["visual_press"],
    ["divprune", "fastv", "visual_press"],
]


@pytest.mark.parametrize(
    ("name", "then"),
    [
        pytest.param(name, then, id=f"{name}-{'+'.join(then)}")
        for name, then in itertools.product(REMOVING, BEHIND)
        if name == PLAIN or then == BEHIND[REMOVING.index(name) % 4]
    ],
)
@zoo.BOTH_FAMILIES
def test_other_places_go_on_behind_it(case, name, then):
    model, budgets = case.model(), iter((0.3, 0.2, 0.1))
    fields = {"fuse": False} if "fuse" in method_class(name).__dataclass_fields__ else {}
    calls = [vlmprune.method(name, keep_ratio=0.5, **fields)]
    calls += [vlmprune.method(one, keep_ratio=next(budgets)) for one in then]
    try:
        handle = vlmprune.patch(model, calls)
    except (vlmprune.MissingSignalError, vlmprune.UnsupportedModelError):
        skips.skip("no signal", name)
    inputs = case.inputs(zoo.BATCH)
    out = generated(model, inputs)
    places = [stage.place for stage in handle.last.stages]
    assert places[0] is Place.ENCODER and places == sorted(places)
    if "visual_press" in then:
        assert handle.last.cache is not None
        return
    check_generated(truth_of(case, inputs, model, handle), out, inputs, handle)


@pytest.mark.parametrize(
    "case", [zoo.CASES["llava_next"], zoo.CASES["qwen2_5_vl"]], ids=lambda c: c.name
)
@pytest.mark.parametrize("then", BEFORE_LLM)
def test_what_chooses_before_the_llm_follows_unless_it_reads_the_grid(case, then):
    if (options := zoo.options_for(case, then)) is None:
        skips.skip("no signal", then)
    model, inputs, clip = case.model(), case.inputs(zoo.BATCH), options.pop("clip", None)
    calls = [
        vlmprune.method(PLAIN, keep_ratio=0.5),
        vlmprune.method(then, keep_ratio=0.2, **options),
    ]
    if method_class(then).needs_grid:
        with pytest.raises(vlmprune.MethodFieldError, match="behind it use one of"):
            vlmprune.patch(model, calls, clip=clip)
        return
    handle = vlmprune.patch(model, calls, clip=clip)
    with torch.no_grad():
        model(**inputs)
    first, second = handle.last.stages[:2]
    if then != "catp":  # which had nothing left to do before the decoder
        assert second.place is Place.BEFORE_LLM
        counts = [budget_of({"keep_ratio": 0.2}, n) for n in handle.last.tokens_in]
        assert handle.last.tokens_kept == counts
    for left, chosen in zip(first.kept, second.kept, strict=True):
        assert torch.isin(chosen, left).all()


def test_a_fused_row_cannot_be_ranked_behind():
    model = zoo.CASES[zoo.TWO_NAMES[0]].model()
    calls = [vlmprune.method("evit", keep_ratio=0.5), vlmprune.method("divprune", keep_ratio=0.2)]
    with pytest.raises(vlmprune.MethodFieldError, match="fuse=False"):
        vlmprune.patch(model, calls)


def test_two_methods_inside_the_encoder_are_one_too_many():
    model = zoo.CASES[zoo.TWO_NAMES[0]].model()
    calls = [vlmprune.method(name, keep_ratio=0.5) for name in ("evit", "tome")]
    with pytest.raises(vlmprune.MethodFieldError, match="in the vision encoder"):
        vlmprune.patch(model, calls)


def test_pictures_that_the_model_resamples_are_refused_unless_all_stays():
    case = zoo.CASES["llava_onevision"]
    model, inputs = case.model(), case.inputs(zoo.SINGLE)
    handle = vlmprune.patch(model, PLAIN, keep_ratio=0.4)
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="resamples"):
        model(**inputs)
    with handle.disabled(), torch.no_grad():
        model(**inputs)  # and nothing of the call that was refused is left
    with torch.no_grad():
        several = case.inputs((zoo.TWO,))  # images beside others are not resampled
        model(**several)
    assert handle.last.pruned


@zoo.asking(RESTORING)
def test_restoring_methods_let_the_llm_see_all_tokens(case, name):
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    handle = patched(model, case, name, keep_ratio=0.25)
    if handle is None:
        skips.skip("no signal", name)
    with torch.no_grad():
        dense = case.reference()(**inputs).logits
        found = model(**inputs).logits
    assert handle.last.tokens_kept == handle.last.tokens_in
    assert max(handle.last.encoder[-1][1]) == zoo.SIDE**2 // 4
    assert not torch.allclose(found, dense, atol=1e-3)
    features = [(model, True), (case.reference(), False)]
    of_each = [
        torch.cat(
            list(one.model.get_image_features(**zoo.encoder_inputs(inputs)["image"]).pooler_output)
        )
        for one, _ in features
    ]
    assert of_each[0].shape == of_each[1].shape


def test_images_are_remembered_as_the_encoder_left_them():
    case = zoo.CASES[zoo.TWO_NAMES[0]]
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    handle = vlmprune.patch(model, PLAIN, keep_ratio=0.4, remember_images=4)
    with torch.no_grad():
        first = model(**inputs)
        kept = handle.last.kept
        again = model(**inputs)
    assert handle.remembered.hits >= len(kept)
    assert torch.equal(first.logits, again.logits)
    assert all(torch.equal(a, b) for a, b in zip(kept, handle.last.kept, strict=True))
    assert handle.last.encoder == []


def test_another_layer_than_the_models_own_is_refused():
    case = zoo.CASES[zoo.TWO_NAMES[0]]
    model = case.model()
    vlmprune.patch(model, PLAIN, keep_ratio=0.4)
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="vision_feature_layer=-1"):
        model(**case.inputs(), vision_feature_layer=-1)


def test_several_layers_side_by_side_are_refused():
    model = zoo.CASES[zoo.TWO_NAMES[0]].model()
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(vlmprune.UnsupportedModelError, match="side by side"):
        vlmprune.patch(model, PLAIN, keep_ratio=0.4)


def test_embeddings_that_the_caller_merged_are_refused():
    case = zoo.CASES[zoo.TWO_NAMES[0]]
    model, inputs = case.model(), case.inputs(zoo.SINGLE)
    vlmprune.patch(model, PLAIN, keep_ratio=0.4)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    mask = zoo.is_visual(inputs["input_ids"])
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="has run already"):
        model(inputs_embeds=embeds, visual_mask=mask)


def test_a_plain_tuple_of_a_shortened_encoder_is_refused():
    case = zoo.CASES[zoo.TWO_NAMES[0]]
    model, given = case.model(), zoo.encoder_inputs(case.inputs())["image"]
    handle = vlmprune.patch(model, PLAIN, keep_ratio=0.4)
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="plain tuple"):
        model.model.get_image_features(**given, return_dict=False)
    handle.set(keep_ratio=1.0)  # nothing leaves
    assert isinstance(model.model.get_image_features(**given, return_dict=False), tuple)


def test_checkpointing_of_the_encoder_is_refused_while_training():
    case = zoo.CASES[zoo.TWO_NAMES[0]]
    model = case.model()
    vlmprune.patch(model, PLAIN, keep_ratio=0.4)
    model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="a second time"):
        model(**case.inputs())


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("name", REMOVING)
def test_gradients_reach_the_first_weights_through_rows_that_merged(case, name):
    model = case.model()
    handle = patched(model, case, name, keep_ratio=0.4)
    if handle is None:
        skips.skip("no signal", name)
    tower = getattr(model.model, "vision_tower", None)
    blocks = model.model.visual.blocks if tower is None else tower.encoder.layers
    weight = (
        blocks[0].mlp.fc1.weight if hasattr(blocks[0].mlp, "fc1") else next(blocks[0].parameters())
    )
    weight.requires_grad_(True)
    model(**case.inputs(zoo.BATCH)).logits.square().mean().backward()
    assert weight.grad.abs().max() > 0 and weight.grad.isfinite().all()


@zoo.BOTH_FAMILIES
def test_an_exception_inside_a_block_leaves_the_next_call_right(case):
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    handle = vlmprune.patch(model, PLAIN, keep_ratio=0.4)
    with torch.no_grad():
        right = model(**inputs).logits
    blocks = handle._engine.family.encoder.blocks

    def fails(*args, **kwargs):
        raise RuntimeError("in a block")

    for part in (blocks[1].norm2, blocks[1].tail, blocks[1].attention):
        hook = part.register_forward_hook(fails)
        with pytest.raises(RuntimeError, match="in a block"):
            model(**inputs)
        hook.remove()
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, right)


def test_frames_whose_pooled_numbers_happen_to_be_whole_are_resampled_too():
    """Of a frame of 5 x 5 patches, the means of 2 x 2 numbers are whole."""
    case = zoo.CASES["llava_next_video"]
    config = case.config()
    config.vision_config.image_size = 20
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    vlmprune.patch(model, PLAIN, keep_ratio=0.5)
    frames = torch.randn(1, 2, 3, 20, 20)
    ids = torch.tensor([[5, *[zoo.VIDEO] * 8, 6]])
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="resamples"):
        model(input_ids=ids, pixel_values_videos=frames)
