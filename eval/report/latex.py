r"""A report as LaTeX tables for a paper: what `\input` takes, one table a model.

Rows are methods under a budget, dense first; tasks of equal settings stand beside each other.
"""

from __future__ import annotations

import statistics
import unicodedata
from collections.abc import Sequence

from ..results.averages import percent_of_dense
from ..results.texts import in_unit, metric_label, scale
from .cells import Cell, Section, finite
from .escape import one_line
from .grids import several

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",  # after the end of a line it would open an argument
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_OF_A_TASK = ("task", "task_version", "max_new_tokens", "methods", "positions")
_MISSING = {"failed": "failed", "not_applicable": "n/a"}
_WIDE = 2  # with more tasks a table is scaled to the width of the page

_ONE_TASK = (r"Brackets: 95\,\% intervals; vs.\ dense is paired {item} by {item}.",)
_SEVERAL_TASKS = (
    "These are means over tasks.",
    r"Small: difference to dense, paired {item} by {item} (*: its 95\,\% interval has no 0).",
    "Average: of dense, over the tasks.",
)

Key = tuple[str, str]
"""A row: method and budget as tables name them."""


def render(sections: Sequence[Section]) -> str:
    """All tables; those of one model and setting are one."""
    groups: dict[tuple[str, ...], list[Section]] = {}
    for section in sections:
        shared = {k: v for k, v in section.config.items() if k not in _OF_A_TASK}
        groups.setdefault(tuple(f"{k}={v}" for k, v in sorted(shared.items())), []).append(section)
    wide = any(len(group) > _WIDE for group in groups.values())
    packages = "booktabs,graphicx" if wide else "booktabs"
    head = f"% Written by vlmprune report; needs \\usepackage[T1]{{fontenc}}, {{{packages}}}.\n"
    tables = (_table(group, number) for number, group in enumerate(groups.values(), start=1))
    return head + "\n".join(tables)


def tex(text: object) -> str:
    """Text that LaTeX takes for nothing else; letters beyond Latin are named by their numbers."""
    words = one_line(text)
    return "".join(_SPECIAL.get(c) or (c if _is_latin(c) else f"U+{ord(c):04X}") for c in words)


def _is_latin(character: str) -> bool:
    if character.isascii():
        return character.isprintable()
    return ord(character) < 0x180 and unicodedata.category(character).startswith("L")


def _table(sections: Sequence[Section], number: int) -> str:
    several_tasks = len(sections) > 1
    columns = "ll" + "r" * (len(sections[0].kind.means) + len(sections) + 1)
    lines = [f"\\begin{{tabular}}{{@{{}}{columns}@{{}}}}", r"\toprule", *_heads(sections)]
    lines.append(r"\midrule")
    cells = [{_key(cell): cell for cell in section.cells} for section in sections]
    keys = list(dict.fromkeys(key for group in cells for key in group))
    dense = [key for key in keys if any(c.dense for g in cells if (c := g.get(key)))]
    others = [key for key in keys if key not in dense]
    percents = _percents(sections) if several_tasks else None
    lines += [_row(key, sections, cells, percents) for key in dense]
    lines += [r"\midrule"] if dense and others else []
    lines += [_row(key, sections, cells, percents) for key in others]
    lines += [r"\bottomrule", r"\end{tabular}"]
    if len(sections) > _WIDE:
        lines = [r"\resizebox{\linewidth}{!}{%", *lines[:-1], lines[-1] + "}"]
    caption = f"\\caption{{{_caption(sections)}}}"
    label = f"\\label{{tab:vlmprune-{number}}}"
    begin = [
        r"\begin{table*}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        caption,
        label,
    ]
    return "\n".join([*begin, *lines, r"\end{table*}"]) + "\n"


def _heads(sections: Sequence[Section]) -> list[str]:
    fixed = ["Method", "Budget", *(mean.header for mean in sections[0].kind.means)]
    metrics = [tex(_metric(section)) for section in sections]
    if len(sections) == 1:
        return [_line([*fixed, *metrics, r"vs.\ dense"])]
    tasks = [tex(section.config["task"]) for section in sections]
    return [_line(["" for _ in fixed] + tasks + [""]), _line([*fixed, *metrics, r"Average \%"])]


