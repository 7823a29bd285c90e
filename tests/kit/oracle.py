"""What a pruned model must compute, the slow and obvious way: no cache, no padding, one row.

Written against the unpatched model and `transformers` alone; no code of `vlmprune` is used. A
`Truth` is given the kept tokens of every image after every cut ("images" are images and videos). It
builds each row's embeddings by hand and runs the decoder on the tokens that are left:

* cuts before the LLM only: the language model is called directly on the shortened embeddings;
* cuts inside the decoder: layer by layer, with an explicit causal mask. Tokens may be merged there,
  and the sequence may be numbered anew at any cut.

Without a cache nothing is said about decoding: new tokens are part of the sequence from the start,
and a cut that numbers it anew numbers them too, so that they have a position of their own in every
group of layers.

Token choice after the last layer is by hand as well (greedy, sampling, beams).
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from kit.decoder_kinds import (
    HIDDEN,
    beyond,
    causal,
    head,
    kind_of,
    last_norm,
    observe,
    rotary,
    text_embeds,
    types_of,
    window_of,
)
from kit.family_facts import fact
from torch import Tensor
from vlmprune.eval.models.tiny_layouts import VISION_END

Model = TypeVar("Model", bound=torch.nn.Module)

_TILE = 9
"""Tokens of a tile, where all are alike."""


@dataclass(frozen=True)
class Rows:
    """What is left of one image after a cut, where it is more than a choice of rows in their order.

    Rows are numbered as they are alive just before the cut: before the LLM these are the image's
    tokens. `order` (K,) are such numbers, or -1 for a row that stands for none. `members`: of each
    new row, the rows that it is the mean of (none: it is its own row as it was). `embeds` (K, D)
    are the new rows themselves, instead of `members`.

    New row j takes the j-th slot: a slot is the place of a kept row, or of one of the first other
    rows, as many as there are new rows of no token. A row brings its position, and what is added to
    it behind the first layers, with it; one that stands for none takes those that its slot had.
    """

    order: Tensor
    embeds: Tensor | None = None
    members: Sequence[Tensor] | None = None

    def slots(self, alive: int) -> Tensor:
        """Which of the `alive` rows before the cut have the slots that are taken, ascending."""
        kept = set(self.order.tolist()) - {-1}
        others = [i for i in range(alive) if i not in kept]
        taken = sorted([*kept, *others[: len(self.order) - len(kept)]])
        return torch.tensor(taken, dtype=torch.long)

    def hidden(self, before: Tensor) -> Tensor:
        """The new rows (K, D), made of those before the cut (alive, D)."""
        if self.embeds is not None:
            return self.embeds
        rows = []
        for j, number in enumerate(self.order.tolist()):
            of = self.members[j] if self.members is not None else self.order[:0]
            assert len(of) or number >= 0, f"row {j} is no token, and nothing says what it is"
            rows.append(before[of].mean(0) if len(of) else before[number])
        return torch.stack(rows) if rows else before[:0]


Cuts = Sequence[tuple[int, Sequence[Tensor | Rows]]]
"""(layer, what is kept of each image in batch order) of every cut, ascending: layer `layer` is the
first that sees fewer tokens, 0 is before the LLM. A tensor holds numbers of the image's own tokens,
ascending; of slots where rows of the image were moved or merged at an earlier cut. It may be empty.
"""


@dataclass
class RowTruth:
    """One prompt of the batch, without padding: L tokens."""

    ids: Tensor
    embeds: Tensor  # (L, D), image features in place
    positions: Tensor  # (axes, L)
    next_position: int
    columns: Tensor  # (L,) columns of the batch's input behind the tokens
    deep: list[Tensor]  # (L, D) each: what is added behind the first layers (Qwen3-VL)
    beyond: dict[str, Tensor]  # (L, L) bool by kind of layer: what is seen besides keys before
    images: list[Tensor]  # places of the row's images
    numbers: list[int]  # which images of the batch they are


@dataclass
class State:
    """A row on its way through the decoder: n tokens are left, new ones (T) behind the prompt."""

    hidden: Tensor  # (n, D)
    positions: Tensor  # (axes, n)
    places: Tensor  # (n,) in the row, ascending; new tokens have L, L + 1, ...
    deep: list[Tensor]  # (n, D) each
    following: int  # position of the token behind the prompt
    words: Tensor  # (n,) ids, of visual tokens those of padding
    own: Tensor | None = None  # (n, layers, E): what each layer is given beside (Gemma 4)
    shared: dict = field(default_factory=dict)  # keys and values that last layers read


def projected(attention, name: str, x: Tensor) -> Tensor:
    """Queries ("q"), keys ("k") or values ("v") of the inputs x (n, D): (heads, n, D_head)."""
    heads = getattr(attention, f"{name}_proj")(x).view(len(x), -1, attention.head_dim)
    return getattr(attention, f"{name}_norm", lambda z: z)(heads).transpose(0, 1)


def turned(attention, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (heads, n, D_head) at their rotary positions as the attention's own file
    turns them: halves or neighbours, whole or in part; cos, sin (n, the part's width)."""
    turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    if next(iter(inspect.signature(turn).parameters)) == "x":  # Gemma 4's, one at a time
        return turn(heads[None], cos[None], sin[None])[0]
    return turn(heads[None], heads[None, :0], cos[None], sin[None])[0][0]


