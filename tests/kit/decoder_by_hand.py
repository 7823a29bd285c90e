"""A decoder written out by hand, and its signals as the contract says: one row, no padding, no
cache, whole attention maps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from kit import zoo
from kit.decoder_kinds import Observed, head, last_norm, observe
from kit.oracle import State, Truth, projected, shared, turned
from kit.recorders import CLOSE, FIRST, TWICE, Recorder, pick, ran
from torch import Tensor
from vlmprune.prune.contract import (
    Cut,
    GistAttention,
    Hidden,
    LayerKeys,
    LayerValues,
    MeanHidden,
    ModuleStep,
    Neurons,
    ReceivedInLayer,
    RotaryAffinity,
    RotaryMeans,
    Rows,
    Signal,
    TextAttention,
    TextHidden,
    TextKeys,
    TextValues,
)


@dataclass
class Ran:
    """One layer of one row."""

    before: State
    """What comes from the layer before, not yet cut."""
    ahead: Tensor
    """(H, n, n) its attention maps on the uncut input."""
    keys_ahead: Tensor
    """(H_kv, n, D_head) its keys there."""
    plain: tuple[Tensor, Tensor]
    """Queries and keys there that are not turned."""
    places: Tensor
    tables: tuple[Tensor, Tensor]
    angles: Tensor
    """(n, 2) `RotaryMeans`."""
    queries: Tensor
    keys: Tensor
    values: Tensor
    maps: Tensor
    attention: tuple[Tensor, Tensor]
    """Input and output of the module, (n, D) each."""
    mlp: tuple[Tensor, Tensor]
    neurons: Tensor | None

    def at(self, places: Tensor) -> Tensor:
        """Rows of the tokens at these places of the prompt, or of the last token before them."""
        return torch.searchsorted(self.places, places, right=True) - 1


class Expected:
    """Signals of a batch on an unpatched model.

    Args:
        prefix: of each row, how many tokens an earlier call stored.
    """

    def __init__(self, case, rows, cuts=(), positions="original", prefix=None) -> None:
        self.shape = case.shape
        self.truth = Truth(shared(case.reference("eager")), case.inputs(rows), cuts, positions)
        self.prefix = prefix or [0] * len(rows)
        self._asked: dict = {}
        with torch.no_grad():
            self.rows = [list(self._walk(row)) for row in range(len(rows))]
        self.image_rows = [
            (row, number)
            for row, spec in enumerate(self.truth.rows)
            for number in range(len(spec.images))
        ]

    def _walk(self, row: int):
        truth, state = self.truth, self.truth.start(row)
        for number, layer in enumerate(truth.decoder.layers):
            before = state
            if number == 0:  # what is gone before the LLM never comes
                before = truth.cut(row, 0, state)
            tables, mask = self._sees(row, number, before)
            beside = truth.beside(number, replace(before, shared=dict(before.shared)))
            _, *turned_ahead, ahead = self._attend(layer, before.hidden, tables, mask, beside)
            still = [torch.ones_like(tables[0]), torch.zeros_like(tables[1])]
            beside = truth.beside(number, replace(before, shared=dict(before.shared)))
            _, *plain, _ = self._attend(layer, before.hidden, still, mask, beside)
            state = truth.cut(row, number, state)
            tables, mask = self._sees(row, number, state)
            beside = truth.beside(number, state)
            here = self._layer(layer, state.hidden, tables, mask, beside)
            yield Ran(
                before=before,
                ahead=ahead,
                keys_ahead=turned_ahead[1],
                plain=(plain[0], plain[1]),
                places=state.places,
                tables=tuple(tables),
                angles=self._angles(state, number),
                queries=here.queries,
                keys=here.keys,
                values=here.values,
                maps=here.maps,
                attention=here.attention,
                mlp=here.mlp,
                neurons=here.neurons,
            )
            hidden = here.output
            if number < len(state.deep):
                hidden = hidden + state.deep[number]
            state = replace(state, hidden=hidden)
        logits = head(truth.model, last_norm(truth.decoder)(state.hidden))
        torch.testing.assert_close(logits, truth.forward(row)[0], atol=1e-3, rtol=1e-3)

    def _sees(self, row: int, layer: int, state: State):
        """Rotary tables and mask of a layer."""
        tables = [table[0] for table in self.truth.rotary(state, layer)]
        return tables, self.truth.mask(row, state.places, layer)

    def _angles(self, state: State, layer: int) -> Tensor:
        """Mean cosine and sine of each token where one axis at a time is that of all: (n, 2)."""
        found = []
        for axis in state.positions:
            one = replace(state, positions=axis.expand_as(state.positions))
            tables = self.truth.rotary(one, layer)
            found.append(torch.stack([table[0].mean(-1) for table in tables], -1))
        return torch.stack(found).mean(0)

    def _layer(self, layer, hidden: Tensor, tables, mask: Tensor, beside: dict) -> Observed:
        """A layer that is Llama's by hand, another as its modules run."""
        if not like_llama(layer):
            return observe(layer, hidden, tables, mask, **beside)
        x, queries, keys, maps = self._attend(layer, hidden, tables, mask, beside)
        values = projected_values(layer.self_attn, x)
        mixed = maps @ values.repeat_interleave(len(maps) // len(values), 0)
        added = layer.self_attn.o_proj(mixed.transpose(0, 1).flatten(1))
        hidden = hidden + added
        y = layer.post_attention_layernorm(hidden)
        neurons = layer.mlp.act_fn(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y)
        change = layer.mlp.down_proj(neurons)
        output = hidden + change
        return Observed(queries, keys, values, maps, (x, added), (y, change), neurons, output)

    def _attend(self, layer, hidden: Tensor, tables, mask: Tensor, beside: dict):
        if not like_llama(layer):
            here = observe(layer, hidden, tables, mask, **beside)
            return here.attention[0], here.queries, here.keys, here.maps
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        queries, keys = (turned(attention, projected(attention, name, x), *tables) for name in "qk")
        shared = keys.repeat_interleave(len(queries) // len(keys), 0)
        scores = queries @ shared.mT / queries.shape[-1] ** 0.5
        return x, queries, keys, (scores + mask).softmax(-1)

    # --- signals ---------------------------------------------------------------------------

    def asked(self, row: int, image: Tensor, rows: Rows) -> Tensor:
        """Places of the text rows."""
        key = row, int(image[0]), rows
        if key not in self._asked:
            self._asked[key] = self._asked_of(row, image, rows)
        return self._asked[key]

    def _asked_of(self, row: int, image: Tensor, rows: Rows) -> Tensor:
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
            case TextAttention(layer, rows, ahead, each, heads):
                maps, at, places = here.maps, here.at, here.places
                if ahead:
                    places = here.before.places
                    maps = here.ahead

                    def at(wanted):
                        return torch.searchsorted(places, wanted, right=True) - 1

                own = image[torch.isin(image, places)]
                asked = own if rows == "image" else self.asked(row, image, rows)
                found = maps[:, at(asked)][..., at(alive)]
                if each:
                    return found.permute(2, 0, 1)
                return found.mean((0, 1)) if heads == "mean" else found.amax(0).mean(0)
            case RotaryAffinity(layer, rows):
                width = here.tables[0].shape[-1]
                cos, sin = here.tables
                products = cos @ cos.T + sin @ sin.T
                asked = here.at(self.asked(row, image, rows))
                return (products / width**0.5)[here.at(alive)][:, asked]
            case ReceivedInLayer():
                return here.maps.mean(0).sum(0)[here.at(alive)]
            case Hidden(layer, normed):
                found = here.before.hidden[torch.isin(here.before.places, alive)]
                return last_norm(self.truth.decoder)(found) if normed else found
            case TextHidden(layer, normed):
                asked, places = self.asked(row, image, "text"), here.before.places
                found = here.before.hidden[torch.searchsorted(places, asked, right=True) - 1]
                return last_norm(self.truth.decoder)(found) if normed else found
            case LayerKeys(layer, ahead=True):
                places = here.before.places
                at = torch.searchsorted(places, alive, right=True) - 1
                return here.keys_ahead[:, at].transpose(0, 1)
            case GistAttention():
                places = here.before.places
                part = (places <= image[-1]) & (places >= self.prefix[row])
                query, key = (heads[:, part] for heads in here.plain)
                key = key.repeat_interleave(len(query) // len(key), 0)
                logits = (query.mean(1, keepdim=True) @ key.mT)[:, 0]
                scale = self.truth.decoder.layers[want.layer].self_attn.scaling
                found = (logits * scale).softmax(-1).mean(0)
                return found[torch.isin(places[part], alive)]
            case LayerKeys():
                return here.keys[:, here.at(alive)].transpose(0, 1)
            case TextKeys():
                return here.keys[:, here.at(self.asked(row, image, "text"))].transpose(0, 1)
            case LayerValues():
                return here.values[:, here.at(alive)].transpose(0, 1)
            case TextValues(layer, part):
                places = self.asked(row, image, "text")
                if part == "all":
                    places = (~zoo.is_visual(spec.ids)).nonzero()[:, 0]
                    places = places[places >= self.prefix[row]]
                return here.values[:, here.at(places)].transpose(0, 1)
            case RotaryMeans():
                return here.angles[here.at(alive)]
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


def like_llama(layer) -> bool:
    """Whether a layer adds two modules, each behind a norm, and turns queries and keys."""
    names = {name for name, _ in layer.named_children()}
    norms = {"input_layernorm", "post_attention_layernorm"}
    return (
        names == {"self_attn", "mlp", *norms}
        and hasattr(layer.mlp, "down_proj")
        and layer.self_attn.q_proj.out_features == layer.self_attn.o_proj.in_features  # no gates
    )


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
            there = [want for want in recorder.wants if not truth.shape.lacks(want)]
            assert set(tokens.signals) == ran(there, cuts, cut)
            before = truth.rows[row][cut].before.places
            alive = image[torch.isin(image, before)]
            assert torch.equal(image[tokens.alive], alive)
            for want, found in tokens.signals.items():
                assert found.dtype == torch.float32
                wanted = truth.signal(want, row, image, alive)
                if found.shape == wanted.shape and torch.allclose(found, wanted, **CLOSE):
                    continue  # which is told at once
                torch.testing.assert_close(
                    found, wanted, **CLOSE, msg=lambda m, w=want, r=row: f"{w} row {r}: {m}"
                )
