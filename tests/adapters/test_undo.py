"""`remove`, `unpatch`, leaving `with` and every failure: the model is the same as before."""

from __future__ import annotations

import copy
import functools
import gc
import io
import itertools
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import vlmprune
from kit import zoo
from kit.oracle import decoder_of
from kit.snapshots import differences, snapshot
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vlmprune.adapters.cache_names import CACHE
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import BeforeLLM, Features

METHODS = {
    "encoder": [vlmprune.method("tome", keep_ratio=0.4)],
    "before": [vlmprune.method("divprune", keep_ratio=0.4)],
    "tower": [vlmprune.method("hiprune", keep_ratio=0.4)],
    "decoder": [vlmprune.method("fastv", keep_ratio=0.4)],
    "merging": [vlmprune.method("pool", keep_ratio=0.4)],
    "both": [
        vlmprune.method("divprune", keep_ratio=0.5),
        vlmprune.method("fastv", keep_ratio=0.25, layer=2),
    ],
    "late": [vlmprune.method("todre", keep_ratio=0.4, pivot="received")],
    "steps": [vlmprune.method("transprune", keep_ratio=0.4)],
    "cache": [vlmprune.method("elastic_cache", keep_ratio=0.4)],
    "attending": [vlmprune.method("token_select", keep_ratio=0.4, **zoo.SMALL["token_select"])],
    "everywhere": [
        vlmprune.method("divprune", keep_ratio=0.5),
        vlmprune.method("corematching", keep_ratio=0.3),
        vlmprune.method("visual_press", keep_ratio=0.2, press="received"),
    ],
}


@pytest.fixture(autouse=True)
def no_garbage():
    """Models that other tests dropped while patched take their global names along now."""
    if any("vlmprune" in name for name in ALL_ATTENTION_FUNCTIONS.keys()):  # noqa: SIM118
        gc.collect()


def test_a_model_dropped_while_patched_leaves_no_global_name():
    before = sorted(ALL_ATTENTION_FUNCTIONS.keys())
    model = zoo.CASES["llava-clip-llama"].model()
    vlmprune.patch(model, "vtc_cls", keep_ratio=0.5)
    assert sorted(ALL_ATTENTION_FUNCTIONS.keys()) != before
    del model
    gc.collect()
    assert sorted(ALL_ATTENTION_FUNCTIONS.keys()) == before


def warm(case, attention="sdpa"):
    """A model that has run once (transformers installs its own hooks then), and its outputs."""
    model = case.model(attention)
    with torch.no_grad():
        model(**case.inputs())
    return model, dense(case, attention)


@functools.cache
def dense(case, attention):
    return outputs(case.reference(attention), case)


def outputs(model, case, rows=zoo.BATCH):
    inputs = case.inputs(rows)
    with torch.no_grad():
        logits = model(**inputs).logits
    return logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@functools.cache
def used(case):
    """A warm model that several methods are put on and taken off one after the other, and what it
    was before all of them: what one leaves behind is seen at once, and by all after it."""
    model, (expected, _) = warm(case)
    return model, expected, snapshot(model)


@zoo.asking(zoo.REMOVING + zoo.UNBUDGETED)
def test_nothing_is_left_of_any_method(case, name):
    (model, expected, before), inputs = used(case), case.inputs(zoo.BATCH)
    budget = zoo.budget(name, keep_ratio=0.4)
    if (handle := zoo.patch_or_refusal(model, case, name, **budget)) is None:
        return
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, expected), "the patch did nothing"
        handle.remove()
        handle.remove()
        assert differences(before, snapshot(model)) == []
        assert torch.equal(model(**inputs).logits, expected)


def second_token(model, case):
    """Logits of two greedy steps."""
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    out = model.generate(**case.inputs(zoo.BATCH), max_new_tokens=2, **options)
    return torch.stack(out.logits)


@functools.cache
def decoded(case):
    """Those without a patch."""
    return second_token(case.reference(), case)


@zoo.asking(zoo.ON_CACHE)
def test_nothing_is_left_of_any_method_on_the_cache(case, name):
    """Logits of the prefill do not show it, those of the second token do."""
    model, _, before = used(case)
    expected = decoded(case)
    handle = vlmprune.patch(model, name, keep_ratio=0.4, **zoo.SMALL.get(name, {}))
    while_patched = snapshot(model)
    assert differences(before, while_patched) != []
    found = second_token(model, case)
    assert torch.equal(found[0], expected[0])
    for row, changed in enumerate((True, True, False)):  # the last prompt has no image
        assert torch.allclose(found[1, row], expected[1, row], atol=1e-3) is not changed
    assert differences(while_patched, snapshot(model)) == [], "running left something"
    handle.remove()
    handle.remove()
    assert differences(before, snapshot(model)) == []
    assert torch.equal(second_token(model, case), expected)