def plus(block, norm: str, hidden: Tensor, change: Tensor) -> Tensor:
    """What a module adds to the rows, behind the norm that some layers have there."""
    return hidden + getattr(block, norm, lambda z: z)(change)


def decoder_of(model):
    """The text model."""
    core = model.base_model
    return core.text_model if hasattr(core, "text_model") else core.language_model


def _between_marks(ids: Tensor, found: list[Tensor]) -> list[Tensor]:
    """The places (N,) of the visual tokens of each image of a prompt, of those of its tiles."""
    if not found:
        return []
    places = torch.cat(found)
    _, counts = (ids == VISION_END).cumsum(0)[places].unique_consecutive(return_counts=True)
    return list(places.split(counts.tolist()))


_SHARED: WeakKeyDictionary[torch.nn.Module, dict[bytes, list[RowTruth]]] = WeakKeyDictionary()
"""Rows by model and inputs, of models of which it was said that nobody changes them (`shared`)."""


def shared(model: Model) -> Model:
    """The same, having noted that nobody changes it: features of what it was given once are not
    computed again."""
    _SHARED.setdefault(model, {})
    return model


def _bytes(inputs: dict) -> bytes:
    """Tells inputs from others."""
    said = hashlib.sha1()
    for name, value in sorted(inputs.items()):
        said.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        said.update(value.contiguous().view(torch.uint8).numpy())
    return said.digest()


