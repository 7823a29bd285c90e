"""What cannot work is refused by `patch`, with a typed error that says what to type instead."""

from __future__ import annotations

import logging

import pytest
import torch
import vlmprune
from kit import zoo
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from vlmprune.prune.contract import (
    Attending,
    Compressing,
    LayerSignal,
    Neurons,
    Place,
)
from vlmprune.prune.registry import method_class

CLIP, QWEN = zoo.CASES["llava-clip-llama"], zoo.CASES["qwen2_5_vl"]
REPRESENTATIVE = {
    Place.ENCODER: "tome",
    Place.BEFORE_LLM: "divprune",
    Place.DECODER: "fastv",
    Place.CACHE: "elastic_cache",
}
STAGED = [name for name in vlmprune.methods() if Place.DECODER in method_class(name)().places]
"""Methods that act in the decoder."""


def _clip_of(name: str):
    """The text encoder, for methods that need it."""
    return (zoo.options_for(CLIP, name) or {}).get("clip")


def refusal(error: type[Exception], *words: str, model=None, args=(), **options) -> str:
    """The message with which `patch` refuses; it holds all the words and leaves no trace."""
    model = CLIP.model() if model is None else model
    before = zoo.hooks(model)
    with pytest.raises(error) as refused:
        vlmprune.patch(model, *args, **options)
    assert isinstance(refused.value, vlmprune.VlmpruneError)
    message = str(refused.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert zoo.hooks(model) == before, "a refused patch left something"
    return message


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**{**zoo.DECODER, "num_hidden_layers": 1})),
        nn.Linear(2, 2),
        "llava-hf/llava-1.5-7b-hf",
        None,
    ],
    ids=["text-model", "linear", "a-name", "none"],
)
def test_unsupported_models(model):
    with pytest.raises(vlmprune.UnsupportedModelError) as refused:
        vlmprune.patch(model, "divprune", keep_ratio=0.5)
    for name in vlmprune.models():
        assert name in str(refused.value)
    assert isinstance(refused.value, TypeError)


@pytest.mark.parametrize("thing", [None, "llava-hf/llava-1.5-7b-hf"], ids=["none", "a-name"])
def test_unpatch_takes_a_model(thing):
    with pytest.raises(vlmprune.UnsupportedModelError, match=r"handle\.remove\(\)"):
        vlmprune.unpatch(thing)


@pytest.mark.parametrize("part", ["model", "model.language_model", "model.vision_tower"])
def test_a_part_of_a_supported_model(part):
    refusal(
        vlmprune.UnsupportedModelError,
        model=CLIP.model().get_submodule(part),
        args=("divprune",),
        keep_ratio=0.5,
    )


def test_the_registries_list_what_is_supported():
    assert {"llava", "qwen2_5_vl"} <= set(vlmprune.models())
    assert {"random", "grid", "divprune", "vtc_cls", "hiprune", "fastv"} <= set(vlmprune.methods())


def test_unpatch_of_a_model_that_is_not_patched_does_nothing_or_says_so():
    model = CLIP.model()
    before = set(vars(model))
    try:
        vlmprune.unpatch(model)
    except vlmprune.VlmpruneError as error:
        assert "patch" in str(error)
    assert set(vars(model)) == before


@pytest.mark.parametrize("name", ["divprune", "fastv", "elastic_cache"])
class TestBudgets:
    def test_none(self, name):
        refusal(
            vlmprune.BudgetError,
            *(name, "keep_ratio=", "keep_tokens=", "average_tokens=", "flops_ratio="),
            args=(name,),
        )

    def test_two(self, name):
        refusal(
            vlmprune.BudgetError,
            *("keep_ratio", "keep_tokens", "exactly one"),
            args=(name,),
            keep_ratio=0.5,
            keep_tokens=3,
        )

    @pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan"), float("inf"), "0.5", True])
    def test_ratio_out_of_range(self, name, value):
        refusal(
            vlmprune.BudgetError,
            *(f"keep_ratio={value!r}", "0 < keep_ratio <= 1"),
            args=(name,),
            keep_ratio=value,
        )

    @pytest.mark.parametrize("value", [0, -3, 2.5])
    def test_tokens_out_of_range(self, name, value):
        refusal(
            vlmprune.BudgetError,
            *(f"keep_tokens={value!r}", "at least 1"),
            args=(name,),
            keep_tokens=value,
        )

    @pytest.mark.parametrize("value", [0, -3])
    def test_average_out_of_range(self, name, value):
        refusal(vlmprune.BudgetError, "average_tokens", args=(name,), average_tokens=value)

    @pytest.mark.parametrize("value", [0, 1.01])
    def test_flops_out_of_range(self, name, value):
        refusal(vlmprune.BudgetError, "0 < flops_ratio <= 1", args=(name,), flops_ratio=value)


