"""`remember_images`: no image is encoded twice, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import vlmprune
from kit import skips, zoo
from kit.devices import Devices
from kit.reported import TOLERANCE
from kit.snapshots import differences, snapshot
from kit.spread import ONE, changed, spread, to_disk
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from vlmprune.adapters import remember
from vlmprune.adapters.registry import family_of
from vlmprune.prune.registry import method_class

AGAIN = ((5, "A", 1, "B", 2), (2, "C", 6))
"""Other questions about the images of `zoo.BATCH`."""
BUDGET = {"keep_ratio": 0.4}
LLAVA = zoo.CASES["llava-clip-llama"]
READ_THE_PROMPT = [
    name
    for name in vlmprune.methods()
    if any(need.of_prompt for need in method_class(name)().needs(zoo.CLIP))
]
VIDEO = pytest.mark.parametrize(
    "case", [c for c in zoo.WHOLE_CASES if c.layout.takes_videos], ids=lambda case: case.name
)


@contextmanager
def encoder_runs(model) -> Iterator[list[int]]:
    """Values that the vision encoder is given, without padding, run by run."""
    seen: list[int] = []

    def note(module, args, kwargs) -> None:
        given = next(x for x in (*args, *kwargs.values()) if torch.is_tensor(x))
        seen.append(int((given != 0).sum()))

    hook = family_of(model).vision_tower.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def values(case: zoo.Case, rows) -> int:
    """Pixel values of the images of some prompts, without padding."""
    inputs = case.inputs(rows)
    names = ("pixel_values", "pixel_values_videos")
    return sum(int((inputs[name] != 0).sum()) for name in names if name in inputs)


@torch.no_grad()
def ask(model, case: zoo.Case, rows) -> torch.Tensor:
    return model(**case.inputs(rows)).logits


def remembered() -> Iterator[tuple[zoo.Case, str]]:
    """Every method on one family; on others, which differ in how images lie, one method each that
    keeps tokens, merges them, cuts in the decoder and acts on the cache."""
    for family in zoo.FAMILY_NAMES:
        every = family == zoo.FAMILY_NAMES[0]
        for name in vlmprune.methods() if every else ("divprune", "pool", "fastv", "visual_press"):
            yield zoo.CASES[family], name


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{name}-{case.name}") for case, name in remembered()],
)
def test_another_question_about_the_same_images(case, name):
    options = zoo.options_for(case, name)
    if options is None or name in READ_THE_PROMPT:
        return
    options = {**zoo.budget(name, **BUDGET), **options, **zoo.SMALL.get(name, {})}
    model, plain = case.model(), case.model()
    handle = vlmprune.patch(model, name, remember_images=3, **options)
    without = vlmprune.patch(plain, name, **options)
    with encoder_runs(model) as runs:
        for rows in (zoo.BATCH, AGAIN):
            assert torch.equal(ask(model, case, rows), ask(plain, case, rows))
            for one, other in zip(handle.last.kept, without.last.kept, strict=True):
                assert torch.equal(one, other)
            assert handle.last.tokens_per_layer == without.last.tokens_per_layer
    assert len(runs) == 1
    counts = handle.remembered
    assert (counts.images, counts.hits, counts.misses) == (3, 3, 3)
    assert without.remembered.hits == without.remembered.misses == without.remembered.images == 0


@zoo.ALL
def test_only_unknown_images_are_encoded(case):
    model, plain = case.model(), case.model()
    handle = vlmprune.patch(model, "divprune", remember_images=9, **BUDGET)
    without = vlmprune.patch(plain, "divprune", **BUDGET)
    batches = [
        (zoo.ONE,),
        ((2, "A", 3), zoo.ONE, (1, "A", 4), (2, "D", 1)),  # A twice, C known
        (zoo.TWO, (4, "D", 2)),
        ((1, "D", 2, "A", 1, "B", 3, "C", 2),),
    ]
    with encoder_runs(model) as runs:
        for rows in batches:
            found, expected = ask(model, case, rows), ask(plain, case, rows)
            torch.testing.assert_close(found, expected, **TOLERANCE)
            for one, other in zip(handle.last.kept, without.last.kept, strict=True):
                assert torch.equal(one, other)
    assert runs[:2] == [values(case, [zoo.ONE]), values(case, [(2, "A", 3), (2, "D", 1)])]
    if case.name == "llava_onevision":  # the only image of a prompt is another than one of several
        several = [values(case, [(1, "A", 1, "B", 1)]), values(case, [(1, "D", 1, "C", 1)])]
        assert runs[2:] == several and handle.remembered.misses == 7
    else:
        assert runs[2:] == [values(case, [(1, "B", 1)])] and handle.remembered.misses == 4


def test_an_image_that_onevision_cannot_be_asked_for_alone_takes_a_neighbour_along():
    case = zoo.CASES["llava_onevision"]
    model, plain = case.model(), case.model()
    handle = vlmprune.patch(model, "divprune", remember_images=9, **BUDGET)
    vlmprune.patch(plain, "divprune", **BUDGET)
    picture = values(case, [(1, "A", 1, "B", 1)]) // 2
    with encoder_runs(model) as runs:
        for row in ((2, "A", 1, "B", 3), (2, "A", "C", "B"), (1, "D", "A"), ("C", 1, "D")):
            for rows in ((row,), ((3, "B", 2), row)):  # alone as well, in the same call
                expected = ask(plain, case, rows)
                torch.testing.assert_close(ask(model, case, rows), expected, **TOLERANCE)
    tiles = values(case, [(3, "B", 2)])
    assert runs == [2 * picture, tiles, 2 * picture, 2 * picture]
    assert handle.remembered.misses == 5


@VIDEO
def test_videos(case):
    model, plain = case.model(), case.model()
    handle = vlmprune.patch(model, "divprune", remember_images=9, **BUDGET)
    vlmprune.patch(plain, "divprune", **BUDGET)
    with encoder_runs(model) as runs:
        for rows in (((2, "V", 3),), zoo.MIXED, zoo.MIXED, ((1, "W", 1), (2, "V", 2))):
            found, expected = ask(model, case, rows), ask(plain, case, rows)
            torch.testing.assert_close(found, expected, **TOLERANCE)
    assert runs[0] == values(case, [(2, "V", 3)])
    assert sorted(runs[1:]) == sorted(
        [values(case, [(1, "W", 1)]), values(case, [(1, "D", 1), (1, "B", 1, "A", 1)])]
    )
    assert handle.remembered.misses == 5 and handle.remembered.images == 5


@zoo.FAMILIES
def test_generate_over_turns_with_beams_and_static_caches(case):
    model, plain = case.model(), case.model()
    calls = [vlmprune.method("divprune", **BUDGET), vlmprune.method("fastv", keep_ratio=0.2)]
    handle = vlmprune.patch(model, calls, remember_images=9)
    vlmprune.patch(plain, calls)
    turns = [(2, "A", 3), (2, "A", 3, "B", 2), (2, "A", 3, "B", 2, "A", 1, "B", 4)]
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        for turn in turns:
            inputs = case.inputs([turn])
            found = model.generate(**inputs, max_new_tokens=4, do_sample=False, **options)
            expected = plain.generate(**inputs, max_new_tokens=4, do_sample=False, **options)
            assert torch.equal(found, expected)
    images = 3 if case.name == "llava_onevision" else 2  # A with others is another one there
    assert handle.remembered.misses == handle.remembered.images == images
    assert handle.remembered.hits == 3 * 7 - images


def test_the_image_asked_about_longest_ago_is_forgotten_first():
    model = LLAVA.model()
    handle = vlmprune.patch(model, "grid", remember_images=2, **BUDGET)
    with encoder_runs(model) as runs:
        for image, encoded in zip("ABACABCD", "11010111", strict=True):
            before = len(runs)
            ask(model, LLAVA, [(1, image, 2)])
            assert len(runs) - before == int(encoded), image
    assert handle.remembered.images == 2


def test_more_images_in_a_call_than_are_remembered():
    model, plain = LLAVA.model(), LLAVA.model()
    handle = vlmprune.patch(model, "divprune", remember_images=1, **BUDGET)
    vlmprune.patch(plain, "divprune", **BUDGET)
    for _ in range(2):
        expected = ask(plain, LLAVA, zoo.BATCH)
        torch.testing.assert_close(ask(model, LLAVA, zoo.BATCH), expected, **TOLERANCE)
    assert handle.remembered.images == 1 and handle.remembered.misses == 5


def test_forgetting_images_after_weights_changed_unnoticed():
    model = LLAVA.model()
    handle = vlmprune.patch(model, "divprune", remember_images=4, **BUDGET)
    before = ask(model, LLAVA, zoo.SINGLE)
    model.model.multi_modal_projector.linear_1.weight.data.mul_(0.5)
    assert torch.equal(ask(model, LLAVA, zoo.SINGLE), before)
    handle.forget_images()
    assert handle.remembered.images == 0
    assert not torch.allclose(ask(model, LLAVA, zoo.SINGLE), before)


def test_one_pixel_makes_another_image_and_so_do_options_of_the_encoder():
    model = LLAVA.model()
    handle = vlmprune.patch(model, "divprune", remember_images=9, **BUDGET)
    inputs = LLAVA.inputs(zoo.SINGLE)
    with torch.no_grad():
        model(**inputs)
        model(**inputs, vision_feature_layer=LLAVA.reference().config.vision_feature_layer)
        model.generate(**inputs, max_new_tokens=1)
        assert handle.remembered.misses == 1
        model(**inputs, vision_feature_layer=-3)
        assert handle.remembered.misses == 2
        pixels = inputs["pixel_values"].clone()
        pixels[0, 0, 0, 0] = pixels[0, 0, 0, 0].nextafter(torch.tensor(9.0))
        model(**{**inputs, "pixel_values": pixels})
        assert handle.remembered.misses == 3
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
        assert handle.remembered.misses == 4
        model.half()(**inputs)
    assert handle.remembered.misses == 5


def test_the_same_patches_in_another_grid_are_another_image():
    case = zoo.CASES["qwen2_vl"]
    model, plain = case.model(), case.model()
    handle = vlmprune.patch(model, "divprune", remember_images=9, **BUDGET)
    vlmprune.patch(plain, "divprune", **BUDGET)
    inputs = case.inputs([(3, "A", 2)])
    for grid in ([1, 8, 12], [1, 12, 8]):
        given = {**inputs, "image_grid_thw": torch.tensor([grid])}
        with torch.no_grad():
            assert torch.equal(model(**given).logits, plain(**given).logits)
    assert handle.remembered.misses == 2


@zoo.FAMILIES
def test_what_is_remembered_is_what_enters_the_llm(case):
    model = case.model()
    vlmprune.patch(model, "divprune", remember_images=4, **BUDGET)
    dense = case.reference().base_model
    inputs = case.inputs(zoo.SINGLE)
    for _ in range(2):
        with torch.no_grad():
            output = model(**inputs)
        kept = model._vlmprune_handle.last.kept[0]
        if (hidden := getattr(output, "image_hidden_states", None)) is not None:
            if isinstance(hidden, list):  # from transformers 5.24 on
                hidden = torch.cat(hidden)
            hidden = hidden.flatten(0, -2)
            assert torch.equal(hidden.any(-1).nonzero()[:, 0], kept)
        (known,) = model._vlmprune_handle._engine.memory._known.values()
        given = dense.get_image_features(**zoo.encoder_inputs(inputs)["image"])
        assert torch.equal(known.rows, given.pooler_output[0][kept])
        for rows, layer in zip(known.deeper, getattr(given, "deepstack_features", ()), strict=True):
            assert torch.equal(rows, layer[0][kept])
        assert known.rows.untyped_storage().nbytes() == known.rows.nbytes


def test_encoder_functions_called_by_themselves_give_all_that_they_do():
    model, plain = LLAVA.model(), LLAVA.model()
    handle = vlmprune.patch(model, "divprune", remember_images=4, **BUDGET)
    vlmprune.patch(plain, "divprune", **BUDGET)
    pixels = {"pixel_values": LLAVA.inputs(zoo.SINGLE)["pixel_values"]}
    ask(model, LLAVA, zoo.SINGLE)
    for _ in range(2):
        found, expected = (m.get_image_features(**pixels) for m in (model, plain))
        assert found.keys() == expected.keys()
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(found.pooler_output[0], expected.pooler_output[0])
    assert handle.remembered.hits == 0 and handle.remembered.misses == 1


# --- Gradients ---------------------------------------------------------------------------------


def test_nothing_is_remembered_where_the_encoder_learns():
    model = LLAVA.model()
    weight = model.model.multi_modal_projector.linear_1.weight
    handle = vlmprune.patch(model, "divprune", remember_images=4, **BUDGET)
    ask(model, LLAVA, zoo.SINGLE)
    weight.requires_grad_(True)
    for _ in range(2):
        weight.grad = None
        model(**LLAVA.inputs(zoo.SINGLE)).logits.sum().backward()
        assert weight.grad.any()
    weight.requires_grad_(False)
    pixels = LLAVA.inputs(zoo.SINGLE)["pixel_values"].requires_grad_()
    model(**{**LLAVA.inputs(zoo.SINGLE), "pixel_values": pixels}).logits.sum().backward()
    assert pixels.grad.any()
    model.train()
    ask(model, LLAVA, zoo.SINGLE)
    assert handle.remembered.hits == 0 and handle.remembered.misses == 1


def test_the_llm_learns_from_remembered_images():
    grads, model = [], LLAVA.model()
    weight = model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    handle = vlmprune.patch(model, "divprune", remember_images=4, **BUDGET)
    with torch.inference_mode():
        model(**LLAVA.inputs(zoo.SINGLE))
    for _ in range(2):
        weight.grad = None
        model(**LLAVA.inputs(zoo.SINGLE)).logits.sum().backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)
    assert handle.remembered.hits == 1


# --- Sharing and removing ----------------------------------------------------------------------


def test_threads_share_the_memory():
    model = LLAVA.model()
    handle = vlmprune.patch(model, "divprune", remember_images=3, **BUDGET)
    questions = [((n % 3 + 1, image, 2),) for n in range(12) for image in "ABCD"]
    alone = LLAVA.model()
    vlmprune.patch(alone, "divprune", **BUDGET)
    expected = [ask(alone, LLAVA, rows) for rows in questions]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda rows: ask(model, LLAVA, rows), questions))
    assert all(map(torch.equal, found, expected))
    counts = handle.remembered
    assert counts.hits + counts.misses == len(questions) and counts.images == 3


@zoo.FAMILIES
def test_undo_is_exact_and_empties_the_memory(case):
    model = case.model()
    ask(model, case, zoo.BATCH)  # transformers installs hooks of its own then
    if case.packed:
        model.model.rope_deltas = None  # left there by any forward
    before = snapshot(model)
    with vlmprune.patch(model, "divprune", remember_images=4, **BUDGET) as handle:
        for _ in range(2):
            ask(model, case, zoo.BATCH)
    if case.packed:
        model.model.rope_deltas = None  # left there by any forward
    assert not differences(before, snapshot(model))
    assert handle.remembered.images == 0
    assert torch.equal(ask(model, case, zoo.BATCH), ask(case.reference(), case, zoo.BATCH))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_sharded_and_offloaded_models(name, tmp_path):
    case, rows = zoo.CASES[name], (zoo.TWO, zoo.ONE)
    model, inputs = case.model(), case.inputs(rows)
    with vlmprune.patch(model, "divprune", **BUDGET):
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    offloaded = to_disk(case.model(), tmp_path)
    offloaded.generate(**inputs, max_new_tokens=1)  # transformers installs its own hooks
    before = snapshot(offloaded)
    with vlmprune.patch(offloaded, "divprune", remember_images=4, **BUDGET) as handle:
        for _ in range(2):
            found = offloaded.generate(**inputs, max_new_tokens=3, do_sample=False)
            assert torch.equal(found, expected)
        assert handle.remembered.misses == 3
    assert not changed(before, snapshot(offloaded))
    with Devices():
        spread(model, 1)
        there = {key: value.to(ONE) for key, value in inputs.items()}
        with vlmprune.patch(model, "divprune", remember_images=4, **BUDGET) as handle:
            for _ in range(2):
                found = model.generate(**there, max_new_tokens=3, do_sample=False)
                assert torch.equal(found.to("cpu"), expected)
        assert handle.remembered.misses == 3


# --- Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ_THE_PROMPT)
def test_methods_that_read_the_prompt_are_refused(name):
    model = LLAVA.model()
    before = zoo.hooks(model)
    options = {**BUDGET, **(zoo.options_for(LLAVA, name) or {})}
    with pytest.raises(vlmprune.UnsupportedFeatureError) as refused:
        vlmprune.patch(model, name, remember_images=16, **options)
    message = str(refused.value)
    assert name in message and "remember_images=16" in message and "divprune" in message
    assert not any(other in message.split("LLM: ")[1] for other in READ_THE_PROMPT)
    assert zoo.hooks(model) == before
    vlmprune.patch(model, name, remember_images=0, **options)


@pytest.mark.parametrize("images", [-1, True, 1.5, "16", None])
def test_impossible_numbers_are_refused(images):
    with pytest.raises(vlmprune.MethodFieldError, match="remember_images="):
        vlmprune.patch(LLAVA.model(), "divprune", remember_images=images, **BUDGET)


def test_some_methods_read_the_prompt():
    assert {"cdpruner", "catp"} <= set(READ_THE_PROMPT)


# --- Weights that change ------------------------------------------------------------------------


def stepped(model) -> None:
    for part in (model.base_model.vision_tower, model.base_model.multi_modal_projector):
        weights = list(part.requires_grad_(True).parameters())
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        torch.optim.AdamW(weights, lr=0.1).step()
        part.requires_grad_(False)


def loaded(model) -> None:
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})


def assigned(model) -> None:
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)


def cast_and_back(model) -> None:
    model.base_model.multi_modal_projector.to(torch.bfloat16).to(torch.float32)


def adapted(model) -> None:
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(init_lora_weights=False, target_modules=".*vision.*q_proj"))


def switched_off(model) -> None:
    model.disable_adapters()


def merged(model) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()


def test_weights_where_freed_ones_were_are_others():
    model = LLAVA.model()
    core = model.base_model
    memory = bytearray(4 * 64)

    def weights() -> tuple[object, ...]:
        """With a bias at the same address as before, in a storage of its own."""
        bias = core.multi_modal_projector.linear_2.bias
        bias.data = torch.frombuffer(memory, dtype=torch.float32)[: len(bias)]
        return remember._weights(core, core.language_model)

    before = weights()
    assert remember._weights(core, core.language_model) == before != weights()


@pytest.mark.parametrize(
    "changes",
    [
        *([stepped], [loaded], [assigned], [cast_and_back]),
        pytest.param([adapted, switched_off], marks=skips.needs("adapters")),
        pytest.param([adapted, merged], marks=skips.needs("adapters")),
    ],
    ids=lambda changes: "-".join(change.__name__ for change in changes),
)
def test_what_older_weights_made_is_not_used(changes):
    model, plain = LLAVA.model(), LLAVA.model()
    handle = vlmprune.patch(model, "pool", remember_images=9, **BUDGET)
    vlmprune.patch(plain, "pool", **BUDGET)
    for count, change in enumerate(changes, 1):
        before = ask(model, LLAVA, AGAIN)
        change(model)
        change(plain)
        expected = ask(plain, LLAVA, AGAIN)
        assert torch.equal(ask(model, LLAVA, AGAIN), expected)
        assert merged in changes[:count] or not torch.equal(before, expected)
        assert handle.remembered.misses == 3 * (count + 1)
        assert torch.equal(ask(model, LLAVA, AGAIN), expected)
        assert handle.remembered.hits == 3 * (2 * count - 1)


def test_the_llm_s_weights_do_not_matter():
    model, plain = LLAVA.model(), LLAVA.model()
    handle = vlmprune.patch(model, "pool", remember_images=9, **BUDGET)
    vlmprune.patch(plain, "pool", **BUDGET)
    ask(model, LLAVA, AGAIN)
    for changed_one in (model, plain):
        for weight in changed_one.base_model.language_model.parameters():
            weight.mul_(1.1)
    assert torch.equal(ask(model, LLAVA, AGAIN), ask(plain, LLAVA, AGAIN))
    assert (handle.remembered.hits, handle.remembered.misses) == (3, 3)


def test_weights_that_have_no_count_of_changes():
    with torch.inference_mode():
        model = LLAVA.model()
        handle = vlmprune.patch(model, "pool", remember_images=9, **BUDGET)
        model(**LLAVA.inputs())
        model(**LLAVA.inputs())
    assert all(weight.is_inference() for weight in model.parameters())
    assert (handle.remembered.hits, handle.remembered.misses) == (1, 1)
