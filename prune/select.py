"""Images, one method, a count each: newlines and tiles are dealt with here, for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from .answers import check_batch, check_selection, looks_at_values
from .contract import BeforeLLM, Pruning, Selection, VisualTokens
from .declared import Seen
from .errors import BudgetError
from .tiling import Tiling


@dataclass(frozen=True)
class _Question:
    """What a method is asked about one image, and how its answers become the image's selection."""

    asked: Sequence[tuple[VisualTokens, int | None]]
    """Tokens and a count (None: the method's own), for the image or for each of its tiles."""
    join: Callable[[list[Selection]], Selection]


def select(method: Pruning, tokens: VisualTokens, keep: int | None) -> Selection:
    """What `method` keeps of one image; see `select_all`."""
    return select_all(method, [tokens], [keep])[0]


def select_all(
    method: Pruning,
    images: Sequence[VisualTokens],
    keeps: Sequence[int | None],
    *,
    record: bool = False,
    debug: bool = False,
) -> list[Selection]:
    """What `method` keeps of each image, checked: exactly as many, or as it decides (None).

    The method is asked once about all images and tiles.

    Args:
        images: all tokens of an image each, or those alive in the decoder. Before the LLM, signals
            per token cover the patches, or all tokens where newlines compete.
        record: whether the selections keep their scores: (N,) of all tokens, NaN where a token was
            not ranked (newlines that do not compete, tiles that were kept or dropped whole).
        debug: look at the numbers that a shipped method returns, too: the host waits for them.

    Raises:
        BudgetError: the newlines that the method keeps leave no room for a patch.
        MethodAnswerError: the method returned something else than it was asked for.
    """
    questions = [
        _question(method, tokens, keep) for tokens, keep in zip(images, keeps, strict=True)
    ]
    values = looks_at_values(method, debug)
    given = _ask(method, [one for question in questions for one in question.asked], values)
    answers = iter(given if record else map(_unscored, given))
    return [question.join([next(answers) for _ in question.asked]) for question in questions]


def _question(method: Pruning, tokens: VisualTokens, keep: int | None) -> _Question:
    if isinstance(method, BeforeLLM) and tokens.place is method.place:
        return _with_newlines(method, tokens, keep)
    return _Question([(tokens, keep)], _only)


def _only(answers: list[Selection]) -> Selection:
    (answer,) = answers
    return answer