class Truth:
    """The pruned computation of a batch on an unpatched model.

    `positions`: of every cut, whether the sequence is numbered anew at it ("repacked": all that is
    alive behind it, new tokens too, has 0..n-1 from this layer on) or every token keeps the
    position that it comes with ("original"). A word alone is meant for cuts before the LLM, and
    those in the decoder leave positions as they are.
    """

    below: Sequence[bool] = ()
    """Of every cut, whether new tokens do not see what left there in the layers before it either.
    """

    weighs: Sequence[bool] = ()
    """Of every cut, whether log(size) is added to the logits of rows that are merged there."""

    def __init__(
        self,
        model,
        inputs: dict,
        cuts: Cuts = (),
        positions: str | Sequence[str] = "original",
        by_layer: bool | None = None,
    ) -> None:
        self.model = model
        self.core = model.base_model
        self.decoder = decoder_of(model)
        self.cuts = [
            (layer, [k if isinstance(k, Rows) else k.long() for k in kept]) for layer, kept in cuts
        ]
        if isinstance(positions, str):
            positions = [positions if layer == 0 else "original" for layer, _ in self.cuts]
        assert set(positions) <= {"original", "repacked"} and len(positions) == len(self.cuts)
        self.repacked = [word == "repacked" for word in positions]
        self.by_layer = any(layer > 0 for layer, _ in self.cuts) if by_layer is None else by_layer
        self.rows = self._known(inputs) if model in _SHARED else list(self._rows(inputs))
        if any(row.beyond for row in self.rows):
            self.by_layer = True  # the text model alone makes causal masks

    # --- the rows --------------------------------------------------------------------------

    def _known(self, inputs: dict) -> list[RowTruth]:
        """Copies, of which a test may write over what is its own."""
        known, key = _SHARED[self.model], _bytes(inputs)
        if key not in known:
            known[key] = list(self._rows(inputs))
        return [replace(row, deep=[level.clone() for level in row.deep]) for row in known[key]]

    @torch.no_grad()
    def _rows(self, inputs: dict):
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        grids = {kind: list(inputs.get(f"{kind}_grid_thw", ())) for kind in ("image", "video")}
        kinds = self.kinds(inputs)
        features = {
            1: self._features("image", "pixel_values", inputs),
            2: self._features("video", "pixel_values_videos", inputs),
        }
        number = 0
        for b in range(len(ids)):
            columns = mask[b].bool().nonzero()[:, 0]
            row_ids = ids[b, columns]
            embeds = text_embeds(self.model, row_ids)
            deep = [torch.zeros_like(embeds) for _ in self.deep_layers]
            found = []
            row_kinds = kinds[b, columns]
            for kind, waiting in features.items():
                places = (row_kinds == kind).nonzero()[:, 0].tolist()
                while places:
                    image, *deeper = waiting.pop(0)
                    here = torch.tensor(places[: len(image)])
                    del places[: len(image)]
                    embeds[here] = image
                    for target, rows in zip(deep, deeper, strict=True):
                        target[here] = rows
                    found.append(here)
            found.sort(key=lambda here: int(here[0]))
            if fact(self.model, "EACH_TILE"):  # a mark ends each image in these tests
                found = _between_marks(row_ids, found)
            numbers = list(range(number, number + len(found)))
            number += len(found)
            positions, following = self._positions(row_ids, row_kinds, grids)
            types = types_of(self.model, inputs)
            more = beyond(self.model, embeds, None if types is None else types[b, columns])
            yield RowTruth(
                row_ids, embeds, positions, following, columns, deep, more, found, numbers
            )

    def kinds(self, inputs: dict) -> Tensor:
        """1 where a token is an image's, 2 where it is a video's: (B, L)."""
        if "mm_token_type_ids" in inputs:
            return inputs["mm_token_type_ids"]
        config, ids = self.model.config, inputs["input_ids"]
        video = getattr(config, "video_token_id", None)
        kinds = (ids == config.image_token_id).int()
        return kinds if video is None else kinds + 2 * (ids == video).int()

    @property
    def deep_layers(self) -> Sequence[int]:
        """Layers of the encoder whose features are added behind the decoder's first layers."""
        return getattr(self.model.config.vision_config, "deepstack_visual_indexes", ())

    def _features(self, kind: str, pixels: str, inputs: dict) -> list[tuple[Tensor, ...]]:
        """Those of each image, or each video, in batch order: (N, D), and deeper ones."""
        if inputs.get(pixels) is None:
            return []
        if fact(self.model, "EACH_TILE"):
            names = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
            names = (*names, "spatial_shapes")
            output = self.model(**{name: inputs[name] for name in names if name in inputs})
            found = output.image_hidden_states  # of SmolVLM, all that the encoder returned
            found = getattr(found, "pooler_output", found)
            found = found if isinstance(found, Tensor) else torch.cat(list(found))
            shapes = inputs.get("spatial_shapes")  # of patches, four of which are a token
            sizes = _TILE if shapes is None else (shapes.prod(-1) // 4).tolist()
            return [(tile,) for tile in found.view(-1, found.shape[-1]).split(sizes)]
        encode = getattr(self.core, f"get_{kind}_features")
        given = {k: inputs[k] for k in inspect.signature(encode).parameters if k in inputs}
        output = encode(**given, return_dict=True)
        deeper = output.deepstack_features if len(self.deep_layers) else ()
        pooled = output.pooler_output
        if fact(self.model, "EACH_FRAME"):
            pooled = pooled.reshape(len(inputs[pixels]), -1, pooled.shape[-1])
        return list(zip(pooled, *deeper, strict=True))

    def _positions(self, ids: Tensor, kinds: Tensor, grids: dict[str, list[Tensor]]):
        """Positions of a whole row (axes, L), and that of the token after it; its grids are taken
        out of `grids`."""
        if not hasattr(self.core, "get_rope_index"):
            first = fact(self.model, "FIRST_POSITION", 0)
            return torch.arange(len(ids))[None] + first, len(ids) + first
        of_row = {}
        for number, (kind, waiting) in enumerate(grids.items(), start=1):
            left, taken = int((kinds == number).sum()), []
            while left:
                taken.append(waiting.pop(0))
                left -= int(taken[-1].prod()) // 4
            of_row[f"{kind}_grid_thw"] = torch.stack(taken) if taken else None
        index, delta = self.core.get_rope_index(ids[None], mm_token_type_ids=kinds[None], **of_row)
        return index[:, 0], len(ids) + int(delta)

    # --- which tokens are alive --------------------------------------------------------------

    def alive(self, row: int, after_layer: int | None = None) -> Tensor:
        """Which of the row's L places enter layer `after_layer` (default: the last): (L,) bool."""
        truth = self.rows[row]
        alive = torch.ones(len(truth.ids), dtype=torch.bool)
        for places, number in zip(truth.images, truth.numbers, strict=True):
            left = places
            for layer, kept in self.cuts:
                if after_layer is None or layer <= after_layer:
                    rows = kept[number]
                    left = left[rows.slots(len(left))] if isinstance(rows, Rows) else places[rows]
            alive[places] = False
            alive[left] = True
        return alive

    def layer_lengths(self, row: int) -> list[int]:
        """Tokens of the row that enter each layer."""
        return [int(self.alive(row, layer).sum()) for layer in range(len(self.decoder.layers))]

    def stored_lengths(self, row: int) -> list[int]:
        """Tokens of the row that each layer stores behind its prefill."""
        lengths = self.layer_lengths(row)
        for (layer, _), below in zip(self.cuts, self.below, strict=False):
            if below:
                lengths[:layer] = [lengths[layer]] * layer
        return lengths

    def start(self, row: int, new_ids: Sequence[int] = ()) -> State:
        """The whole row and `new_ids` behind it, before any cut."""
        truth = self.rows[row]
        new = torch.as_tensor(list(new_ids), dtype=torch.long)
        count = torch.arange(len(new))
        words = torch.cat([truth.ids, new])
        for image in truth.images:
            words[image] = self.model.config.get_text_config().pad_token_id or 0
        behind = (truth.next_position + count).expand(len(truth.positions), -1)
        return State(
            hidden=torch.cat([truth.embeds, self.model.get_input_embeddings()(new)]),
            positions=torch.cat([truth.positions, behind], 1),
            places=torch.arange(len(truth.ids) + len(new)),
            deep=[torch.nn.functional.pad(rows, (0, 0, 0, len(new))) for rows in truth.deep],
            following=truth.next_position,
            words=words,
        )

    def cut(self, row: int, layer: int, state: State) -> State:
        """What is left of the row where it enters `layer`."""
        for (at, kept), repacked in zip(self.cuts, self.repacked, strict=True):
            if at == layer:
                state = self._cut(row, kept, repacked, state)
        if layer == 0 and (looked_up := self._looked_up(state)) is not None:
            own = self.decoder.project_per_layer_inputs(state.hidden[None], looked_up)[0]
            state = replace(state, own=own)
        return state

    def _looked_up(self, state: State) -> Tensor | None:
        """The part of what each layer is given beside that comes of ids, (1, n, layers, E)."""
        if not getattr(self.decoder.config, "hidden_size_per_layer_input", 0):
            return None
        return self.decoder.get_per_layer_inputs(state.words[None], None)

    def beside(self, layer: int, state: State) -> dict:
        """Arguments of a layer that those of other models do not have."""
        forward = inspect.signature(self.decoder.layers[layer].forward)
        if "shared_kv_states" not in forward.parameters:
            return {}
        own = None if state.own is None else state.own[None, :, layer]
        return {"per_layer_input": own, "shared_kv_states": state.shared}

    def _cut(self, row: int, kept: Sequence[Tensor | Rows], repacked: bool, state: State) -> State:
        truth = self.rows[row]
        hidden, positions = state.hidden.clone(), state.positions.clone()
        deep = [rows.clone() for rows in state.deep]
        own = None if state.own is None else state.own.clone()
        stays = torch.ones(len(state.places), dtype=torch.bool)
        for places, number in zip(truth.images, truth.numbers, strict=True):
            rows, here = kept[number], torch.isin(state.places, places).nonzero()[:, 0]
            stays[here] = False
            if not isinstance(rows, Rows):
                slots = here[torch.isin(state.places[here], places[rows])]
                assert len(slots) == len(rows), "a token was kept that is gone"
                stays[slots] = True
                continue
            slots = here[rows.slots(len(here))]
            assert len(slots) == len(rows.order), "more rows than there were"
            stays[slots] = True
            source = torch.where(rows.order >= 0, here[rows.order.clamp_min(0)], slots)
            hidden[slots] = rows.hidden(state.hidden[here])
            positions[:, slots] = state.positions[:, source]
            for target, before in zip([*deep, own], [*state.deep, state.own], strict=True):
                if target is not None:
                    target[slots] = before[source]
        positions, places = positions[:, stays], state.places[stays]
        following = state.following
        if repacked:
            first = int(truth.positions[0, 0])
            positions = first + torch.arange(len(places)).expand(len(positions), -1)
            following = first + int((places < len(truth.ids)).sum())
        deep = [rows[stays] for rows in deep]
        own = None if own is None else own[stays]
        words = state.words[stays]
        return State(hidden[stays], positions, places, deep, following, words, own, state.shared)

    def cut_inputs(self, row: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """After the cuts at layer 0: the row's embeddings (1, L', D), positions (axes, 1, L') and
        what is added behind the first layers (1, L', D)."""
        state = self.cut(row, 0, self.start(row))
        return state.hidden[None], state.positions[:, None], [rows[None] for rows in state.deep]

    # --- one forward -----------------------------------------------------------------------

    def forward(self, row: int, new_ids: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Logits of all tokens alive after the last cut and of `new_ids`: (L' + T, V); and their
        places in the row (L' + T,)."""
        state = self.start(row, new_ids)
        if self.by_layer:
            hidden, places = self._layers(row, state)
        else:
            hidden, places = self._language_model(row, self.cut(row, 0, state))
        return head(self.model, hidden), places

    def _language_model(self, row: int, state: State) -> tuple[Tensor, Tensor]:
        visual = torch.zeros_like(state.places, dtype=torch.bool)
        for image in self.rows[row].images:
            visual |= torch.isin(state.places, image)
        deeper = {}
        if state.deep:
            added = [rows[visual] for rows in state.deep]
            deeper = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": added}
        axes = state.positions[:, None]
        if (looked_up := self._looked_up(state)) is not None:
            deeper = {"per_layer_inputs": looked_up}
        output = self.decoder(
            **deeper,
            inputs_embeds=state.hidden[None],
            position_ids=axes if len(axes) > 1 else axes[0],
            attention_mask=torch.ones(1, len(visual), dtype=torch.long),
            use_cache=False,
        )
        return output.last_hidden_state[0], state.places

    def rotary(self, state: State, layer: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines that a layer has of the tokens' positions: (1, n, D_head)."""
        unturned = fact(self.model, "UNTURNED")
        return rotary(self.decoder, state.hidden, state.positions, layer, unturned)

    def mask(self, row: int, places: Tensor, layer: int) -> Tensor:
        """What is added to a layer's scores of the tokens at these places: (n, n)."""
        config, more = self.decoder.config, self.rows[row].beyond
        seen = causal(len(places), window_of(config, layer))
        if (pairs := more.get(kind_of(config, layer))) is not None:
            prompt = int((places < len(pairs)).sum())
            old = places[:prompt]
            seen[:prompt, :prompt] |= pairs[old][:, old]
        for (at, _), below in zip(self.cuts, self.below, strict=False):
            if below and layer < at:
                alive = self.alive(row, at)
                old = places < len(alive)
                gone = old & ~alive[places.clamp_max(len(alive) - 1)]
                seen &= old[:, None] | ~gone
        logs = self._logs(row, layer)
        added = torch.cat([logs, logs.new_zeros(1)])[places.clamp_max(len(logs))]
        return added.expand(seen.shape).masked_fill(~seen, HIDDEN)

    def _logs(self, row: int, layer: int) -> Tensor:
        """What is added to the logits of the row's L places in a layer."""
        truth = self.rows[row]
        logs = torch.zeros(len(truth.ids))
        for (at, kept), weighs in zip(self.cuts, self.weighs, strict=False):
            for places, number in zip(truth.images, truth.numbers, strict=True):
                if weighs and at <= layer and isinstance(rows := kept[number], Rows):
                    before = places[self.alive(row, at - 1)[places]]
                    sizes = [max(1, len(of)) for of in rows.members or rows.order]
                    logs[before[rows.slots(len(before))]] = torch.tensor(sizes).float().log()
        return logs

    def layer_inputs(self, row: int, state: State):
        """Number, module, state, rotary tables (n, D_head) and mask of each layer of the decoder;
        who goes through them writes the layer's output to `state.hidden`."""
        for number, layer in enumerate(self.decoder.layers):
            state = self.cut(row, number, state)
            if number == 0:  # Granite scales what it is given
                scale = getattr(self.decoder.config, "embedding_multiplier", 1.0)
                state.hidden = state.hidden * scale
            tables, mask = self.rotary(state, number), self.mask(row, state.places, number)
            yield number, layer, state, tables, mask
            if number < len(state.deep):
                state.hidden = state.hidden + state.deep[number]

    def _layers(self, row: int, state: State) -> tuple[Tensor, Tensor]:
        """The decoder's layers by hand, and its norm."""
        for number, _, here, tables, mask in self.layer_inputs(row, state):
            here.hidden, state = self._layer(number, here, tables, mask), here
        return last_norm(self.decoder)(state.hidden), state.places

    def _layer(self, number: int, state: State, tables, mask: Tensor | None) -> Tensor:
        layer, hidden = self.decoder.layers[number], state.hidden[None]
        mask = mask[None, None] if hasattr(layer, "self_attn") else None  # one that keeps a state
        given = {"attention_mask": mask, "position_embeddings": tables}
        return layer(hidden, **given, **self.beside(number, state))[0]

    @torch.no_grad()
    def last_row(self, row: int, layer: int) -> list[Tensor]:
        """Attention of the prompt's last token in `layer` to the tokens of each image of the row
        that enter it: softmax over all keys, mean over heads. Computed from q and k by hand."""
        block = self.decoder.layers[layer]
        for number, _, state, tables, mask in self.layer_inputs(row, self.start(row)):
            if number == layer:
                break
            state.hidden = self._layer(number, state, tables, mask)
        if fact(self.model, "BY_MODULES"):
            tables = tuple(table[0] for table in tables)
            mean = observe(block, state.hidden, tables, mask).maps.mean(0)[-1]
            return [mean[torch.isin(state.places, image)] for image in self.rows[row].images]
        attention, x = block.self_attn, block.input_layernorm(state.hidden)
        cos, sin = (table[0] for table in tables)
        query = turned(attention, projected(attention, "q", x), cos, sin)
        key = turned(attention, projected(attention, "k", x), cos, sin)
        key = key.repeat_interleave(len(query) // len(key), 0)
        scores = (query[:, -1:] @ key.transpose(1, 2))[:, 0] * attention.scaling
        mean = scores.softmax(-1).mean(0)
        return [mean[torch.isin(state.places, image)] for image in self.rows[row].images]

    # --- what users see --------------------------------------------------------------------

    def next_logits(self, row: int, new_ids: Sequence[int] = ()) -> Tensor:
        """Logits after the prompt and after each of `new_ids`: (1 + T, V)."""
        logits, _ = self.forward(row, new_ids)
        return logits[len(logits) - len(new_ids) - 1 :]

    def full_logits(self, row: int) -> Tensor:
        """Logits at the row's L tokens; a dropped one has those of the last kept before it."""
        logits, places = self.forward(row)
        last = torch.searchsorted(places, torch.arange(len(self.rows[row].ids)), right=True) - 1
        assert last.min() >= 0, "the prompts of these tests start with text"
        return logits[last]

    def loss(self, row_labels: Sequence[Tensor]) -> Tensor:
        """Mean cross entropy of the shortened rows; labels as given by the caller (B, L)."""
        losses = []
        for row, labels in enumerate(row_labels):
            logits, places = self.forward(row)
            target = labels[self.rows[row].columns][places][1:]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], target, reduction="none"))
            losses[-1] = losses[-1][target != -100]
        return torch.cat(losses).mean()

    def decode(
        self,
        steps: int,
        choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
        given: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Continue every row by `steps` tokens after the tokens `given` (B, T).

        Returns:
            new tokens (B, steps) and the logits they were chosen from (steps, B, V).
        """
        start = [[] for _ in self.rows] if given is None else given.tolist()
        new: list[list[int]] = [list(x) for x in start]
        chosen_from = []
        for _ in range(steps):
            logits = torch.stack([self.next_logits(b, x)[-1] for b, x in enumerate(new)])
            for x, token in zip(new, choose(logits).tolist(), strict=True):
                x.append(token)
            chosen_from.append(logits)
        tokens = [x[len(s) :] for x, s in zip(new, start, strict=True)]
        return torch.tensor(tokens), torch.stack(chosen_from)

    def sample(self, steps: int, seed: int, copies: int = 1) -> Tensor:
        """`copies` continuations of each row drawn from the plain softmax: (B * copies, steps)."""
        torch.manual_seed(seed)
        new: list[list[int]] = [[] for _ in range(len(self.rows) * copies)]
        for _ in range(steps):
            rows = [self.next_logits(i // copies, x)[-1] for i, x in enumerate(new)]
            drawn = torch.multinomial(torch.stack(rows).softmax(-1), 1)[:, 0]
            for x, token in zip(new, drawn.tolist(), strict=True):
                x.append(token)
        return torch.tensor(new)

    def beams(self, steps: int, width: int) -> tuple[Tensor, Tensor]:
        """Beam search without end token: the `width` best continuations of each row, best first
        (B, width, steps), and their mean log-probabilities (B, width)."""
        found, scores = [], []
        for row in range(len(self.rows)):
            beams = [([], 0.0)]
            for _ in range(steps):
                grown = []
                for tokens, score in beams:
                    logp = self.next_logits(row, tokens)[-1].log_softmax(-1)
                    top = logp.topk(width)
                    grown += [
                        ([*tokens, int(i)], score + float(p))
                        for p, i in zip(top.values, top.indices, strict=True)
                    ]
                beams = sorted(grown, key=lambda beam: -beam[1])[:width]
            found.append([tokens for tokens, _ in beams])
            scores.append([score / steps for _, score in beams])
        return torch.tensor(found), torch.tensor(scores)