def listens(model, parts: tuple[str, ...]) -> dict[str, set[int]]:
    """Layers of the decoder in which each part has a hook or a `forward` of its own."""
    found: dict[str, set[int]] = {part: set() for part in parts}
    for index, layer in enumerate(decoder_of(model).layers):
        for part in parts:
            module = layer.get_submodule(part)
            hooked = module._forward_hooks or module._forward_pre_hooks
            if hooked or "forward" in vars(module):
                found[part].add(index)
    return found


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("fastv", {}),
        ("pyramiddrop", {"self_attn.k_proj": {1, 2, 3}}),
        ("transprune", {"self_attn": {0, 1, 2}, "mlp": {0, 1, 2}, "self_attn.k_proj": {1, 2, 3}}),
        ("corematching", {"mlp.down_proj": {1}}),
        ("elastic_cache", {"self_attn": {0, 1, 2, 3}}),
        ("visual_press", {"self_attn": {0, 1, 2, 3}}),
        ("token_select", {"self_attn": {0, 1, 2, 3}}),
    ],
)
def test_modules_inside_layers_are_hooked_where_they_are_read_and_freed_again(case, name, where):
    """Only in prefills, but for methods that act on decoding steps."""
    parts = ("self_attn", "self_attn.k_proj", "mlp", "mlp.down_proj")
    model, seen = case.model(), []
    nothing = listens(model, parts)
    assert not any(nothing.values())
    decoder_of(model).norm.register_forward_pre_hook(lambda *_: seen.append(listens(model, parts)))
    handle = vlmprune.patch(model, name, keep_ratio=0.4, **zoo.SMALL.get(name, {}))
    in_prefill = {part: where.get(part, set()) for part in parts}
    while_decoding = in_prefill if name == "token_select" else nothing
    assert listens(model, parts) == while_decoding
    with torch.no_grad():
        model.generate(**case.inputs(), max_new_tokens=3, min_new_tokens=3)
    assert seen == [in_prefill, while_decoding, while_decoding]
    assert listens(model, parts) == while_decoding
    handle.remove()
    assert listens(model, parts) == nothing


