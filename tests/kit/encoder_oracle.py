"""What a vision encoder must compute whose rows leave between its blocks, the slow and obvious way.

A picture at a time, from the weights of the unpatched model: attention with explicit softmax, every
reduction as a dense matrix. Which reductions were made is taken from the patched run (`recorded`);
what was chosen is looked at by the methods' own tests. Which token of the prompt a patch is, is
found by looking for its features in what the unpatched model gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from einops import rearrange
from kit import zoo
from kit.oracle import Rows, Truth, shared
from torch import Tensor
from transformers.vision_utils import get_vision_window_index
from vlmprune.adapters.places.passage import Passage


@dataclass
class Made:
    """What was made in one pass: per cut and picture, a matrix (K, N) and where rows come from."""

    method: object
    cuts: list = field(default_factory=list)
    matrices: list[dict[int, Tensor]] = field(default_factory=list)
    members: list[dict[int, Tensor]] = field(default_factory=list)
    sources: list[dict[int, Tensor]] = field(default_factory=list)
    reductions: list[dict[int, object]] = field(default_factory=list)


@contextmanager
def recorded() -> Iterator[list[Made]]:
    """The passes of encoders within it, in order."""
    found: list[Made] = []
    passages: list[Passage] = []
    original = Passage.passed

    def passed(self: Passage) -> None:
        if self not in passages:
            passages.append(self)
            found.append(Made(self.method))
        made = found[passages.index(self)]
        made.cuts.append(self.cuts[len(made.cuts)])
        for kept in (made.matrices, made.members, made.sources, made.reductions):
            kept.append({})
        for group in self.groups:
            for at, picture in enumerate(group.pictures if group.made is not None else ()):
                matrix, member = dense(group.made, at, group.rows)
                made.matrices[-1][picture], made.members[-1][picture] = matrix, member
                made.sources[-1][picture] = group.made.source[at]
                made.reductions[-1][picture] = one_of(group.made, at)
        original(self)

    Passage.passed = passed
    try:
        yield found
    finally:
        Passage.passed = original


def dense(made, at: int, rows: int) -> tuple[Tensor, Tensor]:
    """One picture's reduction: W (K, N), and who went where (K, N) of ones and zeros."""
    count = made.source.shape[1]
    member = torch.zeros(count, rows)
    owner = made.owner
    for row in range(rows):
        if owner is None:
            continue
        if owner[at, row] >= 0:
            member[owner[at, row], row] = 1.0
    if owner is None:
        for new, row in enumerate(made.source[at].tolist()):
            member[new, row] = 1.0
    if made.matrix is not None:
        return made.matrix[at].clone(), member
    weights = torch.ones(rows) if made.weights is None else made.weights[at].float()
    matrix = member * weights
    return (matrix / matrix.sum(1, keepdim=True) if made.normal else matrix), member


def one_of(made, at: int):
    """The reduction of one picture of a batch, as a batch of one."""
    fields = ("source", "owner", "weights", "matrix")
    own = {name: getattr(made, name) for name in fields}
    return type(made)(
        **{name: None if value is None else value[at : at + 1] for name, value in own.items()},
        normal=made.normal,
    )


@dataclass
class Walk:
    """One picture's rows: of the encoder, behind its prefix."""

    rows: Tensor
    """(n, u, C)"""
    sizes: Tensor
    """(n,)"""
    member: Tensor
    """(N,) the row of each patch, -1 none."""
    place: Tensor
    """(n,) the patch that each row is, -1 none."""

    def reduce(self, made: Made, number: int, picture: int) -> bool:
        matrix = made.matrices[number].get(picture)
        if matrix is None:
            return False
        self.rows = torch.einsum("kn,nuc->kuc", matrix.to(self.rows), self.rows)
        self.note(made, number, picture)
        return True

    def note(self, made: Made, number: int, picture: int) -> None:
        member, source = made.members[number][picture], made.sources[number][picture]
        self.sizes = member @ self.sizes
        self.place = torch.tensor([-1 if s < 0 else int(self.place[s]) for s in source.tolist()])
        into = {int(row): new for new, row in member.nonzero().tolist()}
        self.member = torch.tensor([into.get(int(row), -1) for row in self.member])


def heads(x: Tensor, width: int) -> Tensor:
    return x.view(len(x), -1, width).transpose(0, 1)


def soft(query: Tensor, key: Tensor, scale: float, sizes: Tensor | None, see=None) -> Tensor:
    logits = query @ key.mT * scale
    if sizes is not None:
        logits = logits + sizes.log()
    return (logits if see is None else logits.masked_fill(~see, -torch.inf)).softmax(-1)


