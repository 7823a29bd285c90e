"""Images, one method, a count each: newlines and tiles are dealt with here, for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from .answers.answer import looks_at_values
from .answers.selections import Asked, check_batch, check_selection
from .contract import BeforeLLM, Choosing, Selection, VisualTokens
from .declared import Seen
from .errors import BudgetError
from .joining import renumbered, with_newlines
from .tiles import cut, join, whole
from .tiling import Tiling


@dataclass(frozen=True)
class _Question:
    """What a method is asked about one image, and how its answers become the image's selection."""

    asked: Sequence[Asked]
    """Tokens and a count (None: the method's own), for the image or for each of its tiles."""
    join: Callable[[list[Selection]], Selection]


def select(method: Choosing, tokens: VisualTokens, keep: int | None) -> Selection:
    """What `method` keeps of one image; see `select_all`."""
    return select_all(method, [tokens], [keep])[0]


def select_all(
    method: Choosing,
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
    given = _answers(method, [one for q in questions for one in q.asked], debug)
    answers = iter(given if record else map(_unscored, given))
    return [question.join([next(answers) for _ in question.asked]) for question in questions]


def most(method: Choosing, tiling: Tiling) -> int:
    """The largest number of tokens that `method` may keep of an image without a budget."""
    if not isinstance(method, BeforeLLM) or method.newline_policy == "compete":
        return method.most(tiling.num_tokens)
    if not method.finds_count:  # a published share, of all tokens of the image
        return method.most(tiling.num_tokens)
    newlines = tiling.num_newlines if method.newline_policy == "keep" else 0
    if method.scope_used == "image":
        return newlines + method.most(tiling.num_patches)
    return newlines + sum(method.most(tile.num_patches) for tile in tiling.tiles)


def _question(method: Choosing, tokens: VisualTokens, keep: int | None) -> _Question:
    if isinstance(method, BeforeLLM) and tokens.place is method.place and tokens.alive is None:
        return _among_newlines(method, tokens, keep)
    return _Question([(tokens, keep)], _only)


def _among_newlines(method: BeforeLLM, tokens: VisualTokens, keep: int | None) -> _Question:
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

    def placed(answers: list[Selection]) -> Selection:
        chosen = question.join(answers)
        numbers = tiling.patches(tokens.device)
        return with_newlines(renumbered(chosen, numbers, tiling.num_tokens), newlines)

    return replace(question, join=placed)


def _in_scope(method: BeforeLLM, tokens: VisualTokens, keep: int | None) -> _Question:
    """The image is one question, or each of its tiles is one."""
    if method.scope_used == "image":
        return _Question([(tokens, keep)], _only)
    parts = cut(tokens, keep)
    return _Question([part.asked for part in parts], partial(join, tokens, parts))


def _only(answers: list[Selection]) -> Selection:
    (answer,) = answers
    return answer


def _unscored(selection: Selection) -> Selection:
    return selection if selection.scores is None else replace(selection, scores=None)


def _answers(method: Choosing, asked: Sequence[Asked], debug: bool) -> list[Selection]:
    """The answers, in order, checked; where everything stays the method is not asked."""
    values = looks_at_values(method, debug)
    asked = [(replace(seen, signals=Seen(method, seen.signals)), keep) for seen, keep in asked]
    due = [
        (tokens, keep) for tokens, keep in asked if keep is not None and keep < tokens.num_tokens
    ]
    given = method.select_batch(due) if due else []
    chosen = iter(check_batch(method, due, given, values=values))

    def answer(tokens: VisualTokens, keep: int | None) -> Selection:
        if keep is None:
            found = method.select_adaptive(tokens)
            return check_selection(method, "select_adaptive", tokens, None, found, values)
        return next(chosen) if keep < tokens.num_tokens else whole(tokens)

    return [answer(*one) for one in asked]