@pytest.mark.parametrize("words", [{"average_tokens": 3}, {"flops_ratio": 0.2}])
def test_a_budget_that_cannot_be_reached_names_the_nearest_that_can(words):
    """Two of four layers see all 36 tokens: the average is above 18. When: at patch or first run,
    since only an image says how many tokens there are; before any layer has run."""
    model = CLIP.model()
    ran = []
    model.model.language_model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(vlmprune.BudgetError, match="nearest") as refused:
        vlmprune.patch(model, "fastv", layer=2, **words)
        model(**CLIP.inputs())
    assert not ran
    (word,) = words
    nearest = str(refused.value).split(f"{word}=")[-1].split(";")[0].rstrip(".")
    model = CLIP.model()
    handle = vlmprune.patch(model, "fastv", layer=2, **{word: float(nearest)})
    model(**CLIP.inputs())
    assert len(handle.last.kept[0]) == 1


@pytest.mark.parametrize(
    ("name", "nearest"), [("divprun", "divprune"), ("FastV", "fastv"), ("", "random")]
)
def test_unknown_methods(name, nearest):
    for call in (
        lambda: vlmprune.patch(CLIP.model(), name, keep_ratio=0.5),
        lambda: vlmprune.method(name, keep_ratio=0.5),
    ):
        with pytest.raises(vlmprune.UnknownMethodError) as refused:
            call()
        assert nearest in str(refused.value)
        assert isinstance(refused.value, KeyError)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [("layr", 2, "layer"), ("keep_ration", 0.5, "keep_ratio"), ("official", True, "fastv")],
)
def test_unknown_fields(field, value, word):
    message = refusal(
        vlmprune.MethodFieldError,
        *(field, word),
        args=("fastv",),
        **{"keep_tokens": 4, field: value},
    )
    assert "Available" in message


@pytest.mark.parametrize("layer", [0, 4, 99, -5, 1.5, "2", True])
def test_layers_that_do_not_exist(layer):
    refusal(vlmprune.MethodFieldError, "layer", args=("fastv",), keep_ratio=0.5, layer=layer)


@pytest.mark.parametrize("positions", ["packed", "Original", 3, True])
def test_unknown_positions(positions):
    refusal(
        vlmprune.VlmpruneError,
        *("original", "repacked", repr(positions)),
        args=("divprune",),
        keep_ratio=0.5,
        positions=positions,
    )


@pytest.mark.parametrize("name", [*REPRESENTATIVE.values(), "pyramiddrop"])
def test_repacked_positions_on_two_dimensional_rotary(name):
    """Wherever the method acts, and also where it is the method's own default."""
    refusal(
        vlmprune.MethodFieldError,
        *("repacked", "original"),
        model=QWEN.model(),
        args=(name,),
        keep_ratio=0.5,
        positions="repacked",
    )
    handle = vlmprune.patch(QWEN.model(), name, keep_ratio=0.5)
    assert handle.positions == "original"


@pytest.mark.parametrize("name", STAGED)
def test_positions_behind_a_cut_in_the_decoder_may_be_packed_or_not(name):
    found = []
    for positions in ("original", "repacked"):
        model, options = CLIP.model(), zoo.options_for(CLIP, name)
        options |= zoo.budget(name, keep_ratio=0.3)
        handle = vlmprune.patch(model, name, positions=positions, **options)
        with torch.no_grad():
            found.append(model(**CLIP.inputs()).logits[0, -1])
        assert handle.positions == handle.last.positions == positions
        assert {stage.positions for stage in handle.last.stages} == {positions}
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", vlmprune.methods())
def test_two_methods_at_one_place(name):
    """Every method, at every place where it acts, beside another one there."""
    call = vlmprune.method(name, **zoo.budget(name, keep_ratio=0.5))
    for place in call.method.places:
        other = vlmprune.method(REPRESENTATIVE[place], keep_ratio=0.25)
        for two in ([call, other], [other, call]):
            words = (*(c.name for c in two), f"act {place.value}", "different places")
            refusal(vlmprune.MethodFieldError, *words, args=(two,), clip=_clip_of(name))


