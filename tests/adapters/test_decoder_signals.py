"""Signals of decoder layers are what the contract says, beside a decoder written out by hand.

A method that records keeps pseudo-random tokens at several cuts; what it saw is compared with
signals of `Expected`: one row, no padding, no cache, whole attention maps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from kit import zoo
from kit.oracle import Rows as OracleRows
from kit.oracle import State, Truth, projected, turned
from torch import Tensor
from transformers import DynamicCache
from vlmprune.adapters.patching import patch
from vlmprune.adapters.places import prefill as prefill_module
from vlmprune.adapters.places.prefill import Prefill
from vlmprune.adapters.signals.table import hear
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import (
    BeforeLLM,
    CacheEntries,
    Compressed,
    Compressing,
    Cut,
    Hidden,
    InDecoder,
    MeanHidden,
    ModuleStep,
    Neurons,
    Place,
    ReceivedInLayer,
    RotaryAffinity,
    Rows,
    Selection,
    Signal,
    TextAttention,
    VisualTokens,
)
from vlmprune.prune.declared import readable
from vlmprune.prune.errors import MissingSignalError

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
DEPTH = 4
LAYERS = range(DEPTH)
FIRST = 0.8
TWICE = (Cut(Place.DECODER, 1, 2.0), Cut(Place.DECODER, 3))
THREE: zoo.Row = (2, "A", 3, "B", 1, "C", 4)
NO_TEXT_BEHIND: zoo.Row = (3, "C", "A")
ROWS = (THREE, zoo.ONE, NO_TEXT_BEHIND, zoo.NONE)
VIDEOS = pytest.mark.parametrize(
    "case", [c for c in zoo.CASES.values() if c.layout.takes_videos], ids=lambda case: case.name
)


# --- What is declared --------------------------------------------------------------------------


def related(visual: Tensor, text: Tensor) -> Tensor:
    """The text tokens that are more like the image than their mean; some always are."""
    likeness = text @ visual.mean(0)
    return likeness >= likeness.mean()


def step(before: Tensor, after: Tensor) -> Tensor:
    """Depends on all tokens of the prompt."""
    return after.norm(dim=-1) / before.norm(dim=-1) * (before * after).sum(-1).softmax(0)


def likeness(visual: Tensor, text: Tensor) -> Tensor:
    return visual @ text.mean(0)


RULES: tuple[Rows, ...] = ("last", "text", related)


def declared(layers: Sequence[int] = LAYERS) -> tuple[Signal, ...]:
    """Every signal of the layers."""
    found: list[Signal] = []
    for n in layers:
        for rows in RULES:
            for each in (False, True):
                found += [TextAttention(n, rows, ahead, each) for ahead in (False, True)]
            found.append(RotaryAffinity(n, rows))
        found += [ReceivedInLayer(n), Hidden(n), MeanHidden(n, "query"), MeanHidden(n, "context")]
        found += [ModuleStep(n, "attention", step), ModuleStep(n, "mlp", step)]
        found.append(Neurons(n, likeness))
    return tuple(found)


def before_a_cut(signal: Signal) -> bool:
    """Whether the cut of a layer sees this signal of the layer itself."""
    ahead = isinstance(signal, TextAttention) and signal.ahead
    return ahead or isinstance(signal, Hidden | MeanHidden)


def ran(wants: Sequence[Signal], cuts: Sequence[int], layer: int) -> set[Signal]:
    """Those that the cut at `layer` sees."""
    return {
        want
        for want in wants
        if (want.layer < layer or (want.layer == layer and before_a_cut(want)))
        and (want.layer in cuts or not getattr(want, "ahead", False))
    }


# --- Methods that record -----------------------------------------------------------------------


def pick(layer: int, num_tokens: int, keep: int) -> Tensor:
    """Pseudo-random tokens, the same in every batch."""
    draw = torch.Generator().manual_seed(1000 * layer + num_tokens)
    return torch.randperm(num_tokens, generator=draw)[:keep].sort().values


@dataclass(frozen=True)
class Seen:
    """What a cut was given, and what it kept."""

    tokens: VisualTokens
    chosen: Tensor

    @property
    def kept(self) -> Tensor:
        """Numbers of the image's tokens."""
        alive = self.tokens.alive
        return self.chosen if alive is None else alive[self.chosen]


@dataclass(frozen=True, kw_only=True)
class Recorder(InDecoder):
    """Writes down what it is given."""

    name: ClassVar[str] = "recorder"
    wants: tuple[Signal, ...] = ()
    at: tuple[Cut, ...] = TWICE
    seen: list[Seen] = field(default_factory=list)

    def needs(self, shape):
        return tuple(want for want in self.wants if any(readable(want, cut) for cut in self.at))

    def cuts(self, shape):
        return self.at

    def select(self, tokens, keep):
        chosen = pick(tokens.layer, tokens.num_tokens, keep)
        self.seen.append(Seen(tokens, chosen))
        return Selection(kept=chosen)

    def of(self, layer: int) -> list[Seen]:
        """What its cut at a layer saw, image by image."""
        return [seen for seen in self.seen if seen.tokens.layer == layer]