def padded(tower, pixels: Tensor, made: Made, depth: int) -> tuple[list[Walk], list[Tensor]]:
    """CLIP and SigLIP: a walk per picture, and its prefix rows (p, C)."""
    walks, fronts = [], []
    prefix = int(hasattr(tower.embeddings, "class_embedding"))
    proportional = made.cuts and made.method.proportional
    for picture, one in enumerate(pixels):
        x = tower.embeddings(one[None])
        x = getattr(tower, "pre_layrnorm", lambda y: y)(x)[0]
        count = len(x) - prefix
        everything = torch.arange(count)
        walk = Walk(x[prefix:, None], torch.ones(count), everything, everything)
        front, uncut = x[:prefix], None
        for number, layer in enumerate(tower.encoder.layers[:depth]):
            for n, cut in enumerate(made.cuts):
                if (cut.block, cut.at) == (number, "block"):
                    before = walk.rows
                    if walk.reduce(made, n, picture) and made.method.restores:
                        uncut = before, made.reductions[n][picture]
            attention = layer.self_attn
            own = torch.cat([front, walk.rows[:, 0]])
            normed = layer.layer_norm1(own)
            q, k, v = (
                heads(getattr(attention, f"{name}_proj")(normed), attention.head_dim)
                for name in "qkv"
            )
            sizes = torch.cat([torch.ones(prefix), walk.sizes]) if proportional else None
            weights = soft(q, k, attention.scale, sizes)
            here = [n for n, c in enumerate(made.cuts) if (c.block, c.at) == (number, "mlp")]
            fused = made.method.fused_values and here and picture in made.matrices[here[0]]
            if fused:  # rows averaged, columns summed, values of merged rows
                matrix = torch.block_diag(torch.eye(prefix), made.matrices[here[0]][picture])
                member = torch.block_diag(torch.eye(prefix), made.members[here[0]][picture])
                weights = matrix @ weights
                own = matrix @ own
                merged = heads(attention.v_proj(layer.layer_norm1(own)), attention.head_dim)
                stays = member.any(0)[:, None]  # padding leaves behind this attention
                v = (member.T @ merged).where(stays, v)
            mixed = attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
            own = own + mixed
            front, walk.rows = own[:prefix], own[prefix:, None]
            for n in here:
                if fused:
                    walk.note(made, n, picture)
                else:
                    walk.reduce(made, n, picture)
            own = torch.cat([front, walk.rows[:, 0]])
            own = own + layer.mlp(layer.layer_norm2(own))
            front, walk.rows = own[:prefix], own[prefix:, None]
        if uncut is not None:
            before, reduction = uncut
            back = made.method.restore(before[None, :, 0], walk.rows[None, :, 0], reduction)
            walk = Walk(back[0][:, None], torch.ones(count), everything, everything)
        walks.append(walk)
        fronts.append(front)
    return walks, fronts