@zoo.BOTH_FAMILIES
def test_an_interrupted_prefill_leaves_hooks_until_the_next_call_only(case):
    """torch runs no hook behind a KeyboardInterrupt."""
    model = case.model()
    vlmprune.patch(model, "visual_press", keep_ratio=0.4)
    expected = outputs(model, case)

    def interrupt(*_):
        raise KeyboardInterrupt

    interrupting = decoder_of(model).layers[1].register_forward_pre_hook(interrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(**case.inputs())
    interrupting.remove()
    assert listens(model, ("self_attn",))["self_attn"] == {0, 1, 2, 3}
    assert same(outputs(model, case), expected)
    assert listens(model, ("self_attn",))["self_attn"] == set()


@zoo.BOTH_FAMILIES
def test_a_forward_that_somebody_put_on_a_projection_stays(case):
    """As accelerate does it to move weights: it is called while patched, and there afterwards."""
    model, expected = warm(case)
    layers = decoder_of(model).layers
    calls: list[int] = []

    def counting(index, original, *args):
        calls.append(index)
        return original(*args)

    for index, layer in enumerate(layers):
        own = functools.partial(counting, index, layer.self_attn.k_proj.forward)
        layer.self_attn.k_proj.forward = own
    before = snapshot(model)
    with vlmprune.patch(model, "pyramiddrop", keep_ratio=0.4):
        assert differences(before, snapshot(model)) != []
        with torch.no_grad():
            model(**case.inputs())
        assert set(calls) == {0, 1, 2, 3}
    assert differences(before, snapshot(model)) == []
    assert same(outputs(model, case), expected)


WAYS = [
    ("eager", "remove"),
    ("sdpa", "unpatch"),
    ("sdpa", "with"),
    ("sdpa", "exception-in-with"),
    ("sdpa", "replaced"),
]


def ways() -> Iterator[tuple[zoo.Case, str, str, str]]:
    """Each way to take off what has hooks of all kinds, on one family, and one way by turns to take
    off each other kind of method; three kinds of method on others, whose modules are called
    otherwise."""
    first, *others = zoo.FAMILY_NAMES
    by_turns = itertools.cycle(WAYS)
    for which in METHODS:
        for attention, how in WAYS if which == "everywhere" else [next(by_turns)]:
            yield zoo.CASES[first], attention, which, how
    for name in others:
        for which in ("merging", "late", "everywhere"):
            attention, how = next(by_turns)
            yield zoo.CASES[name], attention, which, how


@pytest.mark.parametrize(
    ("case", "attention", "which", "how"),
    [pytest.param(*one, id=f"{one[2]}-{one[3]}-{one[0].name}") for one in ways()],
)
def test_nothing_is_left(case, attention, which, how):
    calls = METHODS[which]
    model, expected = warm(case, attention)
    before = snapshot(model)
    if how == "remove":
        handle = vlmprune.patch(model, calls)
        outputs(model, case)
        handle.remove()
    elif how == "unpatch":
        vlmprune.patch(model, calls)
        outputs(model, case)
        vlmprune.unpatch(model)
    elif how == "with":
        with vlmprune.patch(model, calls) as handle:
            outputs(model, case)
        assert len(handle.last.kept) == 3
    elif how == "exception-in-with":
        with pytest.raises(ZeroDivisionError), vlmprune.patch(model, calls):
            outputs(model, case)
            raise ZeroDivisionError
    else:
        vlmprune.patch(model, "random", keep_ratio=0.3)
        outputs(model, case)
        vlmprune.patch(model, calls)
        outputs(model, case)
        vlmprune.unpatch(model)
    assert differences(before, snapshot(model)) == []
    assert same(outputs(model, case), expected)


@zoo.BOTH_FAMILIES
def test_class_and_state_dict_do_not_change_while_patched(case, tmp_path):
    model, _ = warm(case)
    before = type(model), [type(m) for m in model.modules()], list(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    vlmprune.patch(model, METHODS["both"])
    outputs(model, case)
    assert (type(model), [type(m) for m in model.modules()], list(model.state_dict())) == before
    assert [name for name, _ in model.named_modules()] == names
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


@zoo.BOTH_FAMILIES
def test_patching_twice_replaces(case):
    model = case.model()
    first = vlmprune.patch(model, "divprune", keep_ratio=0.5)
    second = vlmprune.patch(model, "fastv", keep_ratio=0.25)
    found = outputs(model, case)
    assert second.last.stages and {s.method for s in second.last.stages} == {"fastv"}
    alone = case.model()
    vlmprune.patch(alone, "fastv", keep_ratio=0.25)
    assert same(found, outputs(alone, case))
    first.remove()  # replaced already: must not take the second one away
    assert same(found, outputs(model, case))
    second.remove()
    assert same(outputs(model, case), outputs(case.reference(), case))


@zoo.turns(
    "which",
    ["merging", "decoder", "both", "steps", "cache", "attending", "everywhere"],
    [zoo.CASES[name] for name in zoo.FAMILY_NAMES],
)
def test_an_exception_in_a_layer_leaves_the_next_call_right(case, which):
    """In the first layer and, on Qwen, in one behind the cuts."""
    model, layer = case.model(), 3 if case.packed else 0
    vlmprune.patch(model, METHODS[which])
    expected = outputs(model, case)

    def fail(*_):
        raise ZeroDivisionError

    hook = decoder_of(model).layers[layer].mlp.register_forward_hook(fail)
    for rows in (zoo.SINGLE, zoo.BATCH):
        with pytest.raises(ZeroDivisionError):
            model(**case.inputs(rows))
    hook.remove()
    # Nothing of the failed call reaches a direct call of the text model, nor a text-only one.
    embeds = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    found = decoder_of(model)(inputs_embeds=embeds).last_hidden_state
    assert torch.equal(found, decoder_of(case.reference())(inputs_embeds=embeds).last_hidden_state)
    text = (zoo.NONE,)
    assert same(outputs(model, case, text), outputs(case.reference(), case, text))
    assert same(outputs(model, case), expected)


@dataclass(frozen=True, kw_only=True)
class Failing(BeforeLLM):
    """A method with a bug."""

    name: ClassVar[str] = "failing"

    def needs(self, shape):
        return (Features(),)

    def select(self, tokens, keep):
        raise ZeroDivisionError


@zoo.BOTH_FAMILIES
def test_an_exception_in_a_method_leaves_nothing(case):
    model, expected = warm(case)
    before = snapshot(model)
    call = MethodCall(method=Failing(), budget=Budget("keep_ratio", 0.5))
    with pytest.raises(ZeroDivisionError), vlmprune.patch(model, call):
        model(**case.inputs())
    assert differences(before, snapshot(model)) == []
    assert same(outputs(model, case), expected)


@pytest.mark.parametrize(
    ("name", "which"),
    [*(("llava-clip-llama", which) for which in METHODS), ("llava_next", "everywhere")],
)
def test_threads_give_the_same_as_one_after_the_other(which, name):
    """LLaVA only: Qwen's own `rope_deltas` live on the module, unpatched too."""
    case = zoo.CASES[name]
    model = case.model()
    vlmprune.patch(model, METHODS[which])
    prompts = [zoo.SINGLE, zoo.BATCH, (zoo.NONE,), (zoo.TWO,), ((4, "B", 3, "C", 3),), zoo.SINGLE]
    serial = [outputs(model, case, rows) for rows in prompts]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda rows: outputs(model, case, rows), prompts))
        assert all(map(same, threaded, serial))