@dataclass(frozen=True, kw_only=True)
class First(BeforeLLM):
    """Keeps pseudo-random tokens before the LLM, newlines among them."""

    name: ClassVar[str] = "first"
    scopes = ("image",)
    newline_policies = ("compete",)
    seen: list[Seen] = field(default_factory=list)

    needs, select = Recorder.needs, Recorder.select
    wants: ClassVar[tuple[Signal, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class CacheRecorder(Compressing):
    """Writes down entries, and keeps pseudo-random ones."""

    name: ClassVar[str] = "cache-recorder"
    wants: tuple[Signal, ...] = tuple(ReceivedInLayer(n) for n in LAYERS)
    seen: list[CacheEntries] = field(default_factory=list)

    def needs(self, shape):
        return self.wants

    def compress(self, entries, keep):
        self.seen.append(entries)
        return Compressed(kept=pick(entries.layer, len(entries.visual), keep))


def call(method, keep: float = 0.3) -> MethodCall:
    return MethodCall(method=method, budget=Budget("keep_ratio", keep))


def modes(case: zoo.Case) -> tuple[str, ...]:
    return ("original",) if case.fixed_positions else ("original", "repacked")


# --- A decoder by hand -------------------------------------------------------------------------


@dataclass
class Ran:
    """One layer of one row."""

    before: State
    """What comes from the layer before, not yet cut."""
    ahead: Tensor
    """(H, n, n) its attention maps on the uncut input."""
    places: Tensor
    tables: tuple[Tensor, Tensor]
    queries: Tensor
    keys: Tensor
    values: Tensor
    maps: Tensor
    attention: tuple[Tensor, Tensor]
    """Input and output of the module, (n, D) each."""
    mlp: tuple[Tensor, Tensor]
    neurons: Tensor

    def at(self, places: Tensor) -> Tensor:
        """Rows of the tokens at these places of the prompt, or of the last token before them."""
        return torch.searchsorted(self.places, places, right=True) - 1


class Expected:
    """Signals of a batch on an unpatched model.

    Args:
        prefix: of each row, how many tokens an earlier call stored.
    """

    def __init__(self, case, rows, cuts=(), positions="original", prefix=None) -> None:
        self.truth = Truth(case.reference("eager"), case.inputs(rows), cuts, positions)
        self.prefix = prefix or [0] * len(rows)
        with torch.no_grad():
            self.rows = [list(self._walk(row)) for row in range(len(rows))]
        self.image_rows = [
            (row, number)
            for row, spec in enumerate(self.truth.rows)
            for number in range(len(spec.images))
        ]

    def _walk(self, row: int):
        truth, state = self.truth, self.truth.start(row)
        changes = {0, *(layer for layer, _ in truth.cuts)}
        for number, layer in enumerate(truth.decoder.layers):
            before = state
            if number == 0:  # what is gone before the LLM never comes
                before = truth.cut(row, 0, state)
                tables = [table[0] for table in truth.rotary(before)]
            _, _, *ahead = self._attend(layer, before.hidden, tables)
            state = truth.cut(row, number, state)
            if number in changes:
                tables = [table[0] for table in truth.rotary(state)]
            x, queries, keys, maps = self._attend(layer, state.hidden, tables)
            values = projected_values(layer.self_attn, x)
            mixed = maps @ values.repeat_interleave(len(maps) // len(values), 0)
            added = layer.self_attn.o_proj(mixed.transpose(0, 1).flatten(1))
            hidden = state.hidden + added
            y = layer.post_attention_layernorm(hidden)
            neurons = layer.mlp.act_fn(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y)
            change = layer.mlp.down_proj(neurons)
            yield Ran(
                before=before,
                ahead=ahead[-1],
                places=state.places,
                tables=tuple(tables),
                queries=queries,
                keys=keys,
                values=values,
                maps=maps,
                attention=(x, added),
                mlp=(y, change),
                neurons=neurons,
            )
            hidden = hidden + change
            if number < len(state.deep):
                hidden = hidden + state.deep[number]
            state = State(hidden, state.positions, state.places, state.deep, state.following)
        logits = truth.model.lm_head(truth.decoder.norm(state.hidden))
        torch.testing.assert_close(logits, truth.forward(row)[0], atol=1e-3, rtol=1e-3)

    def _attend(self, layer, hidden: Tensor, tables):
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        queries, keys = (turned(projected(attention, name, x), *tables) for name in "qk")
        shared = keys.repeat_interleave(len(queries) // len(keys), 0)
        scores = queries @ shared.mT / queries.shape[-1] ** 0.5
        return x, queries, keys, (scores + self.truth.mask(len(x))).softmax(-1)

    # --- signals ---------------------------------------------------------------------------

    def asked(self, row: int, image: Tensor, rows: Rows) -> Tensor:
        """Places of the text rows."""
        spec = self.truth.rows[row]
        last = torch.tensor([len(spec.ids) - 1])
        behind = ~zoo.is_visual(spec.ids)
        behind[: int(image.max()) + 1] = False
        if rows == "last" or not behind.any():
            return last
        places = behind.nonzero()[:, 0]
        if rows == "text":
            return places
        entered = image[self.truth.alive(row, 0)[image]]
        return places[rows(spec.embeds[entered], spec.embeds[places])]

    def signal(self, want: Signal, row: int, image: Tensor, alive: Tensor) -> Tensor:
        """Of one of the row's images (its places), for the tokens at the places `alive`."""
        here, spec = self.rows[row][want.layer], self.truth.rows[row]
        new = here.places >= self.prefix[row]
        match want:
            case TextAttention(layer, rows, ahead, each):
                maps, at = here.maps, here.at
                if ahead:
                    before = here.before.places
                    maps = here.ahead

                    def at(places):
                        return torch.searchsorted(before, places, right=True) - 1

                found = maps[:, at(self.asked(row, image, rows))][..., at(alive)]
                return found.permute(2, 0, 1) if each else found.mean((0, 1))
            case RotaryAffinity(layer, rows):
                width = here.tables[0].shape[-1]
                ones = turned(torch.ones(1, len(here.places), width), *here.tables)[0]
                asked = here.at(self.asked(row, image, rows))
                return (ones @ ones.T / width**0.5)[here.at(alive)][:, asked]
            case ReceivedInLayer():
                return here.maps.mean(0).sum(0)[here.at(alive)]
            case Hidden():
                return here.before.hidden[torch.isin(here.before.places, alive)]
            case MeanHidden(layer, of):
                places = here.before.places
                first = spec.images[-1][0]
                part = places >= first
                if of == "context" and len(spec.images) > 1:
                    part = places < first
                elif of == "context":
                    part = ~zoo.is_visual(spec.ids[places])
                return here.before.hidden[part & (places >= self.prefix[row])].mean(0)
            case ModuleStep(layer, module, read):
                before, after = here.attention if module == "attention" else here.mlp
                values = torch.zeros(len(new))
                values[new] = read(before[new], after[new])
                return values[here.at(alive)]
            case Neurons(layer, read):
                text = here.neurons[here.at(self.asked(row, image, "text"))]
                whole = image[self.truth.alive(row, layer)[image]]
                values = read(here.neurons[here.at(whole)], text)
                return values[torch.isin(whole, alive)]
        raise NotImplementedError(want)


def projected_values(attention, x: Tensor) -> Tensor:
    return attention.v_proj(x).view(len(x), -1, attention.head_dim).transpose(0, 1)


@functools.cache
def kept_tokens(case: zoo.Case, rows, first: bool, cuts: tuple[Cut, ...]) -> tuple:
    """(layer, kept tokens of each image in batch order), from counts alone."""
    found: dict[int, list[Tensor]] = {0: []} if first else {}
    for total in case.counts(rows):
        alive = torch.arange(total)
        if first:
            alive = alive[pick(0, total, round(FIRST * total))]
            found[0].append(alive)
        for cut in cuts:
            keep = round(round(0.3 * total) * cut.share)
            alive = alive[pick(cut.layer, len(alive), min(keep, len(alive)))]
            found.setdefault(cut.layer, []).append(alive)
    return tuple(found.items())


@functools.cache
def expected(case, rows, positions="original", first=False, cuts=TWICE, prefix=None) -> Expected:
    kept = kept_tokens(case, rows, first, cuts)
    return Expected(case, rows, kept, [positions] * len(kept), prefix)


def check(recorder: Recorder, truth: Expected, cuts: Sequence[int]) -> None:
    """All that was seen, against the reference."""
    kept = dict(truth.truth.cuts)
    for cut in cuts:
        seen = recorder.of(cut)
        assert len(seen) == len(truth.image_rows)
        for number, ((row, place), one) in enumerate(zip(truth.image_rows, seen, strict=True)):
            tokens, image = one.tokens, truth.truth.rows[row].images[place]
            assert torch.equal(one.kept, kept[cut][number]), "another token is kept than expected"
            assert set(tokens.signals) == ran(recorder.wants, cuts, cut)
            before = truth.rows[row][cut].before.places
            alive = image[torch.isin(image, before)]
            assert torch.equal(image[tokens.alive], alive)
            for want, found in tokens.signals.items():
                assert found.dtype == torch.float32
                wanted = truth.signal(want, row, image, alive)
                torch.testing.assert_close(
                    found, wanted, **CLOSE, msg=lambda m, w=want, r=row: f"{w} row {r}: {m}"
                )


# --- Every family ------------------------------------------------------------------------------


def calls_of(methods, keep: float = 0.3) -> list[MethodCall]:
    return [call(method, FIRST if isinstance(method, First) else keep) for method in methods]


def run(case, attention, rows, *methods, positions="original", padding="left", keep=0.3):
    model = case.model(attention)
    handle = patch(model, calls_of(methods, keep), positions=positions)
    with torch.no_grad():
        model(**case.inputs(rows, padding))
    return handle


@zoo.ALL
@zoo.ATTENTION
def test_all_signals_of_a_padded_batch(case, attention):
    positions = modes(case)[-1] if attention == "sdpa" else "original"
    recorder = Recorder(wants=declared())
    run(case, attention, ROWS, recorder, positions=positions)
    check(recorder, expected(case, ROWS, positions), (1, 3))


@zoo.BOTH_FAMILIES
@zoo.ATTENTION
def test_padding_on_the_right(case, attention):
    recorder = Recorder(wants=declared())
    run(case, attention, ROWS, recorder, padding="right")
    check(recorder, expected(case, ROWS), (1, 3))


@VIDEOS
def test_videos(case):
    recorder = Recorder(wants=declared())
    run(case, "sdpa", zoo.MIXED, recorder)
    check(recorder, expected(case, zoo.MIXED), (1, 3))


@zoo.ALL
def test_cuts_at_every_layer_behind_a_first_stage_before_the_llm(case):
    positions, cuts = (
        modes(case)[-1],
        (Cut(Place.DECODER, 1, 2.0), Cut(Place.DECODER, 2, 1.5), Cut(Place.DECODER, 3)),
    )
    recorder, first = Recorder(wants=declared(), at=cuts), First()
    run(case, "sdpa", ROWS, first, recorder, positions=positions)
    truth = expected(case, ROWS, positions, True, cuts)
    assert all(
        torch.equal(a.kept, b) for a, b in zip(first.seen, truth.truth.cuts[0][1], strict=True)
    )
    check(recorder, truth, (1, 2, 3))


@pytest.mark.parametrize("positions", ["original", "repacked"])
@pytest.mark.parametrize("rows", [ROWS, (zoo.TWO,)], ids=["padded", "single"])
@zoo.ATTENTION
def test_windows(positions, rows, attention):
    recorder = Recorder(wants=declared())
    run(zoo.SLIDING, attention, rows, recorder, positions=positions)
    check(recorder, expected(zoo.SLIDING, rows, positions), (1, 3))


# --- A cached text prefix ----------------------------------------------------------------------

LONG: tuple[zoo.Row, ...] = ((9, "A", 3, "B", 4), (30, "C", 3), (8, 2))
PREFIX = (6, 25, 4)
# Windows count columns, so that padding between the calls would be part of them.
FLUSH: tuple[zoo.Row, ...] = ((30, "C", 3), (12, "A", 5))
BEHIND_PREFIX = pytest.mark.parametrize(
    ("case", "rows", "prefix"),
    [
        *(pytest.param(case, LONG, PREFIX, id=case.name) for case in zoo.CASES.values()),
        pytest.param(zoo.SLIDING, FLUSH, (25, 9), id="sliding"),
    ],
)


def in_two_calls(model, case, truth: Truth, rows, prefix) -> None:
    """The prefixes of all rows, if any, then the rest; each call is padded on the left."""
    cache = DynamicCache(config=model.config.get_text_config())
    masks: list[Tensor] = []
    first = [slice(n) for n in prefix or ()]
    rest = [slice(n, None) for n in prefix or [0] * len(rows)]
    for here in (first, rest) if prefix else (rest,):
        part = [(s.ids[h], s.positions[:, h]) for s, h in zip(truth.rows, here, strict=True)]
        length = max(len(ids) for ids, _ in part)
        ids = torch.full((len(part), length), zoo.PAD)
        mask = torch.zeros(len(part), length, dtype=torch.long)
        positions = torch.zeros(len(part[0][1]), len(part), length, dtype=torch.long)
        for b, (own, at) in enumerate(part):
            ids[b, length - len(own) :] = own
            mask[b, length - len(own) :] = 1
            positions[:, b, length - len(own) :] = at
        masks.append(mask)
        extra = case.layout.extra(rows, ids) if here is rest else {}
        with torch.no_grad():
            model(
                input_ids=ids,
                attention_mask=torch.cat(masks, 1),
                position_ids=positions if len(positions) > 1 else positions[0],
                past_key_values=cache,
                use_cache=True,
                **extra,
            )


@BEHIND_PREFIX
def test_behind_a_cached_text_prefix(case, rows, prefix):
    positions = modes(case)[-1]
    truth = expected(case, rows, positions, prefix=prefix)
    model, recorder = case.model("sdpa"), Recorder(wants=declared())
    patch(model, call(recorder), positions=positions)
    in_two_calls(model, case, truth.truth, rows, prefix)
    check(recorder, truth, (1, 3))


# --- What is read, and when --------------------------------------------------------------------


@pytest.fixture
def heard(monkeypatch) -> list[tuple[str, int]]:
    """(what was shown, layer) of every call."""
    calls: list[tuple[str, int]] = []

    def spy(what, needs, *args):
        calls.extend((what, layer) for layer in {need.layer for need in needs})
        return hear(what, needs, *args)

    monkeypatch.setattr(prefill_module, "hear", spy)
    return calls


@zoo.BOTH_FAMILIES
def test_a_full_budget_reads_nothing_and_changes_no_bit(case, heard):
    model, recorder = case.model(), Recorder(wants=declared())
    patch(model, call(recorder, 1.0))
    inputs = case.inputs(ROWS)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, case.reference()(**inputs).logits)
    assert not heard and not recorder.seen


@zoo.BOTH_FAMILIES
def test_prompts_without_images_are_not_read(case, heard):
    model = case.model()
    patch(model, call(Recorder(wants=declared())))
    model.generate(**case.inputs((zoo.NONE,)), max_new_tokens=2, do_sample=False)
    assert not heard


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_nothing_is_read_behind_the_last_cut_nor_while_decoding(case, layer, heard):
    recorder, model = Recorder(wants=declared(), at=(Cut(Place.DECODER, layer),)), case.model()
    patch(model, call(recorder))
    model.generate(**case.inputs(ROWS), max_new_tokens=3, do_sample=False)
    ran_before = {
        (name, number)
        for name in ("heads", "input", "rotary", "attention", "mlp", "activations")
        for number in range(layer)
    }
    assert set(heard) == ran_before | {("input", layer), ("heads ahead", layer)}
    assert len(recorder.seen) == len(zoo.images(ROWS))
    assert all(heard.count(one) == 1 for one in heard)


@zoo.ALL
def test_a_layer_is_read_only_for_what_is_declared(case, heard):
    wants = (TextAttention(1), ModuleStep(0, "mlp", step), Hidden(2), Neurons(2, likeness))
    model, recorder = case.model(), Recorder(wants=wants, at=(Cut(Place.DECODER, 3),))
    patch(model, call(recorder))
    layers, heard_in_prefill = model.base_model.language_model.layers, []

    def look(*_):
        hooked = [
            {name for name, m in layer.named_modules() if m._forward_hooks or m._forward_pre_hooks}
            for layer in layers
        ]
        tapped = [hasattr(layer.self_attn.config, "_vlmprune_tap") for layer in layers]
        heard_in_prefill.append((hooked, tapped))

    model.base_model.language_model.norm.register_forward_pre_hook(look)
    with torch.no_grad():
        model(**case.inputs(ROWS))
    hooked, tapped = heard_in_prefill.pop()
    assert hooked == [{"mlp"}, set(), {"", "mlp.down_proj"}, {""}]
    assert tapped == [False, True, False, False]
    assert all(set(seen.tokens.signals) == set(wants) for seen in recorder.seen)


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_reads_and_chooses_once(case, use_cache, beams, heard):
    positions = modes(case)[0]
    model, recorder = case.model(), Recorder(wants=declared())
    patch(model, call(recorder), positions=positions)
    kind = {"max_new_tokens": 3, "do_sample": False, "use_cache": use_cache, "num_beams": beams}
    found = model.generate(**case.inputs(ROWS), **kind)[:, -3:]
    assert heard.count(("heads", 0)) == 1
    assert len(recorder.seen) == 2 * len(zoo.images(ROWS))
    truth = expected(case, ROWS, positions)
    check(recorder, truth, (1, 3))
    if beams == 1:
        assert torch.equal(found, truth.truth.decode(3)[0])
    else:
        assert torch.equal(found, truth.truth.beams(3, beams)[0][:, 0])


@zoo.BOTH_FAMILIES
def test_a_static_cache(case):
    positions = modes(case)[-1]
    model, recorder = case.model(), Recorder(wants=declared())
    patch(model, call(recorder), positions=positions)
    static = {"cache_implementation": "static", "max_new_tokens": 2, "do_sample": False}
    model.generate(**case.inputs(ROWS), **static)
    check(recorder, expected(case, ROWS, positions), (1, 3))


@zoo.ALL
def test_batch_mates_change_no_signal(case):
    together = Recorder(wants=declared())
    run(case, "sdpa", ROWS, together)
    alone = Recorder(wants=declared())
    for row in ROWS:
        if zoo.images([row]):
            run(case, "sdpa", (row,), alone)
    for layer in (1, 3):
        for one, other in zip(together.of(layer), alone.of(layer), strict=True):
            assert torch.equal(one.tokens.alive, other.tokens.alive)
            assert set(one.tokens.signals) == set(other.tokens.signals)
            for want, value in one.tokens.signals.items():
                other_value = other.tokens.signals[want]
                torch.testing.assert_close(value, other_value, atol=2e-5, rtol=1e-4)


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("kind", ["half", "autocast", "train"])
def test_signals_are_float32_and_outside_the_graph(case, kind):
    model, recorder = case.model(), Recorder(wants=declared())
    model = model.to(torch.bfloat16) if kind == "half" else model.requires_grad_(kind == "train")
    patch(model, call(recorder))
    inputs = case.inputs(ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        model(**inputs)
    assert recorder.seen
    for seen in recorder.seen:
        for want, value in seen.tokens.signals.items():
            dtype = model.dtype if isinstance(want, Hidden) else torch.float32
            assert value.dtype == dtype, want
            assert not value.requires_grad, want


# --- Keys that are projected ahead -------------------------------------------------------------


def projections(model) -> list[list[int]]:
    """Per layer, the tokens of every call of its key projection; noted from now on."""
    lengths: list[list[int]] = []
    for layer in model.base_model.language_model.layers:
        project, noted = layer.self_attn.k_proj, []

        def count(given, forward=project.forward, noted=noted):
            noted.append(given.shape[1])
            return forward(given)

        project.__dict__["forward"] = count
        lengths.append(noted)
    return lengths


def longest(truth: Truth) -> list[int]:
    """Tokens of the longest row that enter each layer."""
    lengths = [truth.layer_lengths(row) for row in range(len(truth.rows))]
    return [max(of_layer) for of_layer in zip(*lengths, strict=True)]


@zoo.ALL
def test_keys_made_ahead_are_used_again(case, monkeypatch):
    truth = expected(case, ROWS).truth
    entered = longest(truth)
    whole = longest(expected(case, ROWS, cuts=()).truth)[0]
    # The layers that are cut project the keys of their uncut input, and nothing else.
    once = [[whole], [whole], [entered[1]], [entered[2]]]
    again = [[whole], [whole, entered[1]], [entered[1]], [entered[2], entered[3]]]
    inputs, logits = case.inputs(ROWS), []
    ahead = tuple(TextAttention(layer, rows, ahead=True) for layer in (1, 3) for rows in RULES)
    for wants, expected_lengths in (
        (ahead, once),
        ((), [[n] for n in entered]),
        (ahead, again),
    ):
        if expected_lengths is again:
            monkeypatch.setattr(Prefill, "keys_of", lambda *args: None)
        model, recorder = case.model(), Recorder(wants=wants)
        lengths = projections(model)
        patch(model, call(recorder), positions="original")
        with torch.no_grad():
            out = model(**inputs)
        assert lengths == expected_lengths
        logits.append(out.logits)
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other, atol=1e-5, rtol=1e-5)


@zoo.BOTH_FAMILIES
def test_keys_made_ahead_while_decoding_and_training(case, monkeypatch):
    model = case.model()
    lengths = projections(model)
    ahead = tuple(TextAttention(layer, ahead=True) for layer in (1, 3))
    patch(model, call(Recorder(wants=ahead)))
    model.generate(**case.inputs(ROWS), max_new_tokens=3, do_sample=False)
    assert [of_layer[1:] for of_layer in lengths] == [[1, 1]] * DEPTH
    gradients = []
    for again in (True, False):
        if not again:
            monkeypatch.setattr(Prefill, "keys_of", lambda *args: None)
        model = case.model().requires_grad_(True)
        patch(model, call(Recorder(wants=ahead)))
        model(**case.inputs(ROWS)).logits.square().mean().backward()
        layers = model.base_model.language_model.layers
        gradients.append([layer.self_attn.k_proj.weight.grad for layer in layers])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 1e-6
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


# --- Cuts that pool images ---------------------------------------------------------------------

POOLED = (
    Cut(Place.DECODER, 1, 2.0, "context"),
    Cut(Place.DECODER, 2, 1.0, "context"),
    Cut(Place.DECODER, 3, 1.0, "query"),
)
POOLING: tuple[zoo.Row, ...] = (THREE, (4, "B", 2), NO_TEXT_BEHIND, zoo.NONE)


def poolable(layers: Sequence[int] = LAYERS) -> tuple[Signal, ...]:
    """Signals whose shape does not depend on the text behind each image."""
    return tuple(
        want
        for want in declared(layers)
        if not isinstance(want, RotaryAffinity)
        and not (isinstance(want, TextAttention) and want.each)
    )


@functools.cache
def pooled_truth(case, rows, positions) -> tuple[Expected, dict[tuple[int, int], Tensor]]:
    """The reference, and what is chosen of each pool at (layer, row)."""
    totals, cuts = iter(case.counts(rows)), {cut.layer: [] for cut in POOLED}
    pools = {}
    for row, spec in enumerate(rows):
        alive = [torch.arange(next(totals)) for _ in zoo.images([spec])]
        keeps = [round(0.3 * len(one)) for one in alive]
        for cut in POOLED:
            among = range(len(alive) - 1) if cut.images == "context" else range(len(alive))[-1:]
            sizes = [len(alive[i]) for i in among]
            if sizes:
                keep = sum(min(round(keeps[i] * cut.share), keeps[i] * 2) for i in among)
                chosen = pools[cut.layer, row] = pick(cut.layer, sum(sizes), keep)
                start = 0
                for i, size in zip(among, sizes, strict=True):
                    own = chosen[(chosen >= start) & (chosen < start + size)] - start
                    alive[i] = alive[i][own]
                    start += size
            cuts[cut.layer] += alive
    truth = Expected(case, rows, tuple(cuts.items()), [positions] * len(cuts))
    return truth, pools


@zoo.ALL
@zoo.ATTENTION
def test_pooled_images(case, attention):
    positions = modes(case)[-1] if attention == "sdpa" else "original"
    recorder = Recorder(wants=poolable(), at=POOLED)
    handle = run(case, attention, POOLING, recorder, positions=positions)
    truth, pools = pooled_truth(case, POOLING, positions)
    tilings = case.tilings(POOLING)
    assert len(recorder.seen) == len(pools) == 2 * 2 + 3
    for ((layer, row), chosen), one in zip(sorted(pools.items()), recorder.seen, strict=True):
        spec, tokens = truth.truth.rows[row], one.tokens
        assert tokens.layer == layer and torch.equal(one.chosen, chosen)
        among = slice(-1, None) if layer == 3 else slice(-1)
        images = spec.images[among]
        before = truth.rows[row][layer].before.places
        alive = [torch.isin(image, before).nonzero()[:, 0] for image in images]
        assert torch.equal(tokens.alive, torch.cat(alive))
        assert tokens.num_tokens == len(tokens.alive)
        blocks = [block for number in spec.numbers[among] for block in tilings[number].blocks]
        assert list(tokens.tiling.blocks) == blocks
        assert set(tokens.signals) == ran(recorder.wants, (1, 2, 3), layer)
        for want, value in tokens.signals.items():
            parts = [
                truth.signal(want, row, image, image[own])
                for image, own in zip(images, alive, strict=True)
            ]
            wanted = torch.cat(parts) if want.per == "token" else parts[0]
            torch.testing.assert_close(value, wanted, **CLOSE)
    for stage, (layer, kept) in zip(handle.last.stages, truth.truth.cuts, strict=True):
        assert stage.layer == layer
        assert all(torch.equal(a, b) for a, b in zip(stage.kept, kept, strict=True))
    split = [sum(len(kept[i]) for i in (0, 1)) for _, kept in truth.truth.cuts]
    assert split[0] > split[1] == split[2], "the first two images of the first prompt are pooled"


@dataclass(frozen=True, kw_only=True)
class Greedy(Recorder):
    """Keeps the first tokens of a pool; the adaptive cut leaves every other image nothing."""

    def select(self, tokens, keep):
        self.seen.append(Seen(tokens, torch.arange(keep)))
        return Selection(kept=torch.arange(keep))

    def select_adaptive(self, tokens):
        return self.select(tokens, 3 * (len(self.of(tokens.layer)) % 2))


@zoo.BOTH_FAMILIES
def test_what_an_earlier_cut_left_bounds_later_ones(case):
    """A pool may be taken from one image, an adaptive cut may leave nothing."""
    counts = case.counts(POOLING)
    for at in (
        (Cut(Place.DECODER, 1, 2.0, "context"), Cut(Place.DECODER, 3)),
        (Cut(Place.DECODER, 1, adaptive=True), Cut(Place.DECODER, 2, 1.5), Cut(Place.DECODER, 3)),
    ):
        recorder = Greedy(wants=poolable(), at=at)
        last = run(case, "sdpa", POOLING, recorder).last
        keeps = [round(0.3 * n) for n in counts]
        if at[0].adaptive:
            assert [len(kept) for kept in last.kept] == [0, 3, 0, 3, 0, 3]
            assert len(recorder.seen) == len(counts), "what is left is no choice any more"
        else:
            pool = 2 * (keeps[0] + keeps[1])
            left = [min(counts[0], pool), max(0, pool - counts[0])]
            assert [len(kept) for kept in last.stages[0].kept[:2]] == left
            assert [len(kept) for kept in last.kept[:2]] == list(map(min, keeps, left))
        for seen in recorder.seen:
            assert all(value.isfinite().all() for value in seen.tokens.signals.values())


# --- Rows that are merged ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Merging(Recorder):
    """At its first cut the tokens that go become one row, their mean."""

    name: ClassVar[str] = "merging"

    def select(self, tokens, keep):
        if tokens.layer > self.at[0].layer:
            return super().select(tokens, keep)
        chosen = pick(tokens.layer, tokens.num_tokens, keep - 1)
        gone = torch.ones(tokens.num_tokens, dtype=torch.bool)
        gone[chosen] = False
        gone = gone.nonzero()[:, 0]
        self.seen.append(Seen(tokens, chosen))
        return Selection(
            kept=chosen,
            order=torch.cat([chosen, torch.tensor([-1])]),
            features=tokens.signals[Hidden(tokens.layer)][gone].mean(0, keepdim=True),
            rows=torch.tensor([keep - 1]),
            projected=True,
            groups=torch.stack([torch.full_like(gone, keep - 1), gone]),
        )


@zoo.ALL
def test_behind_a_merge(case):
    """Signals of earlier layers are gone, as no one describes the merged row."""
    positions = modes(case)[-1]
    recorder = Merging(wants=declared())
    run(case, "sdpa", ROWS, recorder, positions=positions)
    merged, kept = [], []
    for total in case.counts(ROWS):
        last = round(0.3 * total)
        chosen = pick(1, total, 2 * last - 1)
        rest = torch.tensor(sorted(set(range(total)) - set(chosen.tolist())))
        members = [*chosen[:, None], rest]
        merged.append(OracleRows(torch.cat([chosen, torch.tensor([-1])]), members=members))
        slots = merged[-1].slots(total)
        kept.append(slots[pick(3, len(slots), last)])
    truth = Expected(case, ROWS, ((1, merged), (3, kept)), [positions] * 2)
    wanted = {want for want in ran(recorder.wants, (1, 3), 3) if want.layer > 0}
    wanted -= {want for want in wanted if want.layer == 1 and before_a_cut(want)}
    for (row, place), one, rows in zip(truth.image_rows, recorder.of(3), merged, strict=True):
        image = truth.truth.rows[row].images[place]
        slots = image[rows.slots(len(image))]
        assert torch.equal(one.tokens.alive, rows.order)
        assert set(one.tokens.signals) == wanted
        for want, value in one.tokens.signals.items():
            torch.testing.assert_close(value, truth.signal(want, row, image, slots), **CLOSE)


# --- Entries of the cache ----------------------------------------------------------------------


def check_entries(model, recorder: CacheRecorder, truth: Expected, keep: float) -> None:
    """Layer by layer, the prompts that have more than the method is to keep of them."""
    seen, wants = iter(recorder.seen), recorder.needs(None)
    for layer in LAYERS:
        module = model.base_model.language_model.layers[layer].self_attn
        for row, spec in enumerate(truth.truth.rows):
            here, start = truth.rows[row][layer], truth.prefix[row]
            text = len(spec.ids) - sum(map(len, spec.images)) - start
            left = text + sum(max(1, round(keep * len(image))) for image in spec.images)
            new = here.places >= start
            if not spec.images or left >= int(new.sum()):
                continue
            entries = next(seen)
            assert entries.layer == layer and entries.attention is module
            assert torch.equal(entries.visual, zoo.is_visual(spec.ids[here.places[new]]))
            found = (entries.keys, entries.values, entries.queries)
            for value, wanted in zip(found, (here.keys, here.values, here.queries), strict=True):
                torch.testing.assert_close(value, wanted[:, new], **CLOSE)
            torch.testing.assert_close(entries.hidden, here.attention[0][new], **CLOSE)
            for value, wanted in zip(entries.rotary, here.tables, strict=True):
                torch.testing.assert_close(value, wanted[new], **CLOSE)
            signal = ReceivedInLayer(layer)
            assert set(entries.signals) == {signal} & set(wants)
            if entries.signals:
                received = here.maps.mean(0).sum(0)[new]
                torch.testing.assert_close(entries.signals[signal], received, **CLOSE)
    assert next(seen, None) is None


CACHED = (*ROWS, (30, "C", 2))


@zoo.ALL
@zoo.ATTENTION
def test_entries_of_a_padded_batch(case, attention):
    truth, recorder = expected(case, CACHED, cuts=()), CacheRecorder()
    model = case.model(attention)
    patch(model, calls_of([recorder]))
    in_two_calls(model, case, truth.truth, CACHED, None)
    check_entries(model, recorder, truth, 0.3)


@zoo.ALL
def test_entries_behind_cuts(case):
    positions = modes(case)[-1]
    truth = expected(case, CACHED, positions, True)
    model = case.model("sdpa")
    recorder = CacheRecorder(wants=(ReceivedInLayer(0), ReceivedInLayer(3)))
    patch(
        model,
        [*calls_of([First(), Recorder(wants=declared())]), call(recorder, 0.2)],
        positions=positions,
    )
    in_two_calls(model, case, truth.truth, CACHED, None)
    assert {entries.layer for entries in recorder.seen} == set(LAYERS)
    check_entries(model, recorder, truth, 0.2)


@zoo.BOTH_FAMILIES
def test_cuts_do_not_see_what_a_method_on_the_cache_declares(case, heard):
    model, recorder, on_cache = case.model(), Recorder(wants=(Hidden(1),)), CacheRecorder()
    patch(model, [call(recorder), call(on_cache, 0.2)])
    with torch.no_grad():
        model(**case.inputs(ROWS))
    assert {layer for _, layer in heard} == {1}
    assert all(Hidden(1) in seen.tokens.signals for seen in recorder.seen)
    assert all(len(seen.tokens.signals) == 1 for seen in recorder.seen)
    assert all(entries.signals for entries in on_cache.seen)


@zoo.ALL
def test_entries_behind_a_cached_text_prefix(case):
    truth, recorder = expected(case, LONG, cuts=(), prefix=PREFIX), CacheRecorder()
    model = case.model("sdpa")
    patch(model, calls_of([recorder]))
    in_two_calls(model, case, truth.truth, LONG, PREFIX)
    check_entries(model, recorder, truth, 0.3)


def test_a_cache_method_is_told_which_signals_are_read_for_it():
    model, recorder = zoo.CASES["llava-clip-llama"].model(), CacheRecorder(wants=(Hidden(1),))
    with pytest.raises(MissingSignalError, match="only ReceivedInLayer is read: CacheEntries"):
        patch(model, call(recorder))


@zoo.BOTH_FAMILIES
def test_full_budgets_show_no_entries(case):
    model, recorder = case.model("sdpa"), CacheRecorder()
    patch(model, call(recorder, 1.0))
    with torch.no_grad():
        model(**case.inputs(ROWS))
    assert not recorder.seen
