"""Questions about a scene, asked only where the answer is clear.

Seven kinds: `what` (nearest to a corner, an edge or the centre), `color`, `which` (the item or
digit of a colour), `exist`, `count`, `rel` (two hops: find one object, then its neighbour) and
`read` (several answer tokens: the digits from left to right). An eighth, `where` (the cell of a
3 x 3 grid), is of a task and a model of its own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .scenes import SIDE, Scene, Thing
from .vocabulary import (
    CATEGORIES,
    COLOR_NAMES,
    COLORS,
    DIGITS,
    FIRST_DIGIT,
    NOUNS,
    PLACES,
    WHERE,
)

NEAREST_MARGIN = 10  # pixels by which the second nearest object must be farther away
WHERE_MARGIN = 6  # pixels between an object's centre and the lines of the 3 x 3 grid
READ_MARGIN = 6  # pixels between the centres of neighbouring digits
TARGET_CONE = 35  # degrees off the axis: an object inside lies clearly in that direction
RIVAL_CONE = 60  # an object inside must not be about as near
MOST_COUNTED = 4
PACK = ("what", "rel", "count", "read", "color", "which", "exist", "rel", "what", "count", "rel",
        "exist")  # fmt: skip
PACK_WITH_PLACES = (*PACK, WHERE, WHERE, WHERE)

_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
_CORNERS = {
    "top left corner": (0, 0),
    "top right corner": (0, SIDE),
    "bottom left corner": (SIDE, 0),
    "bottom right corner": (SIDE, SIDE),
    "center": (SIDE / 2, SIDE / 2),
}
_EDGES = {  # axis, and where on it
    "top edge": (0, 0),
    "bottom edge": (0, SIDE),
    "left edge": (1, 0),
    "right edge": (1, SIDE),
}


@dataclass(frozen=True)
class Asked:
    """A question, its answer words and the objects that it needs.

    `steps` names, for each answer word, the objects to look at first (`[0]`) and the objects that
    give the word (`[1]`); training uses them to teach where to look, nothing else does.
    """

    kind: str
    text: str
    answer: tuple[str, ...]
    needs: tuple[int, ...]
    steps: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = field(default=())


def _single(kind: str, text: str, answer: str, things: Sequence[int]) -> Asked:
    needs = tuple(things)
    return Asked(kind, text, (answer,), needs, ((needs, needs),))


def _clear_minimum(distances: np.ndarray, margin: float) -> int | None:
    """Index of the smallest distance if no other comes within the margin."""
    order = np.argsort(distances)
    if len(order) > 1 and distances[order[1]] - distances[order[0]] < margin:
        return None
    return int(order[0])


def _what(things: Sequence[Thing]) -> list[Asked]:
    centers = np.array([thing.center for thing in things])
    distances = {name: np.hypot(*(centers - point).T) for name, point in _CORNERS.items()}
    distances |= {name: abs(centers[:, axis] - at) for name, (axis, at) in _EDGES.items()}
    asked = []
    for place, distance in distances.items():
        nearest = _clear_minimum(distance, NEAREST_MARGIN)
        if nearest is not None:
            text = f"what is nearest to the {place} ?"
            asked.append(_single("what", text, things[nearest].name, [nearest]))
    return asked


def _neighbours(things: Sequence[Thing], at: int) -> dict[str, int]:
    """For each relation, the object that clearly stands in it to object `at`."""
    others = [i for i in range(len(things)) if i != at]
    delta = np.array([things[i].center for i in others]) - np.array(things[at].center)
    distance = np.hypot(*delta.T)
    found = {}
    nearest = _clear_minimum(distance, NEAREST_MARGIN)
    if nearest is not None:
        found["next to"] = others[nearest]
    for relation, direction in _DIRECTIONS.items():
        angle = np.degrees(np.arccos(np.clip(delta @ np.array(direction) / distance, -1, 1)))
        rivals = np.flatnonzero(angle <= RIVAL_CONE)
        if len(rivals) == 0:
            continue
        best = _clear_minimum(distance[rivals], NEAREST_MARGIN)
        if best is not None and angle[rivals[best]] <= TARGET_CONE:
            found[relation] = others[rivals[best]]
    return found


def _rel(things: Sequence[Thing], unique: set[int]) -> list[Asked]:
    asked = []
    for at in sorted(unique):
        for relation, other in _neighbours(things, at).items():
            text = f"what is {relation} the {things[at].name} ?"
            answer = (things[other].name,)
            asked.append(Asked("rel", text, answer, (at, other), (((at,), (other,)),)))
    return asked


def _color(things: Sequence[Thing], unique: set[int]) -> list[Asked]:
    return [
        _single("color", f"what color is the {things[i].name} ?", COLOR_NAMES[things[i].color], [i])
        for i in sorted(unique)
        if things[i].color >= 0
    ]


def _which(things: Sequence[Thing]) -> list[Asked]:
    groups: dict[tuple[str, int], list[int]] = {}
    for index, thing in enumerate(things):
        if thing.color >= 0:
            noun = "digit" if thing.cls >= FIRST_DIGIT else "item"
            groups.setdefault((noun, thing.color), []).append(index)
    return [
        _single("which", f"which {noun} is {COLOR_NAMES[color]} ?", things[same[0]].name, same)
        for (noun, color), same in groups.items()
        if len(same) == 1
    ]


def _exist(rng: np.random.Generator, things: Sequence[Thing]) -> list[Asked]:
    present = sorted({thing.cls for thing in things})
    absent = [cls for cls in range(len(NOUNS)) if cls not in present]
    cls = present[rng.integers(len(present))]
    here = [i for i, thing in enumerate(things) if thing.cls == cls]
    other = NOUNS[absent[rng.integers(len(absent))]]
    return [
        _single("exist", f"is there a {NOUNS[cls]} ?", "yes", here),
        Asked("exist", f"is there a {other} ?", ("no",), ()),
    ]


def _count(things: Sequence[Thing]) -> list[Asked]:
    asked = []
    for category, nouns in CATEGORIES.items():
        found = tuple(i for i, thing in enumerate(things) if thing.name in nouns)
        if len(found) <= MOST_COUNTED:
            text = f"how many {category} are there ?"
            asked.append(Asked("count", text, (DIGITS[len(found)],), found))
    return asked


def _read(things: Sequence[Thing]) -> list[Asked]:
    found = [i for i, thing in enumerate(things) if thing.cls >= FIRST_DIGIT]
    found.sort(key=lambda i: things[i].center[1])
    across = [things[i].center[1] for i in found]
    distinct = len({things[i].cls for i in found}) == len(found)
    if not (2 <= len(found) <= 3 and distinct and min(np.diff(across)) >= READ_MARGIN):
        return []
    seen = [found[0], *found[:-1]]  # to find the next digit, find the last one read
    steps = tuple(((before,), (digit,)) for before, digit in zip(seen, found, strict=True))
    words = tuple(things[i].name for i in found)
    return [Asked("read", "read the digits from left to right ?", words, tuple(found), steps)]


def place(center: tuple[float, float]) -> str | None:
    """The cell of the 3 x 3 grid in which a point (y, x) in pixels clearly lies."""
    third = SIDE / 3
    if min(abs(at - line) for at in center for line in (third, 2 * third)) < WHERE_MARGIN:
        return None
    return PLACES[int(center[0] // third) * 3 + int(center[1] // third)]


def _where(things: Sequence[Thing], unique: set[int]) -> list[Asked]:
    asked = []
    for i in sorted(unique):
        if cell := place(things[i].center):
            words = tuple(cell.split())
            steps = (((i,), (i,)),) * len(words)
            asked.append(Asked(WHERE, f"where is the {things[i].name} ?", words, (i,), steps))
    return asked


def candidates(rng: np.random.Generator, scene: Scene) -> dict[str, list[Asked]]:
    """Every clear question about a scene, by kind (`exist` asks for two random classes)."""
    things = scene.things
    times = Counter(thing.cls for thing in things)
    unique = {i for i, thing in enumerate(things) if times[thing.cls] == 1}
    return {
        "what": _what(things),
        "color": _color(things, unique),
        "which": _which(things),
        "exist": _exist(rng, things),
        "count": _count(things),
        "rel": _rel(things, unique),
        "read": _read(things),
        WHERE: _where(things, unique),
    }


def pick(rng: np.random.Generator, kind: str, pool: list[Asked]) -> Asked:
    """One of the pool, with the answers of `count` and the relations of `rel` made even."""
    if kind in ("count", "rel"):
        names = [asked.answer[0] if kind == "count" else asked.text.split()[2] for asked in pool]
        groups = sorted(set(names))
        if kind == "count" and len(groups) > 1 and "zero" in groups and rng.random() < 0.6:
            groups.remove("zero")
        chosen = groups[rng.integers(len(groups))]
        pool = [asked for asked, name in zip(pool, names, strict=True) if name == chosen]
    return pool[rng.integers(len(pool))]


def ask(rng: np.random.Generator, scene: Scene, kinds: Sequence[str] = PACK) -> list[Asked]:
    """At most one new question for each entry of `kinds`; what a scene cannot give is left out."""
    pools = candidates(rng, scene)
    chosen: list[Asked] = []
    for kind in kinds:
        pool = [asked for asked in pools[kind] if asked not in chosen]
        if pool:
            chosen.append(pick(rng, kind, pool))
    return chosen


def answer_choices(kind: str) -> int:
    """How many answers a kind has, for the chance level (`read`: two or three distinct digits; the
    kinds of the task of places are its cells)."""
    return {
        "what": len(NOUNS),
        "color": len(COLORS),
        "which": len(NOUNS) - FIRST_DIGIT + 5,
        "exist": 2,
        "count": MOST_COUNTED + 1,
        "rel": len(NOUNS),
        "read": 10 * 9 + 10 * 9 * 8,
    }.get(kind, len(PLACES))