def test_the_late_stage_of_a_method_before_the_llm_takes_the_decoder():
    """Without it, the decoder is free."""
    fastv = vlmprune.method("fastv", keep_ratio=0.25)
    late = [n for n in STAGED if method_class(n).place is Place.BEFORE_LLM]
    assert {"todre", "catp"} <= set(late)
    for name in late:
        two = [vlmprune.method(name, keep_ratio=0.5), fastv]
        refusal(vlmprune.MethodFieldError, name, "fastv", "in the LLM decoder", args=(two,))
        two = [vlmprune.method(name, keep_ratio=0.5, late=False), fastv]
        check_composition(CLIP, two, layers=[0, 2])


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("cache", zoo.ON_CACHE)
@pytest.mark.parametrize("inside", ["fastv", "transprune", "sparsevlm", None])
def test_methods_at_all_places_at_once(case, cache, inside):
    """In any order; each budget counts the image's own tokens."""
    first = vlmprune.method("divprune", keep_ratio=0.5)
    second = [vlmprune.method(inside, keep_ratio=0.25)] if inside else []
    third = vlmprune.method(cache, keep_ratio=0.1, **zoo.SMALL.get(cache, {}))
    layers = [0, *(cut.layer for call in second for cut in call.method.cuts(case.shape))]
    handle = check_composition(case, [third, *second, first], layers=None)
    assert [call.name for call in handle.methods] == [c.name for c in (first, *second, third)]
    assert {stage.layer for stage in handle.last.stages} <= set(layers)
    assert bool(handle.last.entries) == issubclass(method_class(cache), Compressing)
    expected = list(handle.last.text_tokens)
    for sample, count in zip(handle.last.image_sample, case.counts(zoo.BATCH), strict=True):
        expected[sample] += round(0.1 * count)
    for of_layer in handle.last.entries:  # the last prompt has no image
        assert [kept.shape[-1] for kept in of_layer[:2]] == expected[:2] and of_layer[2] is None


@pytest.mark.parametrize("name", ["todre", "catp"])
def test_a_late_stage_and_a_method_on_the_cache(name):
    two = [vlmprune.method(name, keep_ratio=0.5), vlmprune.method("elastic_cache", keep_ratio=0.2)]
    handle = check_composition(CLIP, two, layers=None)
    assert {stage.method for stage in handle.last.stages} == {name}
    assert len(handle.last.entries) == CLIP.shape.decoder.num_layers


def check_composition(case, calls, *, layers) -> vlmprune.Handle:
    """The methods run together; the last cut keeps the least budget of those that cut."""
    model = case.model()
    handle = vlmprune.patch(model, calls)
    inputs = case.inputs(zoo.BATCH)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    ratio = min(c.budget.value for c in calls if c.name not in zoo.ON_CACHE)
    assert handle.last.tokens_kept == [round(ratio * n) for n in case.counts(zoo.BATCH)]
    assert layers is None or [stage.layer for stage in handle.last.stages] == layers
    handle.remove()
    return handle


def test_a_list_takes_no_outer_budget_or_fields():
    calls = [vlmprune.method("divprune", keep_ratio=0.5)]
    refusal(vlmprune.VlmpruneError, "method(", args=(calls,), keep_ratio=0.5)
    refusal(vlmprune.VlmpruneError, "method(", args=(calls[0],), keep_tokens=4)
    refusal(vlmprune.VlmpruneError, args=(calls,), seed=1)


@pytest.mark.parametrize("methods", [[], None, 3, ["divprune"], [None], {"divprune": 0.5}])
def test_things_that_are_no_method(methods):
    refusal(vlmprune.VlmpruneError, "method", args=(methods,), keep_ratio=0.5)


