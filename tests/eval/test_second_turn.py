"""The second question about a picture: couples, what the first one left, and what reports show."""

from __future__ import annotations

import json

import pytest
import vlmprune
from vlmprune.eval import cli, embedded
from vlmprune.eval.embedded.turns import turns
from vlmprune.eval.measure.second_turn import SecondTurn
from vlmprune.prune.errors import UnsupportedFeatureError
from vlmprune.prune.registry import method


@pytest.fixture(scope="module")
def loaded():
    return embedded.load_model()


def test_couples_need_different_objects_and_come_in_both_orders():
    found = turns()
    assert len(found) > 500 and len({each.second.id for each in found}) == len(found)
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert (one.first, one.second) == (other.second, other.first)
        assert one.first.image_id == one.second.image_id
        assert not {*one.first.evidence} & {*one.second.evidence}
    assert turns(7) == found[:6] and len(turns(1)) == 2


def run(loaded, name=None, limit=8, **fields):
    calls = [method(name, **fields)] if name else []
    return SecondTurn(*loaded, turns(limit), batch_size=4).run(calls)


def test_blind_choices_answer_second_what_they_answer_first(loaded):
    cell, samples = run(loaded, "grid", keep_tokens=49)
    second, first = cell["scores"]["second_turn"], cell["scores"]["first_turn"]
    assert second["outcomes"] == first["outcomes"] == [sample.score for sample in samples]
    assert second["value"] > 0 and cell["kept_alike"] == 1.0 and cell["where"]["images"] == 8


def test_the_question_that_comes_first_chooses_for_the_second(loaded):
    """The second is answered on the tokens of the first, and on nothing else."""
    cell, samples = run(loaded, "fastv", keep_tokens=9)
    assert cell["kept_alike"] < 0.9 and cell["evidence"]["mean"] < 0.9
    dense, alone = run(loaded)[1], {}
    model, processor = loaded
    for each in turns(8):
        with vlmprune.patch(model, "fastv", keep_tokens=9):
            text = embedded.prompt(processor, each.first.question)
            inputs = processor(images=each.first.image, text=text, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        said = processor.batch_decode(out, skip_special_tokens=True)[0]
        alone[each.first.id] = float(embedded.is_correct(said, each.first.answer))
    firsts = [alone[each.second.id] for each in turns(8)]
    assert cell["scores"]["first_turn"]["outcomes"] == firsts
    assert [s.prediction for s in samples] != [s.prediction for s in dense]


def test_smaller_pictures_are_refused(loaded):
    from vlmprune.eval.words.parts import parse

    (part,) = parse("downsample@0.5")
    with pytest.raises(UnsupportedFeatureError, match="leave downsample out"):
        SecondTurn(*loaded, turns(2), batch_size=2).run([part.call])


def test_a_sweep_asks_it_and_reports_show_it(tmp_path, capsys):
    words = [
        "--tasks",
        "tinyscenes-turns",
        "--methods",
        "fastv,visual_press",
        "--budgets",
        "9",
        "--limit",
        "4",
    ]
    assert cli.main(["sweep", *words, "-o", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert ["kept_alike" in record for record in records] == [False, True, False]
    for name in ("report.md", "report.html"):
        assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / name)]) == 0
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "### Second turn" in text and "| Asked first | Asked second |" in text
    capsys.readouterr()
    assert cli.main(["sweep", "--tasks", "tinyscenes-turn", "-o", str(tmp_path)]) == 2
    assert "Did you mean: tinyscenes-turns?" in capsys.readouterr().err
