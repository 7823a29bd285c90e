"""Methods on the KV cache, on every model: identity, the slow reference, refusals."""

from __future__ import annotations

import functools

import pytest
import torch
import vlmprune
import zoo
from reported import cached_truth
from vlmprune.prune.contract import Attending
from vlmprune.prune.registry import method_class

STEPS = 6
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
FIELDS = {"elastic_cache": {"distance": -4}, "token_select": {"n_init": 2, "n_local": 3}}
"""What makes methods act on prompts as short as these."""
VARIANTS = [
    *((name, FIELDS.get(name, {})) for name in zoo.ON_CACHE),
    ("visual_press", {"press": "knorm"}),
    ("visual_press", {"press": "received"}),
]
EACH = pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=str)
LISTS = {
    "divprune, pyramiddrop, elastic_cache": [
        vlmprune.method("divprune", keep_ratio=0.6),
        vlmprune.method("pyramiddrop", keep_ratio=0.4),
        vlmprune.method("elastic_cache", keep_ratio=0.2, distance=-4),
    ],
    "pool, fastv, visual_press": [
        vlmprune.method("pool", keep_ratio=0.6),
        vlmprune.method("fastv", keep_ratio=0.4),
        vlmprune.method("visual_press", keep_ratio=0.2),
    ],
    "sparsevlm, elastic_cache": [
        vlmprune.method("sparsevlm", keep_ratio=0.4),
        vlmprune.method("elastic_cache", keep_ratio=0.2, distance=-4),
    ],
    "spatten, token_select": [
        vlmprune.method("spatten", keep_ratio=0.4),
        vlmprune.method("token_select", keep_ratio=0.2, n_init=2, n_local=3),
    ],
}


def generate(model, inputs, steps: int = STEPS):
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


class Attended:
    """What each new token attended to: calls of `attended`, as [row][step][layer]."""

    def __init__(self, monkeypatch, name: str, layers: int) -> None:
        self.calls, self.layers = [], layers
        cls = method_class(name)
        if issubclass(cls, Attending):
            choose = cls.attended

            def noted(method, query, keys, valid, keep):
                found = choose(method, query, keys, valid, keep)
                self.calls.append((valid, found))
                return found

            monkeypatch.setattr(cls, "attended", noted)

    def __call__(self, row: int, layer: int, query, keys):
        """The entries, numbered without padding, in the order of the reference's calls."""
        step = self.steps.setdefault((row, layer), 0)
        self.steps[row, layer] += 1
        valid, found = self.calls[step * self.layers + layer]
        pads = int((~valid[row]).sum())
        assert keys.shape[1] == int(valid[row].sum())
        if found is None:
            return None
        columns, counts = found
        return columns[row][counts[row]] - pads

    def reset(self) -> Attended:
        self.steps: dict[tuple[int, int], int] = {}
        return self


def check_steps(case, model, handle, inputs, monkeypatch, name: str) -> None:
    """Logits of every step, what the layers store, and the lengths that callers see."""
    layers = case.shape.decoder.num_layers
    attended = Attended(monkeypatch, name, layers)
    out = generate(model, inputs)
    given = attended.reset() if attended.calls else None
    truth = cached_truth(case, inputs, model, handle, given)
    new = out.sequences[:, -STEPS:].tolist()
    for row, tokens in enumerate(new):
        attended.reset()
        expected = truth.next_logits(row, tokens[:-1])
        torch.testing.assert_close(torch.stack(out.logits)[:, row], expected, **CLOSE)
    cache = out.past_key_values
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + STEPS - 1
    if given is None:
        lengths = [truth.cached.lengths(row, t[:-1]) for row, t in enumerate(new)]
        stored = [layer.keys.shape[2] for layer in cache.layers]
        assert stored == [max(column) for column in zip(*lengths, strict=True)]


@functools.cache
def dense(case: zoo.Case, batch: bool):
    out = generate(case.reference(), case.inputs(zoo.BATCH if batch else zoo.SINGLE))
    return out.sequences, torch.stack(out.logits)


@zoo.ALL
@EACH
def test_keeping_everything_is_the_unpatched_model_bit_for_bit(case, name, fields):
    model = case.model()
    vlmprune.patch(model, name, keep_ratio=1.0, **fields)
    for batch in (False, True):
        out = generate(model, case.inputs(zoo.BATCH if batch else zoo.SINGLE))
        tokens, logits = dense(case, batch)
        assert torch.equal(out.sequences, tokens)
        assert torch.equal(torch.stack(out.logits), logits)


def test_published_token_select_sees_all_of_a_short_prompt():
    case = zoo.CASES["llava-clip-llama"]
    model = case.model()
    vlmprune.patch(model, "token_select")
    out = generate(model, case.inputs(zoo.BATCH))
    torch.testing.assert_close(torch.stack(out.logits), dense(case, True)[1], **CLOSE)