def test_missing_signals_name_what_works_instead():
    siglip = zoo.CASES["llava-siglip-qwen2"]
    message = refusal(
        vlmprune.MissingSignalError,
        *("vtc_cls", "CLS", "divprune"),
        model=siglip.model(),
        args=("vtc_cls",),
        keep_ratio=0.5,
    )
    for name in ("divprune", "fastv"):  # every name it gives as an alternative does work
        assert name in message
        vlmprune.patch(siglip.model(), name, keep_ratio=0.5).remove()


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-siglip-qwen2", "llava_next"])
def test_an_encoder_whose_output_is_no_grid_of_patches(name):
    """CLS among the features, or a first patch cut off in its place."""
    model = zoo.CASES[name].model()
    config = model.config
    right = config.vision_feature_select_strategy
    config.vision_feature_select_strategy = {"full": "default", "default": "full"}[right]
    refusal(
        vlmprune.UnsupportedModelError,
        *("vision_feature_select_strategy", f"{right!r}"),
        model=model,
        args=("divprune",),
        keep_ratio=0.5,
    )


@pytest.mark.parametrize("newlines", ["drop", "keep"])
def test_newlines_that_are_kept_need_room(newlines):
    case = zoo.CASES["llava_next"]
    (count,) = (tiling.num_newlines for tiling in case.tilings(zoo.SINGLE))
    model = case.model()
    handle = vlmprune.patch(model, "cls_topk", keep_tokens=count, newlines=newlines)
    if newlines == "drop":
        model(**case.inputs())
        assert handle.last.tokens_kept == [count]
        return
    with pytest.raises(vlmprune.BudgetError, match=f"keep_tokens={count + 1}") as refused:
        model(**case.inputs())
    assert "newlines='drop'" in str(refused.value)
    handle = vlmprune.patch(model, "cls_topk", keep_tokens=count + 1, newlines=newlines)
    model(**case.inputs())
    assert handle.last.tokens_kept == [count + 1]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_newlines_that_compete_belong_to_no_tile(name):
    refusal(
        vlmprune.MethodFieldError,
        *("newlines='compete'", "scope='image'"),
        model=zoo.CASES[name].model(),
        args=("divprune",),
        keep_ratio=0.5,
        scope="tile",
        newlines="compete",
    )


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava_next", "llava_onevision"])
def test_encoder_outputs_of_another_model(name):
    case = zoo.CASES[name]
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    vlmprune.patch(model, "divprune", keep_ratio=0.5)
    pixels = zoo.encoder_inputs(inputs)["image"]
    features = case.reference().model.get_image_features(**pixels, return_dict=True)
    for key in pixels:
        del inputs[key]
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="mm_encoder_outputs"):
        model(**inputs, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("signal", ["attention", "pixels"])
def test_signals_that_merged_embeddings_do_not_have(signal):
    model, inputs = CLIP.model(), CLIP.inputs()
    mask = zoo.is_visual(inputs["input_ids"])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    vlmprune.patch(model, "cls_topk" if signal == "attention" else "random", keep_ratio=0.5)
    with pytest.raises(vlmprune.MissingSignalError, match="visual_mask"):
        model(inputs_embeds=embeds, visual_mask=mask)


@pytest.mark.parametrize("where", ["forward", "generate"])
def test_a_visual_mask_without_embeddings(where):
    model, inputs = CLIP.model(), CLIP.inputs()
    mask = zoo.is_visual(inputs["input_ids"])
    vlmprune.patch(model, "divprune", keep_ratio=0.5)
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="visual_mask"):
        (model if where == "forward" else model.generate)(**inputs, visual_mask=mask)


@pytest.mark.parametrize("name", [n for n in vlmprune.methods() if method_class(n).retired])
def test_a_retired_field_is_unknown(name):
    """Results of before still hold it; nobody can set it."""
    for field, value in method_class(name).retired.items():
        words = (name, f"no field {field!r}")
        refusal(vlmprune.MethodFieldError, *words, args=(name,), keep_ratio=0.5, **{field: value})


# --- Methods that read decoder layers or the cache ---------------------------------------------


INSIDE = [
    name
    for name in vlmprune.methods()
    if any(isinstance(need, LayerSignal) for need in method_class(name)().needs(zoo.CLIP))
]


