"""What a pruned model must compute, the slow and obvious way: no cache, no padding, one row.

Written against the unpatched model and `transformers` alone; nothing of `vlmprune` is used. A
`Truth` is given the kept tokens of every image after every cut ("images" are images and videos). It
builds each row's embeddings by hand and runs the decoder on the tokens that are left:

* cuts before the LLM only: the language model is called directly on the shortened embeddings;
* cuts inside the decoder: layer by layer, with an explicit causal mask.

Token choice after the last layer is by hand as well (greedy, sampling, beams).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What enters the LLM of one image, where it is more than a choice of tokens in their order.

    `order` (K,) are numbers of tokens, or -1 for a row that stands for none; `embeds` (K, D) are
    the rows, None those of the tokens. Row j takes the j-th slot: a slot is the place of a kept
    token, or of one of the first other tokens, as many as there are rows of no token.
    """

    order: Tensor
    embeds: Tensor | None = None

    def slots(self, num_tokens: int) -> Tensor:
        kept = set(self.order.tolist()) - {-1}
        others = [i for i in range(num_tokens) if i not in kept]
        return torch.tensor(sorted([*kept, *others[: len(self.order) - len(kept)]]))


Cuts = Sequence[tuple[int, Sequence[Tensor | Rows]]]
"""(layer, what is kept of each image in batch order) of every cut, ascending: layer `layer` is the
first that sees fewer tokens, 0 is before the LLM. A tensor holds numbers of the image's own tokens,
ascending; of slots where the image entered the LLM as `Rows`."""


@dataclass
class RowTruth:
    """One prompt of the batch, without padding: L tokens."""

    ids: Tensor
    embeds: Tensor  # (L, D), image features in place
    positions: Tensor  # (axes, L)
    next_position: int
    columns: Tensor  # (L,) columns of the batch's input behind the tokens
    deep: list[Tensor]  # (L, D) each: what is added behind the first layers (Qwen3-VL)
    images: list[Tensor]  # places of the row's images
    numbers: list[int]  # which images of the batch they are