@zoo.ALL
@EACH
@pytest.mark.parametrize("positions", ["original", "repacked"])
def test_equals_the_slow_reference(case, name, fields, positions, monkeypatch):
    model = case.model()
    if positions == "repacked" and case.fixed_positions:
        with pytest.raises(vlmprune.MethodFieldError, match="original"):
            vlmprune.patch(model, name, keep_ratio=0.4, positions=positions, **fields)
        return
    handle = vlmprune.patch(model, name, keep_ratio=0.4, positions=positions, **fields)
    inputs = case.inputs(zoo.BATCH)
    check_steps(case, model, handle, inputs, monkeypatch, name)
    counts = case.counts(zoo.BATCH)
    assert handle.last.tokens_kept == counts, "the prefill sees everything"
    for layer in handle.last.entries:
        two, one, none = layer
        text = handle.last.text_tokens
        assert none is None, "a row without an image was touched"
        assert two.shape[-1] == text[0] + sum(round(0.4 * n) for n in counts[:2])
        assert one.shape[-1] == text[1] + round(0.4 * counts[2])
        assert (two.diff(dim=-1) > 0).all() and (one.diff(dim=-1) > 0).all()


@zoo.FAMILIES
@pytest.mark.parametrize("calls", LISTS.values(), ids=LISTS)
def test_methods_at_all_places_equal_the_slow_reference(case, calls, monkeypatch):
    model = case.model()
    handle = vlmprune.patch(model, calls)
    check_steps(case, model, handle, case.inputs(zoo.BATCH), monkeypatch, calls[-1].name)


@EACH
def test_a_batch_mate_changes_nothing(name, fields):
    case = zoo.CASES["llava-clip-mistral"]
    model = case.model()
    vlmprune.patch(model, name, keep_ratio=0.4, **fields)
    together = torch.stack(generate(model, case.inputs(zoo.BATCH)).logits)
    for row, alone in enumerate(zoo.BATCH):
        out = generate(model, case.inputs((alone,)))
        torch.testing.assert_close(torch.stack(out.logits)[:, 0], together[:, row], **CLOSE)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["elastic_cache", "visual_press"])
def test_beams_and_copies_of_a_row_keep_their_own_books(name, options):
    case = zoo.CASES["llava-clip-llama"]
    model = case.model()
    handle = vlmprune.patch(model, name, keep_ratio=0.4, **FIELDS.get(name, {}))
    inputs = case.inputs(zoo.BATCH)
    with torch.no_grad():
        model(**inputs)
    truth = cached_truth(case, inputs, model, handle)
    sample = {"do_sample": True, "top_k": 0} if "num_beams" not in options else {"do_sample": False}
    torch.manual_seed(5)
    out = model.generate(**inputs, max_new_tokens=STEPS, **options, **sample)[:, -STEPS:]
    if "num_beams" in options:
        assert torch.equal(out, truth.beams(STEPS, 3)[0][:, 0])
    else:
        assert torch.equal(out, truth.sample(STEPS, seed=5, copies=2))


@pytest.mark.parametrize("name", zoo.ON_CACHE)
def test_videos_equal_the_slow_reference(name, monkeypatch):
    case = zoo.CASES["qwen2_5_vl"]
    model = case.model()
    handle = vlmprune.patch(model, name, keep_ratio=0.4, **FIELDS.get(name, {}))
    check_steps(case, model, handle, case.inputs(zoo.MIXED), monkeypatch, name)


# --- Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.ON_CACHE)
@pytest.mark.parametrize("budget", [{"average_tokens": 10}, {"flops_ratio": 0.5}], ids=str)
def test_a_budget_of_the_prefill_is_refused(name, budget):
    with pytest.raises(vlmprune.BudgetError, match="keep_ratio or keep_tokens"):
        vlmprune.method(name, **budget)


def test_two_methods_on_the_cache_are_refused():
    calls = [vlmprune.method(name, keep_ratio=0.5) for name in ("elastic_cache", "visual_press")]
    with pytest.raises(vlmprune.MethodFieldError, match="all act in the KV cache"):
        vlmprune.patch(zoo.CASES["llava-clip-llama"].model(), calls)


@pytest.mark.parametrize("name", zoo.ON_CACHE)
def test_sliding_windows_are_refused(name):
    with pytest.raises(vlmprune.UnsupportedModelError, match="sliding_attention"):
        vlmprune.patch(zoo.SLIDING.model(), name, keep_ratio=0.5)


@pytest.mark.parametrize("name", ["elastic_cache", "token_select"])
def test_defects_of_official_code_are_refused(name):
    with pytest.raises(vlmprune.MethodFieldError, match="official=True"):
        vlmprune.patch(zoo.CASES["llava-clip-llama"].model(), name, keep_ratio=0.5, official=True)


def test_a_budget_below_what_is_always_attended_to_is_refused():
    case = zoo.CASES["llava-clip-llama"]
    model = case.model()
    vlmprune.patch(model, "token_select", keep_ratio=0.4)
    with pytest.raises(vlmprune.BudgetError, match="640 in any case"):
        generate(model, case.inputs())