def foreign(path: str):
    """A model whose decoder layers name the module at `path` differently."""
    model = CLIP.model()
    owner, _, name = path.rpartition(".")
    for layer in model.model.language_model.layers:
        parent = layer.get_submodule(owner)
        module = getattr(parent, name)
        delattr(parent, name)
        setattr(parent, f"their_{name}", module)
    return model


def _reads(name: str, path: str) -> bool:
    """Whether a method reads what a module of the decoder's layers holds or gives."""
    needs = method_class(name)().needs(zoo.CLIP)
    ahead = any(getattr(need, "ahead", False) for need in needs)
    neurons = any(isinstance(need, Neurons) for need in needs)
    return {
        "self_attn.k_proj": ahead or name in zoo.ON_CACHE,
        "input_layernorm": ahead,
        "mlp.down_proj": neurons,
        "mlp": neurons or any(getattr(need, "module", None) == "mlp" for need in needs),
    }[path]


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("path", ["self_attn.k_proj", "mlp.down_proj", "input_layernorm", "mlp"])
def test_decoders_with_other_names_of_modules(name, path):
    model, given = foreign(path), {"keep_ratio": 0.5, "clip": _clip_of(name)}
    if not _reads(name, path):
        vlmprune.patch(model, name, **given)
        return
    words = (name, path, "LlamaModel", "before the LLM")
    refusal(vlmprune.UnsupportedModelError, *words, model=model, args=(name,), **given)


def test_decoders_with_other_names_take_methods_that_do_not_read_them():
    assert {"fastv", "todre", "catp", "elastic_cache"} <= set(INSIDE)
    assert not {"divprune", "vtc_cls"} & set(INSIDE)
    for name, fields in (("divprune", {}), ("todre", {"late": False}), ("catp", {"late": False})):
        vlmprune.patch(foreign("mlp.down_proj"), name, keep_ratio=0.5, **fields)


@zoo.CACHE_METHODS
class TestOnTheCache:
    @pytest.mark.parametrize("words", [{"average_tokens": 9}, {"flops_ratio": 0.5}])
    def test_budgets_of_the_prefill(self, name, words):
        """It sees all tokens."""
        refusal(
            vlmprune.BudgetError,
            *(name, *words, "keep_ratio", "keep_tokens"),
            args=(name,),
            **words,
        )

    def test_windows(self, name):
        refusal(
            vlmprune.UnsupportedModelError,
            *(name, "sliding_attention", "before the LLM"),
            model=zoo.SLIDING.model(),
            args=(name,),
            keep_ratio=0.5,
        )

    def test_no_cache(self, name):
        model = CLIP.model()
        vlmprune.patch(model, name, keep_ratio=0.5, **zoo.SMALL.get(name, {}))
        with pytest.raises(vlmprune.UnsupportedFeatureError, match="use_cache=False"):
            model(**CLIP.inputs(), use_cache=False)

    def test_a_static_cache(self, name):
        model = CLIP.model()
        vlmprune.patch(model, name, keep_ratio=0.5, **zoo.SMALL.get(name, {}))
        with pytest.raises(vlmprune.UnsupportedFeatureError, match="cache_implementation"):
            model.generate(**CLIP.inputs(), cache_implementation="static", max_new_tokens=2)


def test_flex_attention_and_methods_that_attend():
    model = CLIP.model()
    model.set_attn_implementation("flex_attention")
    for name in zoo.ON_CACHE:
        if issubclass(method_class(name), Attending):
            words = ("flex", 'set_attn_implementation("sdpa")')
            refusal(vlmprune.UnsupportedModelError, *words, model=model, args=(name,))


def test_a_budget_below_what_is_always_attended():
    model = CLIP.model()
    vlmprune.patch(model, "token_select", keep_tokens=5)
    with pytest.raises(vlmprune.BudgetError, match=r"640 in any case.*n_init, n_local"):
        model(**CLIP.inputs())
    vlmprune.patch(model, "token_select", keep_tokens=5, **zoo.SMALL["token_select"])
    model(**CLIP.inputs())