@zoo.BOTH_FAMILIES
def test_two_models_with_different_methods_do_not_disturb_each_other(case):
    one, two = case.model(), case.model()
    before = sorted(ALL_ATTENTION_FUNCTIONS.keys())
    first = vlmprune.patch(one, METHODS["both"])
    alone = outputs(one, case)
    second = vlmprune.patch(two, "fastv", keep_ratio=0.3, layer=1)
    other = outputs(two, case)
    assert same(outputs(one, case), alone)
    first.remove()
    assert same(outputs(one, case), outputs(case.reference(), case))
    assert same(outputs(two, case), other)
    second.remove()
    assert same(outputs(two, case), outputs(case.reference(), case))
    assert sorted(ALL_ATTENTION_FUNCTIONS.keys()) == before


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("which", ["tower", "decoder", "cache", "attending", "everywhere"])
def test_the_probes_global_name_goes_with_the_last_handle(case, which):
    """Under an attention of its own name, which no patch that another test forgot can hold."""
    name = f"mine_{case.name}_{which}"
    ALL_ATTENTION_FUNCTIONS.register(name, ALL_ATTENTION_FUNCTIONS["sdpa"])
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = set(ALL_ATTENTION_FUNCTIONS.keys())
    models = [case.model(), case.model()]
    for model in models:
        model.set_attn_implementation(name)
    handles = [vlmprune.patch(model, METHODS[which]) for model in models]
    new: set[str] = set()
    models[1].model.language_model.norm.register_forward_pre_hook(
        lambda *_: new.update(set(ALL_ATTENTION_FUNCTIONS.keys()) - before)
    )
    handles[0].remove()
    pruned = outputs(models[1], case)
    assert len(new) == 1 and "vlmprune" in new.pop()
    assert not same(pruned, outputs(models[0], case))
    handles[1].remove()
    assert set(ALL_ATTENTION_FUNCTIONS.keys()) == before


def _deepcopy(model):
    return copy.deepcopy(model)


def _pickle(model):
    return pickle.loads(pickle.dumps(model))


def _torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("which", ["before", "decoder", "everywhere"])
@pytest.mark.parametrize("duplicate", [_deepcopy, _pickle, _torch_save])
def test_a_copy_of_a_patched_model_is_refused_or_stands_alone(case, which, duplicate):
    model = case.model()
    handle = vlmprune.patch(model, METHODS[which])
    pruned = outputs(model, case)
    try:
        twin = duplicate(model)
    except vlmprune.VlmpruneError as error:
        assert "unpatch" in str(error) or "remove" in str(error)
    else:
        assert same(outputs(twin, case), pruned)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
            twin.model.language_model.embed_tokens.weight.zero_()
        assert same(outputs(model, case), pruned)
        assert not same(outputs(twin, case), pruned)
    assert same(outputs(model, case), pruned)
    handle.remove()
    try:
        duplicate(warm(case)[0])
    except AttributeError:  # transformers' own hooks on CLIP cannot be pickled
        return
    assert same(outputs(duplicate(model), case), outputs(case.reference(), case))


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("which", ["before", "decoder", "steps", "cache", "everywhere"])
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_a_pruned_cache_is_refused_after_unpatch(case, which, how):
    model, inputs = case.model(), case.inputs()
    handle = vlmprune.patch(model, METHODS[which])
    cache = model(**inputs)[CACHE]
    handle.remove()
    text = torch.cat([inputs["input_ids"], torch.tensor([[5, 6]])], 1)
    with pytest.raises(vlmprune.VlmpruneError, match="cache"):
        if how == "forward":
            model(input_ids=text[:, -2:], **{CACHE: cache})
        else:
            model.generate(input_ids=text, **{CACHE: cache}, max_new_tokens=1)


