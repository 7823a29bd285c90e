"""What a search ends with: its table, the recommendation, and the line that patches it."""

from __future__ import annotations

import json

from ..report.cells import pareto
from ..results.records import Record, main_score
from ..results.statistics import difference
from ..results.task_kinds import kind_of
from ..results.texts import metric_text, scale, with_interval
from ..table import Table
from ..words.downsample import Downsample, class_of
from ..words.parts import Part, Parts
from .halving import Round, Search, ranked
from .target import Target, worth

NOTES = (
    "Each candidate as in the last round that it was in. {} with its 95 % interval; difference to "
    "dense paired on the same questions. Tokens a layer and share of FLOPs: of the decoder, "
    "visual tokens. Time: to the first token, of dense on the same questions in turn. ★: of the "
    "last round no other is both as good and as cheap."
)


def search_table(search: Search, target: Target) -> Table:
    """Every candidate: the longest in the search first, and of one round the best."""
    best = on_frontier(search.last, target)
    rows, seen = list[tuple[str, ...]](), set[str]()
    for each in reversed(search.rounds):
        order = ranked(each.found, each.dense, target)
        for word in [*order, *(word for word in each.found if word not in order)]:
            if word not in seen:
                seen.add(word)
                rows.append(_row(word, each, target, starred=each is search.last and word in best))
    dense = search.last.dense
    return Table(
        headers=(
            *("Candidate", "Questions", metric_text(dense), "vs dense"),
            *("Tokens a layer", "FLOPs share %", "Time %", "Meets the target"),
        ),
        rows=rows,
        numbers_from=1,
        title=f"target: {target}; dense: {with_interval(main_score(dense)[1])}",
        notes=NOTES.format(metric_text(dense).removesuffix(" %")),
    )


def on_frontier(each: Round, target: Target) -> set[str]:
    """Which candidates of a round none beats in score and cost."""
    words = list(each.found)
    points = [(target.cost(each.found[w]), worth(each.found[w])) for w in words]
    return {words[i] for i in pareto(points, higher_is_better=True)}


def recommendation(search: Search, target: Target) -> tuple[str | None, list[str]]:
    """What to take (None: nothing meets the target), and lines that say so and how sure it is."""
    each = search.last
    order = final_order(each, target)
    if not order:
        return None, [f"No candidate meets {target} in {each.questions} questions: ask for less."]
    first, *others = order
    record = each.found[first]
    lines = [
        f"Recommended for {target}: {first}, {_said(record, each)}, in {each.questions} questions."
    ]
    if target.word == "accuracy":
        lines.append(f"That it meets the target is {target.met(record, each.dense):.0%} sure.")
    for second in others[:1]:
        other = each.found[second]
        sure = target.better(record, other, each.dense)
        how = (
            "which costs more"
            if target.word == "accuracy"
            else f"which the first beats with a confidence of {sure:.0%}"
        )
        lines.append(f"Runner-up: {second}, {_said(other, each)}, {how}.")
    return first, lines


def final_order(each: Round, target: Target) -> list[str]:
    """The choice at the end: of `accuracy` the cheapest that rather meets the target than not, if
    there is one."""
    order = ranked(each.found, each.dense, target)
    if target.word != "accuracy":
        return order
    held = [word for word in order if target.met(each.found[word], each.dense) >= 0.5]
    return sorted(held, key=lambda word: target.cost(each.found[word]) or 0.0)


def patch_line(parts: Parts, positions: str | None) -> str:
    """The Python line that makes a loaded model answer so."""
    if any(isinstance(part.method, Downsample) for part in parts):
        (part,) = parts
        return f"No patch: give the processor smaller pictures ({part.method.name}, {part.budget})."
    more = [f"positions={_typed(positions)}"] if positions else []
    if len(parts) == 1:
        arguments = [*_arguments(parts[0]), *more]
    else:
        calls = (", ".join(_arguments(part)) for part in parts)
        arguments = [f"[{', '.join(f'vlmprune.method({call})' for call in calls)}]", *more]
    return f"vlmprune.patch(model, {', '.join(arguments)})"


def _arguments(part: Part) -> list[str]:
    """The name, fields that are not at their defaults, and the budget."""
    usual = class_of(part.method.name)().fields()
    fields = {k: v for k, v in part.method.fields().items() if v != usual[k]}
    if part.budget:
        fields[part.budget.word] = part.budget.value
    said = [f"{key}={_typed(value)}" for key, value in fields.items()]
    return [_typed(part.method.name), *said]


def _typed(value: object) -> str:
    """A value as Python reads it: texts in double quotes, whole numbers without a point."""
    if isinstance(value, str):
        return json.dumps(value)
    return repr(int(value) if isinstance(value, float) and value == int(value) else value)


def _said(record: Record, each: Round) -> str:
    score = main_score(record)[1]
    named = metric_text(record).removesuffix(" %").lower()
    return f"{named} {with_interval(score)}, {_above_dense(record, each)} beside dense"


def _above_dense(record: Record, each: Round) -> str:
    score = main_score(record)[1]
    value, low, high = difference(score, main_score(each.dense)[1])
    by = scale(score)
    interval = "" if low is None or high is None else f" [{by * low:+.1f}, {by * high:+.1f}]"
    return f"{by * value:+.1f}{interval}"


def _row(word: str, each: Round, target: Target, *, starred: bool) -> tuple[str, ...]:
    record = each.found[word]
    numbers = kind_of(record["config"]).numbers(record)
    time, met = numbers["first_token_share_of_dense"], target.met(record, each.dense)
    return (
        f"{word} ★" if starred else word,
        str(each.questions),
        with_interval(main_score(record)[1]),
        _above_dense(record, each),
        f"{numbers['tokens_average_per_layer']:.1f}",
        f"{100 * numbers['flops_visual_share']:.1f}",
        "" if time is None else f"{100 * time:.0f}",
        f"{met:.0%} sure" if target.word == "accuracy" else "yes" if met else "no",
    )