@zoo.CACHE_METHODS
def test_methods_on_the_cache_while_checkpointing_keeps_none(name):
    model = CLIP.model().requires_grad_(True).train()
    model.activation_checkpointing_enable()
    vlmprune.patch(model, name, keep_ratio=0.4, **zoo.SMALL.get(name, {}))
    with pytest.raises(vlmprune.UnsupportedFeatureError, match=rf"{name}.*checkpointing_disable"):
        model(**CLIP.inputs())
    model.eval()
    model(**CLIP.inputs())


@pytest.mark.parametrize("how", ["torch.compile", "Module.compile", "text model"])
def test_a_model_that_is_compiled_already(how):
    model = CLIP.model()
    if how == "torch.compile":
        model = torch.compile(model, backend="eager")
    elif how == "Module.compile":
        model.compile(backend="eager")
    else:
        model.model.language_model.compile(backend="eager")
    with pytest.raises(vlmprune.UnsupportedModelError, match="compile") as refused:
        vlmprune.patch(model, "divprune", keep_ratio=0.5)
    assert "patch" in str(refused.value) and "first" in str(refused.value)


def test_a_compiled_layer_is_refused_or_pruned():
    model, plain, inputs = CLIP.model(), CLIP.model(), CLIP.inputs()
    layer = model.model.language_model.layers[1]
    layer.compile(backend="eager")
    log = logging.getLogger("torch.__trace")
    propagated, log.propagate = log.propagate, False  # pytest would format every line of it
    try:
        with torch.no_grad():
            model(**inputs)
            vlmprune.patch(plain, "fastv", keep_ratio=0.4, layer=1)
            vlmprune.patch(model, "fastv", keep_ratio=0.4, layer=1)
            assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    except vlmprune.UnsupportedModelError as refused:
        assert "compile" in str(refused)
    finally:
        log.propagate = propagated
        torch._dynamo.reset()


def test_a_failed_patch_leaves_the_earlier_one_in_place():
    model = CLIP.model()
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.5)
    with pytest.raises(vlmprune.VlmpruneError):
        vlmprune.patch(model, "divprune", keep_ratio=7)
    model(**CLIP.inputs())
    assert len(handle.last.kept[0]) == 18


# --- Said, not refused --------------------------------------------------------------------------


def test_budgets_that_an_image_cannot_have_are_said_in_the_report():
    model = CLIP.model()
    for words, said in (
        ({"keep_tokens": 1000}, "above an image's 36 tokens"),
        ({"average_tokens": 37}, "above an image's 36 tokens"),
        ({"average_tokens": 0.5}, "below 1"),
        ({"average_tokens": 12}, None),
    ):
        handle = vlmprune.patch(model, "divprune", **words)
        model.generate(**CLIP.inputs(zoo.BATCH), max_new_tokens=2, do_sample=False)
        note = handle.last.note
        assert note is None if said is None else said in note
        assert note is None or note.count("image's") + note.count("an image (") == 1


def test_two_methods_of_one_budget_are_warned_of(recwarn):
    model = CLIP.model()
    one = vlmprune.method("divprune", keep_ratio=0.25)
    with pytest.warns(UserWarning, match=r"fastv\(keep_ratio=0\.25\) has nothing to do behind"):
        vlmprune.patch(model, [vlmprune.method("fastv", keep_ratio=0.25), one])
    recwarn.clear()
    vlmprune.patch(model, [vlmprune.method("fastv", keep_ratio=0.2), one])
    assert not [w for w in recwarn if w.category is UserWarning]


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2}], ids=str)
def test_videos_that_transformers_does_not_copy(options):
    """GLM's prompts have no tokens of videos, which copies are counted by."""
    case = zoo.CASES["glm4v"]
    model = case.model()
    vlmprune.patch(model, "divprune", keep_ratio=0.5)
    inputs = case.inputs(((3, "V", 2),))
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="makes no copies of videos"):
        model.generate(**inputs, do_sample=True, max_new_tokens=2, **options)


def test_images_and_videos_with_the_same_placeholders():
    case = zoo.CASES["glm4v"]
    model = case.model()
    vlmprune.patch(model, "divprune", keep_ratio=0.5)
    inputs = case.inputs(((3, "D", 2, "W", 4),))
    for run in (model, lambda **given: model.generate(**given, max_new_tokens=2)):
        with pytest.raises(vlmprune.UnsupportedFeatureError, match="calls of their own"):
            run(**inputs)