@zoo.BOTH_FAMILIES
def test_a_cache_that_was_not_pruned_serves_after_unpatch(case):
    model, inputs = case.model(), case.inputs((zoo.NONE,))
    with vlmprune.patch(model, METHODS["both"]):
        cache = model(**inputs)[CACHE]
    reference = case.model()
    expected = reference(**inputs)[CACHE]
    step = torch.tensor([[5]])
    assert torch.equal(
        model(input_ids=step, **{CACHE: cache}).logits,
        reference(input_ids=step, **{CACHE: expected}).logits,
    )


@zoo.BOTH_FAMILIES
def test_hooks_of_the_user_stay(case):
    model, _ = warm(case)
    calls = []
    early = model.model.register_forward_pre_hook(lambda *_: calls.append("early"))
    handle = vlmprune.patch(model, METHODS["both"])
    late = decoder_of(model).register_forward_hook(lambda *_: calls.append("late"))
    model(**case.inputs())
    handle.remove()
    model(**case.inputs())
    assert calls == ["early", "late"] * 2
    early.remove()
    late.remove()
    assert same(outputs(model, case), outputs(case.reference(), case))


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize(
    "which", ["before", "tower", "decoder", "steps", "cache", "attending", "everywhere"]
)
def test_the_attention_may_be_changed_while_patched(case, which):
    calls = METHODS[which]
    expected = case.model("eager")
    vlmprune.patch(expected, calls)
    model = case.model("sdpa")
    handle = vlmprune.patch(model, calls)
    outputs(model, case)
    model.set_attn_implementation("eager")
    assert same(outputs(model, case), outputs(expected, case))
    handle.remove()
    assert same(outputs(model, case), outputs(case.reference("eager"), case))
    implementations = {
        m.config._attn_implementation for m in model.modules() if hasattr(m, "config")
    }
    assert implementations == {"eager"}


# --- Patches inside patches --------------------------------------------------------------------


@zoo.BOTH_FAMILIES
def test_leaving_with_brings_the_outer_patch_back(case):
    model, expected = warm(case)
    before = snapshot(model)
    with vlmprune.patch(model, METHODS["decoder"]) as outer:
        found, while_patched = outputs(model, case), zoo.hooks(model)
        cache = model(**case.inputs())[CACHE]
        with vlmprune.patch(model, METHODS["cache"]) as inner:
            assert inner.active and not outer.active and "suspended" in repr(outer)
            with pytest.raises(ZeroDivisionError), vlmprune.patch(model, METHODS["attending"]):
                outputs(model, case)
                raise ZeroDivisionError
            assert inner.active
        assert outer.active and not inner.active
        assert zoo.hooks(model) == while_patched
        assert same(outputs(model, case), found)
        if not case.packed:  # whose rope_deltas are those of the last call
            model(input_ids=torch.tensor([[5]]), **{CACHE: cache})
    assert differences(before, snapshot(model)) == []
    assert same(outputs(model, case), expected)


def test_what_is_set_comes_back_and_what_was_removed_does_not():
    case = zoo.CASES["llava-clip-llama"]
    model, expected = warm(case)
    before = snapshot(model)
    outer = vlmprune.patch(model, "divprune", keep_ratio=0.4)
    outer.set("fastv", keep_ratio=0.25)
    found = outputs(model, case)
    for leave in (lambda: None, lambda: vlmprune.unpatch(model)):
        with vlmprune.patch(model, "grid", keep_ratio=0.5):
            outputs(model, case)
            leave()
        assert outer.active and same(outputs(model, case), found)
    with vlmprune.patch(model, "grid", keep_ratio=0.5):
        replaced = vlmprune.patch(model, "pool", keep_ratio=0.5)
    assert replaced.active, "a patch that was made inside and is still on stays"
    replaced.remove()
    with vlmprune.patch(model, "grid", keep_ratio=0.5):
        outer.remove()
    assert not outer.active
    assert differences(before, snapshot(model)) == []
    assert same(outputs(model, case), expected)


def test_removing_brings_nothing_back():
    case = zoo.CASES["llava-clip-llama"]
    model, expected = warm(case)
    outer = vlmprune.patch(model, "divprune", keep_ratio=0.4)
    vlmprune.patch(model, "fastv", keep_ratio=0.4).remove()
    assert not outer.active and same(outputs(model, case), expected)


def test_a_patch_that_is_refused_leaves_the_one_before():
    case = zoo.CASES["llava-clip-llama"]
    model = case.model()
    handle = vlmprune.patch(model, METHODS["decoder"])
    found, before = outputs(model, case), snapshot(model)
    with pytest.raises(vlmprune.BudgetError):
        vlmprune.patch(model, "fastv", average_tokens=1)
    assert handle.active and differences(before, snapshot(model)) == []
    assert same(outputs(model, case), found)