def _metric(section: Section) -> str:
    return metric_label(section.main, section.metrics[section.main]) if section.main else "Score"


def _row(
    key: Key,
    sections: Sequence[Section],
    cells: Sequence[dict[Key, Cell]],
    percents: dict[Key, float | None] | None,
) -> str:
    here = [group.get(key) for group in cells]
    done = [cell.record for cell in here if cell is not None and cell.ok]
    means = sections[0].kind.means
    entries = [
        *map(tex, key),
        *(_mean([mean.value(record) for record in done], mean.digits) for mean in means),
    ]
    if percents is None:
        entries += _score(sections[0], here[0])
    else:
        entries += map(_short_score, sections, here)
        percent = percents.get(key)
        entries.append("" if percent is None else f"{percent:.1f}")
    return _line(entries)


def _score(section: Section, cell: Cell | None) -> list[str]:
    """A score with its interval, and what it is above dense with the interval of that."""
    metric = section.main
    if cell is None or metric is None:
        return ["", ""]
    if not cell.ok or metric not in cell.record["scores"]:
        return [_MISSING.get(cell.record["status"], ""), ""]
    score = cell.record["scores"][metric]
    by = scale(score)
    text = in_unit(score) + _interval(by, score["low"], score["high"], "")
    found = section.against_dense(cell, metric)
    if found is None:
        return [text, ""]
    value, low, high = found
    return [text, _signed(by * value, "+") + _interval(by, low, high, "+")]


def _short_score(section: Section, cell: Cell | None) -> str:
    """A score, and small what it is above dense, with a star if the interval of that has no 0."""
    text, _ = _score(section, cell)
    if cell is None or not cell.ok or section.main is None:
        return text
    metric = section.main
    score = cell.record["scores"].get(metric)
    found = section.against_dense(cell, metric)
    if score is None or found is None:
        return in_unit(score) if score else text
    value, low, high = found
    sure = low is not None and high is not None and not low <= 0 <= high
    star = r"\rlap{*}" if sure else ""
    return f"{in_unit(score)} {{\\scriptsize {_signed(scale(score) * value, '+')}{star}}}"


def _interval(by: int, low: float | None, high: float | None, sign: str) -> str:
    if low is None or high is None:
        return ""
    return f" {{\\scriptsize [{_signed(by * low, sign)}, {_signed(by * high, sign)}]}}"


def _signed(value: float, sign: str) -> str:
    """With a minus that is no hyphen."""
    text = f"{value:{sign}.1f}"
    return f"${text}$" if text[0] in "+-" else text


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in map(finite, values) if value is not None]
    return f"{statistics.fmean(known):.{digits}f}" if known else ""


def _percents(sections: Sequence[Section]) -> dict[Key, float | None]:
    """The mean percentage of dense over all tasks; dense is 100 by definition."""
    found = percent_of_dense([cell.record for section in sections for cell in section.done])
    whole: dict[Key, float | None] = {
        _key(section.dense): 100.0 for section in sections if section.dense
    }
    return whole | {
        (one.variant, one.budget): one.average for one in found if len(one.tasks) == len(sections)
    }


def _caption(sections: Sequence[Section]) -> str:
    config, kind = sections[0].config, sections[0].kind
    measured, notes = kind.paper_notes, _ONE_TASK if len(sections) == 1 else _SEVERAL_TASKS
    tasks = [f"{section.config['task']} ({_questions(section)})" for section in sections]
    machines = dict.fromkeys(machine for section in sections for machine in section.hardware)
    return " ".join(
        [
            f"{tex(config['model'])} ({tex(config['dtype'])}) on {tex(', '.join(tasks))}.",
            *measured[:-1],
            f"{measured[-1]}, on {tex(several(list(machines)))}.",
            *(note.format(item=kind.item) for note in notes),
        ]
    )


def _questions(section: Section) -> str:
    if section.main is None:
        return "not run"
    return f"{section.metrics[section.main]['n']:g} {section.kind.item}s"


def _key(cell: Cell) -> Key:
    return cell.variant, cell.budget


def _line(entries: Sequence[str]) -> str:
    return " & ".join(entries) + r" \\"
