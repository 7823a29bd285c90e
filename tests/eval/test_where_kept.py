"""Where in pictures tokens were kept: points of a raster, evidence, and what reports show of it."""

from __future__ import annotations

import json

import torch
from kit.reports import fastv, record
from vlmprune.eval import cli
from vlmprune.eval.embedded import questions
from vlmprune.eval.measure.where_kept import SIDE, Seen, add_where, raster
from vlmprune.eval.results.agreement import agreement
from vlmprune.prune.tiling import Block, Tiling


class Prefill:
    """What is read of `handle.last`."""

    def __init__(self, tilings, kept, samples, cache_kept=None):
        self.cache_kept = cache_kept
        self.tilings = tilings
        self.kept = [torch.tensor(numbers, dtype=torch.int64) for numbers in kept]
        self.image_sample = samples


def test_a_token_is_over_its_part_of_the_picture():
    points = raster(Tiling.single(2, 2), torch.tensor([1]))
    assert points[: SIDE // 2, SIDE // 2 :].all() and points.sum() == SIDE * SIDE // 4
    first = raster(Tiling.single(SIDE, SIDE), torch.arange(5))
    assert first[0, :5].all() and first.sum() == 5


def test_thumbnail_and_tiles_show_the_same_picture():
    tiling = Tiling((Block((1,), (1,)), Block((1, 1), (1, 1), "rows")))
    left = raster(tiling, torch.tensor([1, 3, 4]))  # its first column, and a newline
    assert left[:, : SIDE // 2].all() and not left[:, SIDE // 2 :].any()
    assert raster(tiling, torch.tensor([0])).all()
    assert not raster(tiling, torch.tensor([], dtype=torch.int64)).any()


def test_crops_that_lie_nobody_knows_where_are_not_read():
    crop = Block((1,), (2,))
    tiling = Tiling((crop, crop, crop), thumbnail=2)
    assert not raster(tiling, torch.tensor([0, 1, 2, 3])).any()
    shown = raster(tiling, torch.tensor([4]))
    assert shown[:, : SIDE // 2].all() and not shown[:, SIDE // 2 :].any()


def test_counts_and_evidence_are_of_the_samples_own_images():
    grid, seen, cell = Tiling.single(SIDE, SIDE), Seen(), {}
    last = Prefill([grid] * 3, [[0], [0, 1], [5]], [0, 1, 1])
    seen.note(last, 0, (0, 7))
    seen.note(last, 1, (0, 7))  # of which image is not known
    seen.note(Prefill([grid], [[7]], [0]), 0, (7,))
    assert seen.evidence == [0.5, None, 1.0]
    add_where(cell, [seen], seen.evidence, [0.0, 1.0, 1.0])
    assert cell["where"]["images"] == 4
    assert cell["where"]["percent"][:8] == [50, 25, 0, 0, 0, 25, 0, 25]
    assert cell["evidence"] == {"mean": 0.75, "right": 1.0, "wrong": 0.0 + 0.5, "questions": 2}
    nothing: dict = {}
    on_cache = Seen()
    on_cache.note(Prefill([grid], [[7]], [0], cache_kept=[[4]]), 0, (7,))
    add_where(nothing, [Seen(), on_cache], on_cache.evidence, [1.0])
    assert not nothing


def test_reports_show_it(tmp_path):
    lower = [0] * (SIDE * SIDE // 2) + [50] * (SIDE * SIDE // 2)
    where = {"side": SIDE, "images": 4, "percent": lower}
    evidence = {"mean": 0.5, "right": 0.75, "wrong": None, "questions": 4}
    records = [record(1), record(2, fastv(), where=where, evidence=evidence)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    for name in ("report.md", "report.html"):
        assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / name)]) == 0
    shown = (tmp_path / "report.md").read_text("utf-8")
    assert "| fastv(layer=3) | 0.5 | 25.0 |  | 1.00 | 50.0 | 75.0 |  |" in shown
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count('alt="Where fastv(layer=3) @ 0.5 keeps tokens"') == 1


def test_a_sweep_measures_it_and_keeps_digests_of_answers(tmp_path):
    words = ["sweep", "--methods", "grid", "--budgets", "49", "--limit", "7", "-o", str(tmp_path)]
    assert cli.main(words) == 0
    dense, pruned = map(json.loads, (tmp_path / "runs.jsonl").read_text("utf-8").splitlines())
    assert "where" not in dense and "evidence" not in dense
    assert sum(pruned["where"]["percent"]) == 49 * 100 and pruned["where"]["images"] == 7
    assert pruned["evidence"]["questions"] == sum(bool(q.evidence) for q in questions(7))
    assert len(dense["answers"]) == len(pruned["answers"]) == 7
    said = agreement(pruned, dense, "accuracy")
    assert said is not None and said.same_answers is not None and said.same_answers < 1