class Truth:
    """The pruned computation of a batch on an unpatched model."""

    def __init__(
        self,
        model,
        inputs: dict,
        cuts: Cuts = (),
        positions: str = "original",
        by_layer: bool | None = None,
    ) -> None:
        self.model = model
        self.core = model.base_model
        self.decoder = self.core.language_model
        self.cuts = [
            (layer, [k if isinstance(k, Rows) else k.long() for k in kept]) for layer, kept in cuts
        ]
        self.repacked = positions == "repacked"
        self.by_layer = any(layer > 0 for layer, _ in self.cuts) if by_layer is None else by_layer
        self.rows = list(self._rows(inputs))

    # --- the rows --------------------------------------------------------------------------

    @torch.no_grad()
    def _rows(self, inputs: dict):
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        grids = {kind: list(inputs.get(f"{kind}_grid_thw", ())) for kind in ("image", "video")}
        config = self.model.config
        features = {config.image_token_id: self._features("image", "pixel_values", inputs)}
        if hasattr(config, "video_token_id"):
            videos = self._features("video", "pixel_values_videos", inputs)
            features[config.video_token_id] = videos

        number = 0
        for b in range(len(ids)):
            columns = mask[b].bool().nonzero()[:, 0]
            row_ids = ids[b, columns]
            embeds = self.model.get_input_embeddings()(row_ids).clone()
            deep = [torch.zeros_like(embeds) for _ in self.deep_layers]
            found = []
            for token, waiting in features.items():
                places = (row_ids == token).nonzero()[:, 0].tolist()
                while places:
                    image, *deeper = waiting.pop(0)
                    here = torch.tensor(places[: len(image)])
                    del places[: len(image)]
                    embeds[here] = image
                    for target, rows in zip(deep, deeper, strict=True):
                        target[here] = rows
                    found.append(here)
            found.sort(key=lambda here: int(here[0]))
            numbers = list(range(number, number + len(found)))
            number += len(found)
            positions, following = self._positions(row_ids, grids)
            yield RowTruth(row_ids, embeds, positions, following, columns, deep, found, numbers)

    @property
    def deep_layers(self) -> Sequence[int]:
        """Layers of the encoder whose features are added behind the decoder's first layers."""
        return getattr(self.model.config.vision_config, "deepstack_visual_indexes", ())

    def _features(self, kind: str, pixels: str, inputs: dict) -> list[tuple[Tensor, ...]]:
        """Those of each image, or each video, in batch order: (N, D), and deeper ones."""
        if inputs.get(pixels) is None:
            return []
        encode = getattr(self.core, f"get_{kind}_features")
        given = {k: inputs[k] for k in inspect.signature(encode).parameters if k in inputs}
        output = encode(**given, return_dict=True)
        deeper = output.deepstack_features if len(self.deep_layers) else ()
        return list(zip(output.pooler_output, *deeper, strict=True))

    def _positions(self, ids: Tensor, grids: dict[str, list[Tensor]]):
        """Positions of a whole row (axes, L), and that of the token after it; its grids are taken
        out of `grids`."""
        if not hasattr(self.core, "get_rope_index"):
            return torch.arange(len(ids))[None], len(ids)
        types, of_row = torch.zeros_like(ids).int(), {}
        for number, (kind, waiting) in enumerate(grids.items(), start=1):
            marks = ids == getattr(self.model.config, f"{kind}_token_id")
            types[marks] = number
            left, taken = int(marks.sum()), []
            while left:
                taken.append(waiting.pop(0))
                left -= int(taken[-1].prod()) // 4
            of_row[f"{kind}_grid_thw"] = torch.stack(taken) if taken else None
        index, delta = self.core.get_rope_index(ids[None], mm_token_type_ids=types[None], **of_row)
        return index[:, 0], len(ids) + int(delta)

    def slots(self, places: Tensor, kept: Tensor | Rows) -> Tensor:
        """The places, among those of one image, at which something is left."""
        return places[kept.slots(len(places)) if isinstance(kept, Rows) else kept]

    def alive(self, row: int, after_layer: int | None = None) -> Tensor:
        """Which of the row's L tokens enter layer `after_layer` (default: the last): (L,) bool."""
        truth = self.rows[row]
        alive = torch.ones(len(truth.ids), dtype=torch.bool)
        for layer, kept in self.cuts:
            if after_layer is not None and layer > after_layer:
                break
            for places, number in zip(truth.images, truth.numbers, strict=True):
                alive[places] = False
                alive[self.slots(places, kept[number])] = True
        return alive

    def layer_lengths(self, row: int) -> list[int]:
        """Tokens of the row that enter each layer."""
        return [int(self.alive(row, layer).sum()) for layer in range(len(self.decoder.layers))]

    def cut_inputs(self, row: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """After the cuts at layer 0: the row's embeddings (1, L', D), positions (axes, 1, L') and
        what is added behind the first layers (1, L', D)."""
        truth, alive = self.rows[row], self.alive(row, 0)
        embeds, positions = truth.embeds.clone(), truth.positions.clone()
        deep = [rows.clone() for rows in truth.deep]
        for layer, kept in self.cuts:
            for places, number in zip(truth.images, truth.numbers, strict=True):
                rows = kept[number]
                if layer == 0 and isinstance(rows, Rows):
                    here = self.slots(places, rows)
                    own = torch.where(rows.order >= 0, places[rows.order.clamp_min(0)], here)
                    embeds[here] = truth.embeds[own] if rows.embeds is None else rows.embeds
                    positions[:, here] = truth.positions[:, own]
                    for target, full in zip(deep, truth.deep, strict=True):
                        target[here] = full[own]
        positions = positions[:, alive]
        if self.repacked:
            positions = torch.arange(int(alive.sum())).expand(len(positions), -1)
        return embeds[None, alive], positions[:, None], [rows[None, alive] for rows in deep]

    # --- one forward -----------------------------------------------------------------------

    def forward(self, row: int, new_ids: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Logits of all tokens alive after the last cut and of `new_ids`: (L' + T, V); and their
        places in the row (L' + T,)."""
        truth = self.rows[row]
        embeds, positions, deep = self.cut_inputs(row)
        new = torch.as_tensor(list(new_ids), dtype=torch.long)
        start = embeds.shape[1] if self.repacked else truth.next_position
        following = (start + torch.arange(len(new))).expand(len(positions), 1, -1)
        embeds = torch.cat([embeds, self.model.get_input_embeddings()(new)[None]], 1)
        positions = torch.cat([positions, following], -1)
        places = self.alive(row, 0).nonzero()[:, 0]
        places = torch.cat([places, len(truth.ids) + torch.arange(len(new))])
        deep = [torch.nn.functional.pad(rows, (0, 0, 0, len(new))) for rows in deep]
        if self.by_layer:
            hidden, places = self._layers(row, embeds, positions, places, deep)
        else:
            visual = torch.zeros(1, len(places), dtype=torch.bool)
            for image in truth.images:
                visual |= torch.isin(places, image)
            deeper = {
                "visual_pos_masks": visual,
                "deepstack_visual_embeds": [rows[visual] for rows in deep],
            }
            hidden = self.decoder(
                **(deeper if deep else {}),
                inputs_embeds=embeds,
                position_ids=positions if len(positions) > 1 else positions[0],
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                use_cache=False,
            ).last_hidden_state
        return self.model.lm_head(hidden)[0], places

    def _layers(self, row, hidden, positions, places, deep, *, stop: int | None = None):
        """The decoder's layers by hand, dropping tokens where the cuts say; then its norm."""
        rotary = positions if len(positions) > 1 else positions[0]
        cos, sin = self.decoder.rotary_emb(hidden, rotary)
        length = len(self.rows[row].ids)
        window = getattr(self.decoder.config, "sliding_window", None)
        for number, layer in enumerate(self.decoder.layers):
            alive = self.alive(row, number)[places.clamp(max=length - 1)] | (places >= length)
            hidden, places = hidden[:, alive], places[alive]
            cos, sin = cos[:, alive], sin[:, alive]
            deep = [rows[:, alive] for rows in deep]
            if number == stop:
                return hidden, (cos, sin), places
            square = (hidden.shape[1], hidden.shape[1])
            mask = torch.full(square, torch.finfo(hidden.dtype).min)
            mask = (mask.triu(1) + mask.tril(-(window or square[0])))[None, None]
            hidden = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin))
            if number < len(deep):
                hidden = hidden + deep[number]
        return self.decoder.norm(hidden), places

    @torch.no_grad()
    def last_row(self, row: int, layer: int) -> list[Tensor]:
        """Attention of the prompt's last token in `layer` to the tokens of each image of the row
        that enter it: softmax over all keys, mean over heads. Computed from q and k by hand."""
        embeds, positions, deep = self.cut_inputs(row)
        places = self.alive(row, 0).nonzero()[:, 0]
        hidden, (cos, sin), places = self._layers(row, embeds, positions, places, deep, stop=layer)
        block = self.decoder.layers[layer]
        attention, x = block.self_attn, block.input_layernorm(hidden)[0]
        width = attention.head_dim

        def heads(name: str) -> Tensor:
            norm = getattr(attention, f"{name}_norm", lambda z: z)
            projected = getattr(attention, f"{name}_proj")(x).view(len(x), -1, width)
            z = norm(projected).transpose(0, 1)  # (heads, length, width)
            half = width // 2
            turned = torch.cat([-z[..., half:], z[..., :half]], -1)
            return z * cos + turned * sin

        query, key = heads("q"), heads("k")
        key = key.repeat_interleave(len(query) // len(key), 0)
        scores = (query[:, -1:] @ key.transpose(1, 2))[:, 0] / width**0.5
        mean = scores.softmax(-1).mean(0)
        return [mean[torch.isin(places, image)] for image in self.rows[row].images]

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
