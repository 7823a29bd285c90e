"""Where something is, of the embedded benchmark: sound questions, a model that needs the object."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from vlmprune.eval import cli, embedded
from vlmprune.eval.embedded import benchmark, evaluate, where
from vlmprune.eval.embedded.scenes import PATCHES, SIDE
from vlmprune.eval.embedded.task import WhereTask
from vlmprune.eval.embedded.training import export, language, places
from vlmprune.eval.embedded.vocabulary import PLACES
from vlmprune.eval.tasks.protocols import TaskError

DIGEST = "a1a79f8a76dd60bbba2933b81c4e06aa43af527a256ecbf7e99bf439c708a57c"
LIMIT, DENSE_FLOOR = 45, 92  # percent; the model card states what was measured
BLIND = 12.5


def test_the_file_is_the_generated_one():
    assert benchmark.digest(where.FILE) == DIGEST
    assert benchmark.encode(where.generate()) == where.FILE.read_bytes()


def test_cells_are_balanced_and_take_turns():
    asked = where.where_questions()
    assert len(asked) == 360 and {question.answer for question in asked} == set(PLACES)
    assert set(Counter(question.kind for question in asked).values()) == {40}
    assert [question.answer for question in asked[:9]] == list(PLACES)
    assert where.where_questions(18) == asked[:18]
    old = {str(record["things"]) for record in benchmark.records()}
    assert not old & {str(record["things"]) for record in benchmark.records(where.FILE)}


def test_answers_follow_from_the_scene():
    """Its centre lies in the cell, clear of its lines, and nothing else has its name."""
    for record in benchmark.records(where.FILE):
        scene = benchmark.scene_of(record)
        names = Counter(thing.name for thing in scene.things)
        assert scene.split == "test"
        for entry in record["questions"]:
            (number,) = entry["things"]
            thing = scene.things[number]
            assert entry["question"] == f"where is the {thing.name} ?" and names[thing.name] == 1
            at = np.array(thing.center) * 3 / SIDE
            row, column = at.astype(int).tolist()
            assert entry["answer"] == PLACES[3 * row + column]
            assert min(abs(value - line) for value in at for line in (1, 2)) > 0.16
            owned = benchmark.rendered(record["image"], where.FILE).owned[number]
            assert entry["patches"] == np.flatnonzero(owned).tolist()


@pytest.fixture(scope="module")
def loaded():
    return embedded.load_model(name="embedded-where")


@pytest.fixture(scope="module")
def seen(loaded):
    count = 1 + max(question.image_id for question in where.where_questions(LIMIT))
    with torch.no_grad():
        return evaluate.Seen(*loaded, count=count, file=where.FILE)


def test_the_model_says_where_things_are_by_their_tokens(loaded, seen):
    asked = where.where_questions(LIMIT)

    def percent(*choice):
        said = evaluate.answers(*loaded, seen, asked, *choice)
        return evaluate.accuracy(asked, said)["all"]

    assert percent() >= DENSE_FLOOR
    assert percent(partial(evaluate.drop_asked, ring=1), PATCHES // 2) <= BLIND


def test_it_answers_the_benchmark_too(loaded):
    asked = embedded.questions(42)
    assert evaluate.accuracy(asked, evaluate.generated(*loaded, asked))["all"] >= 80


def test_it_has_the_tower_of_embedded_and_one_word_more(loaded):
    first, processor = embedded.load_model()
    one, more = (each.tokenizer.get_vocab() for each in (processor, loaded[1]))
    assert more == one | {"where": len(one)}
    old, new = (model.model.vision_tower.state_dict() for model in (first, loaded[0]))
    assert all(torch.equal(old[name], new[name]) for name in old | new)


def test_training_starts_from_the_shipped_weights():
    model, shipped = places.start(None), embedded.load_model()[0]
    for name, weights in model.llava.state_dict().items():
        old = shipped.state_dict()[name]
        assert torch.equal(weights[: len(old)], old)
        assert len(weights) - len(old) == ("embed_tokens" in name or "lm_head" in name)


def test_the_course_leads_to_a_model_that_loads(tmp_path):
    quiet = {"workers": 0, "batch": 2, "report": lambda line: None}
    language.train(tmp_path / "run", 1, course=places.COURSE, name="places", **quiet)
    export.export(tmp_path / "run" / "places.pt", tmp_path / "model")
    model, processor = embedded.load_model(folder=tmp_path / "model")
    word = processor.tokenizer.get_vocab()["where"]
    assert word == len(model.get_output_embeddings().weight) - 1
    old = embedded.load_model()[0].get_parameter("model.multi_modal_projector.linear_1.weight")
    new = model.get_parameter("model.multi_modal_projector.linear_1.weight")
    assert 0 < (new - old).abs().max() < 1e-3  # one step of a warm-up


def test_a_model_without_the_word_is_refused(tmp_path, capsys):
    argv = ["sweep", "--tasks", "tinyscenes-where", "--methods", "grid", "-o", str(tmp_path)]
    assert cli.main(argv) == 2
    assert "type --model embedded-where" in capsys.readouterr().err
    task = WhereTask()
    with pytest.raises(TaskError, match=r"does not know 'where'.*--model embedded-where"):
        task.prompt(embedded.load_model()[1], task.questions(1)[0])