def share(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in whole numbers proportional to `sizes`, none above its size.

    What is left by rounding down goes to the largest remainders, the first of equal ones.
    """
    quotas = [total * size / sum(sizes) for size in sizes]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def most(method: Pruning, tiling: Tiling) -> int:
    """The largest number of tokens that `method` may keep of an image without a budget."""
    if not isinstance(method, BeforeLLM) or method.newline_policy == "compete":
        return method.most(tiling.num_tokens)
    if not method.finds_count:  # a published share, of all tokens of the image
        return method.most(tiling.num_tokens)
    newlines = tiling.num_newlines if method.newline_policy == "keep" else 0
    if method.scope_used == "image":
        return newlines + method.most(tiling.num_patches)
    return newlines + sum(method.most(tile.num_patches) for tile in tiling.tiles)


def _ask(
    method: Pruning, asked: Sequence[tuple[VisualTokens, int | None]], values: bool
) -> list[Selection]:
    """The answers, in order, checked; where everything stays the method is not asked."""
    asked = [(replace(seen, signals=Seen(method, seen.signals)), keep) for seen, keep in asked]
    choices = [
        (tokens, keep) for tokens, keep in asked if keep is not None and keep < tokens.num_tokens
    ]
    given = method.select_batch(choices) if choices else []
    chosen = iter(check_batch(method, choices, given, values=values))

    def adaptive(tokens: VisualTokens) -> Selection:
        found = method.select_adaptive(tokens)
        return check_selection(method, "select_adaptive", tokens, None, found, values)

    return [
        adaptive(tokens)
        if keep is None
        else next(chosen)
        if keep < tokens.num_tokens
        else Selection(kept=torch.arange(tokens.num_tokens, device=tokens.device))
        for tokens, keep in asked
    ]


def _unscored(selection: Selection) -> Selection:
    return selection if selection.scores is None else replace(selection, scores=None)


# --- Newlines ----------------------------------------------------------------------------------


def _with_newlines(method: BeforeLLM, tokens: VisualTokens, keep: int | None) -> _Question:
    """Choose among the patches, then place the newlines as the policy says."""
    tiling, policy = tokens.tiling, method.newline_policy
    if not tiling.num_newlines or policy == "compete":
        return _in_scope(method, tokens, keep)
    patches = replace(tokens, num_tokens=tiling.num_patches, tiling=tiling.without_newlines())
    newlines = tiling.newlines(tokens.device)
    if policy == "drop":
        spare = max(0, (keep or 0) - tiling.num_patches)
        newlines = newlines[:spare]
    elif keep is not None and keep <= tiling.num_newlines:
        least = tiling.num_newlines + 1
        raise BudgetError(
            f"{method.name} keeps all {tiling.num_newlines} newline tokens of an image, which "
            f"leaves nothing of a budget of {keep}. The nearest that can is keep_tokens={least}; "
            f"or set newlines='drop'."
        )
    among = None if keep is None else keep - len(newlines)
    question = _in_scope(method, patches, among)

    def join(answers: list[Selection]) -> Selection:
        chosen = question.join(answers)
        numbers = tiling.patches(tokens.device)
        return _merged_in(_renumbered(chosen, numbers, tiling.num_tokens), newlines)

    return replace(question, join=join)


def _merged_in(chosen: Selection, newlines: Tensor) -> Selection:
    """Add newline tokens, each before the first row that lies behind it.

    Where the rows are not in raster order, a row lies as far as the farthest row so far.
    """
    if not len(newlines):
        return chosen
    kept = torch.cat([chosen.kept, newlines]).sort().values
    order = chosen.arranged
    reach = torch.cat([order.cummax(0).values, newlines])
    arranged = reach.argsort(stable=True)
    place = arranged.argsort()[: len(order)]  # where each row of the method went
    rows = torch.arange(len(order), device=place.device) if chosen.rows is None else chosen.rows
    return replace(
        chosen,
        kept=kept,
        order=None if chosen.order is None else torch.cat([order, newlines])[arranged],
        rows=None if chosen.features is None else place[rows],
        groups=None if chosen.groups is None else _regrouped(chosen.groups, place),
    )


# --- Tiles -------------------------------------------------------------------------------------


def _in_scope(method: BeforeLLM, tokens: VisualTokens, keep: int | None) -> _Question:
    """The image is one question, or each of its tiles is one."""
    tiles = tokens.tiling.tiles
    if method.scope_used == "image" or len(tiles) == 1:
        return _Question([(tokens, keep)], _only)
    counts: Sequence[int | None]
    if keep is None:
        counts = [None] * len(tiles)
    else:
        counts = share(keep, [tile.num_patches for tile in tiles])
    asked, numbers = [], []
    for number, places in enumerate(tokens.tiling.tile_patches(tokens.device)):
        if counts[number] != 0:
            asked.append((_tile(tokens, number, places), counts[number]))
            numbers.append(places)
    total = [tokens.num_tokens] * len(numbers)
    return _Question(asked, lambda found: _joined(list(map(_renumbered, found, numbers, total))))


def _tile(tokens: VisualTokens, number: int, places: Tensor) -> VisualTokens:
    tile = tokens.tiling.tiles[number]
    signals = {}
    for signal, tensor in tokens.signals.items():
        if signal.per == "token":
            tensor = tensor[places]
        elif signal.per == "tile":
            tensor = tensor[number : number + 1]
        signals[signal] = tensor
    return VisualTokens(
        num_tokens=tile.num_patches,
        tiling=Tiling.single(tile.rows, tile.columns),
        shape=tokens.shape,
        signals=signals,
        tile=number,
    )


def _joined(parts: Sequence[Selection]) -> Selection:
    """Selections of one image's tiles as one: tile after tile if any of them has an order of its
    own, else in raster order. Features of rows that no tile gave stay those of their tokens."""
    kept, arranged = torch.cat([part.kept for part in parts]).sort()
    order, place = None, arranged.argsort()  # where each row of the parts went
    if any(part.order is not None for part in parts):
        order = torch.cat([part.arranged for part in parts])
        place = torch.arange(len(order), device=order.device)
    features, rows, groups = [], [], []
    for part, here in zip(parts, place.split([part.count for part in parts]), strict=True):
        if part.features is not None:
            features.append(part.features)
            rows.append(here if part.rows is None else here[part.rows])
        if part.groups is not None:
            groups.append(_regrouped(part.groups, here))
    return Selection(
        kept=kept,
        order=order,
        features=torch.cat(features) if features else None,
        rows=torch.cat(rows) if rows else None,
        projected=any(part.projected for part in parts),
        groups=_by_row(torch.cat(groups, 1)) if groups else None,
        scores=_united([part.scores for part in parts if part.scores is not None]),
    )


def _united(parts: Sequence[Tensor]) -> Tensor | None:
    """Scores (N,) of different tokens each, NaN for the others', as one."""
    return reduce(lambda one, two: one.where(two.isnan(), two), parts) if parts else None


# --- Numbers -----------------------------------------------------------------------------------


def _renumbered(selection: Selection, numbers: Tensor, total: int) -> Selection:
    """Token i becomes token `numbers[i]` of `total`; ascending numbers stay ascending."""
    order, groups, scores = selection.order, selection.groups, selection.scores
    if order is not None:
        order = torch.where(order >= 0, numbers[order.clamp_min(0)], -1)
    if groups is not None:
        groups = torch.stack([groups[0], numbers[groups[1]]])
    if scores is not None:
        scores = scores.new_full((total,), torch.nan).index_copy(0, numbers, scores)
    kept = numbers[selection.kept]
    return replace(selection, kept=kept, order=order, groups=groups, scores=scores)


def _regrouped(groups: Tensor, place: Tensor) -> Tensor:
    """Row i becomes row `place[i]`."""
    return torch.stack([place[groups[0]], groups[1]])


def _by_row(groups: Tensor) -> Tensor:
    return groups[:, groups[0].argsort(stable=True)]