def packed(tower, pixels: Tensor, grids: Tensor, made: Made) -> tuple[list[Walk], list[list]]:
    """Qwen's towers: a walk per frame, in the tower's own order of units, and what each deeper
    merger reads of it: (its member, rows)."""
    unit = tower.config.spatial_merge_size**2
    walks: list[Walk] = []
    deeper: list[list] = []
    side = tower.config.spatial_merge_size
    start = 0
    for grid in grids.tolist():
        frames, high, wide = grid
        size = frames * high * wide
        x = tower.patch_embed(pixels[start : start + size])
        start += size
        rows, columns = high // side, wide // side
        cells = [
            (side * r + a, side * c + b)
            for r in range(rows)
            for c in range(columns)
            for a in range(side)
            for b in range(side)
        ]
        positions = torch.tensor(cells * frames)
        if hasattr(tower, "post_conv_layernorm"):  # GLM
            sizes, lengths = torch.tensor([grid]), torch.tensor([size])
            x = tower.embeddings(tower.post_conv_layernorm(x), lengths, sizes, *positions.T)
        if hasattr(tower, "pos_embed"):
            from transformers.vision_utils import get_vision_interpolation_indices_and_weights

            index, weight = get_vision_interpolation_indices_and_weights(
                torch.tensor([grid]),
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=True,
                spatial_merge_size=side,
                kwargs={},
            )
            x = x + (tower.pos_embed(index) * weight[:, :, None]).sum(1)
        cos, sin = tower.rotary_pos_emb(x, positions)
        windows = torch.zeros(frames * rows * columns, dtype=torch.long)
        order = torch.arange(frames * rows * columns)
        if hasattr(tower, "window_size"):
            order, _ = get_vision_window_index(
                torch.tensor([grid]),
                spatial_merge_size=side,
                window_size=tower.window_size,
                patch_size=tower.patch_size,
            )
            width = tower.window_size // side // tower.patch_size
            windows = torch.tensor(
                [
                    (r // width) * 1000 + c // width
                    for _ in range(frames)
                    for r in range(rows)
                    for c in range(columns)
                ]
            )
        x, cos, sin = (y.unflatten(0, (-1, unit))[order] for y in (x, cos, sin))
        windows = windows[order]
        for own, c, s, w in zip(*(y.chunk(frames) for y in (x, cos, sin, windows)), strict=True):
            walk, deep = _frame(tower, own, c, s, w, made, len(walks))
            walks.append(walk)
            deeper.append(deep)
    return walks, deeper


def _frame(tower, x, cos, sin, windows, made: Made, picture: int) -> tuple[Walk, list]:
    everything = torch.arange(len(x))
    walk = Walk(x, torch.ones(len(x)), everything, everything)
    unit, deep = x.shape[1], []
    for number, block in enumerate(tower.blocks):
        attention = block.attn
        rows = walk.rows.flatten(0, 1)
        c, s, w = (
            y[walk.place].flatten(0, 1) for y in (cos, sin, windows[:, None].expand(-1, unit))
        )
        width = (
            attention.head_dim
            if hasattr(attention, "head_dim")
            else attention.dim // attention.num_heads
        )
        mixed = attention.qkv(block.norm1(rows)).view(len(rows), 3, -1, width)
        q, k, v = mixed.permute(1, 2, 0, 3)

        def turn(y, c=c, s=s, half=width // 2):
            return y * c + torch.cat([-y[..., half:], y[..., :half]], -1) * s

        sizes = (
            walk.sizes.repeat_interleave(unit) if made.cuts and made.method.proportional else None
        )
        full = getattr(tower, "fullatt_block_indexes", None)
        see = None if full is None or number in full else w[:, None] == w[None]
        weights = soft(turn(q), turn(k), width**-0.5, sizes, see)
        here = [n for n, cut in enumerate(made.cuts) if cut.block == number]
        fused = here and made.method.fused_values and picture in made.matrices[here[0]]
        if fused:  # patch by patch: rows averaged, columns summed, values of merged rows
            each = torch.eye(unit)
            matrix = torch.kron(made.matrices[here[0]][picture], each)
            member = torch.kron(made.members[here[0]][picture], each)
            weights, rows = matrix @ weights @ member.T, matrix @ rows
            v = (
                attention.qkv(block.norm1(rows))
                .view(len(rows), 3, -1, width)
                .permute(1, 2, 0, 3)[2]
            )
        rows = rows + attention.proj((weights @ v).transpose(0, 1).flatten(1))
        walk.rows = rows.unflatten(0, (-1, unit))
        for n in here:
            if fused:
                walk.note(made, n, picture)
            else:
                walk.reduce(made, n, picture)
        rows = walk.rows.flatten(0, 1)
        walk.rows = (rows + block.mlp(block.norm2(rows))).unflatten(0, (-1, unit))
        indexes = list(getattr(tower, "deepstack_visual_indexes", ()))
        if number in indexes:
            merger = tower.deepstack_merger_list[indexes.index(number)]
            deep.append((walk.member, merger(walk.rows.flatten(0, 1))))
    return walk, deep


def _behind(tower, units: Tensor) -> Tensor:
    """What the merger reads of units of patches (n, 4, C)."""
    if not hasattr(tower, "downsample"):
        return units.flatten(0, 1)
    side = tower.config.spatial_merge_size
    pictures = rearrange(tower.post_layernorm(units), "n (h w) c -> n c h w", h=side)
    return tower.downsample(pictures).flatten(1)


def tokens_of(places: Tensor, images: list[Tensor]) -> list[dict[int, int]]:
    """Per image, the place (row of `places`, (P, D)) of each of its tokens (N, D) that the encoder
    gave as it is: {token: place}."""
    found, first = [], 0
    for image in images:
        same = (image[:, None] == places[None, first:]).all(-1)
        own = {t: first + int(row.nonzero()[0]) for t, row in enumerate(same) if row.any()}
        assert len(set(own.values())) == len(own), "two patches have the same features"
        found.append(own)
        first = max(own.values()) + 1  # a picture that comes twice is the next one, too
    return found


def rows_of_image(
    of_token: dict[int, int], starts: list[int], walks: list[Walk], embeds: list[Tensor]
) -> Rows:
    """What is left of an image: in the order of its tokens, rows of no token behind them."""
    token = {place: number for number, place in of_token.items()}
    pictures = sorted({max(i for i, s in enumerate(starts) if s <= place) for place in token})
    order, rows = [], []
    for picture in pictures:
        for place, row in zip(walks[picture].place.tolist(), embeds[picture], strict=True):
            number = -1 if place < 0 else token.get(starts[picture] + place)
            if number is not None:
                order.append(number)
                rows.append(row)
    by_token = sorted(range(len(order)), key=lambda j: (order[j] < 0, order[j]))
    return Rows(
        torch.tensor([order[j] for j in by_token], dtype=torch.long),
        embeds=torch.stack([rows[j] for j in by_token]),
    )


@dataclass
class Seen:
    """What the unpatched model did with the images of one call."""

    given: list[Tensor]
    """What its vision encoder was given: pixels, and sizes where it takes these."""
    places: Tensor
    """(P, D) what the projector gave, picture by picture, in the encoder's order."""
    features: list[Tensor]
    """Per image, (N, D)."""


def seen(model, kind: str, given: dict) -> Seen:
    core = model.model
    tower = tower_of(core, kind)
    projector = core.multi_modal_projector if tower is not None else core.visual.merger
    tower = core.visual if tower is None else tower
    caught: list = []
    hooks = [
        tower.register_forward_pre_hook(
            lambda m, args, kwargs: caught.append([*args, *kwargs.values()]), with_kwargs=True
        ),
        projector.register_forward_hook(lambda m, args, out: caught.append(out)),
    ]
    output = getattr(core, f"get_{kind}_features")(**given, return_dict=True)
    for hook in hooks:
        hook.remove()
    tensors = [one for one in caught[0] if isinstance(one, Tensor)]
    places, pooled = caught[1], output.pooler_output
    if hasattr(core, "video_tower") and kind == "video":  # frames, whose first row is CLS
        pooled = pooled.reshape(len(given["pixel_values_videos"]), -1, pooled.shape[-1])
        places = places[:, 1:]
    return Seen(tensors, places.flatten(0, -2), list(pooled))


def tower_of(core, kind: str):
    """What encodes images or videos; None: it is called `visual`."""
    return getattr(core, f"{kind}_tower", getattr(core, "vision_tower", None))


@dataclass
class Left:
    """What the encoder leaves of the images of a batch, in the order of the prompts."""

    rows: list[Rows]
    deep: list[list[dict[int, Tensor]]]
    """Per image and level, what is added behind a decoder layer to each token: {token: (D,)}."""

    def truth(self, reference, inputs: dict, cuts, positions) -> Truth:
        """A `Truth` with these cuts, whose deeper features are those of the shorter encoder."""
        truth = Truth(reference, inputs, cuts, positions)
        for row in truth.rows:
            for places, number in zip(row.images, row.numbers, strict=True):
                for target, of_level in zip(row.deep, self.deep[number], strict=True):
                    for token, value in of_level.items():
                        target[places[token]] = value
        return truth


@torch.no_grad()
def left_by_encoder(case, inputs: dict, model) -> Left:
    """What a patched model's encoder leaves, by the reductions that it makes of these inputs."""
    reference = shared(case.reference("eager"))
    found: dict[str, list] = {}
    for kind, given in zoo.encoder_inputs(inputs).items():
        with recorded() as passes:
            getattr(model.model, f"get_{kind}_features")(**given)
        found[kind] = [*_left(reference, kind, given, passes[0] if passes else Made(None))]
    truth, rows, deep = Truth(reference, inputs), [], []
    for row, kinds in zip(truth.rows, truth.kinds(inputs), strict=True):
        for places in row.images:
            video = kinds[row.columns[places[0]]] == 2
            left, levels = found["video" if video else "image"].pop(0)
            rows.append(left)
            deep.append(levels)
    return Left(rows, deep)


def _left(reference, kind: str, given: dict, made: Made) -> Iterator[tuple[Rows, list]]:
    core, unpatched = reference.model, seen(reference, kind, given)
    if hasattr(core, "visual"):
        walks, deeper = packed(core.visual, *unpatched.given, made)
        embeds = [core.visual.merger(_behind(core.visual, walk.rows)) for walk in walks]
    else:
        tower, layer = tower_of(core, kind), getattr(reference.config, "vision_feature_layer", None)
        depth = len(tower.encoder.layers)
        depth = depth if layer is None else layer % (depth + 1)
        behind = tower.post_layernorm if layer is None else torch.nn.Identity()
        walks, _ = padded(tower, unpatched.given[0], made, depth)
        embeds = [core.multi_modal_projector(behind(walk.rows[None, :, 0]))[0] for walk in walks]
        deeper = [[] for _ in walks]
    starts = [0]
    for walk in walks:
        starts.append(starts[-1] + len(walk.member))
    for of_token in tokens_of(unpatched.places, unpatched.features):
        levels = []
        for level in range(len(deeper[0])):
            of_level = {}
            for token, place in of_token.items():
                picture = max(i for i, s in enumerate(starts[:-1]) if s <= place)
                member, values = deeper[picture][level]
                if (row := int(member[place - starts[picture]])) >= 0:
                    of_level[token] = values[row]
            levels.append(of_level)
        yield rows_of_image(of_token, starts[:-1], walks, embeds), levels
