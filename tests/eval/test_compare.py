"""`vlmprune.compare`: rows, table, picture and HTML of one question, on the embedded model and on
tiny models of several families with processors of their own."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
import vlmprune
from kit import zoo
from kit.fakes import FakeProcessor, picture
from kit.snapshots import differences, snapshot
from kit.zoo import CASES
from PIL import Image, ImageChops
from vlmprune.eval import cli, embedded
from vlmprune.eval.compare.side_by_side import Panel, side_by_side
from vlmprune.eval.image_file import InputError
from vlmprune.eval.in_process import sweep_model
from vlmprune.eval.measure.flops import visual_share
from vlmprune.eval.results.records import main_score, method_name
from vlmprune.eval.tasks.protocols import TaskError

pytestmark = pytest.mark.usefixtures("timed_once")

METHODS = [
    "random",
    vlmprune.method("divprune", keep_tokens=40),
    "fastv:layer=3@0.25",
    "cdpruner",
    "divprune@0.5+fastv:layer=3",
    [vlmprune.method("grid", keep_ratio=0.5), "fastv:layer=2@0.1"],
    vlmprune.method("pyramiddrop"),
]


@pytest.fixture(scope="module")
def loaded():
    return embedded.load_model()


@pytest.fixture(scope="module")
def question():
    return embedded.questions()[18]


@pytest.fixture(scope="module")
def compared(loaded, question):
    return vlmprune.compare(
        *loaded,
        question.image,
        question.question,
        METHODS,
        keep_ratio=0.2,
        answer=question.answer,
        max_new_tokens=8,
        repeats=1,
    )


def test_a_wrapped_model_is_compared_as_what_it_wraps(loaded, question):
    model, processor = loaded
    compared = vlmprune.compare(
        torch.nn.DataParallel(model),
        processor,
        question.image,
        question.question,
        ["random"],
        keep_ratio=0.2,
        max_new_tokens=2,
        repeats=1,
    )
    assert [row.refusal for row in compared.rows] == [None, None]
    assert compared.rows[1].tokens < compared.dense.tokens


def answer_of(model, processor, question) -> str:
    text = embedded.prompt(processor, question.question)
    inputs = processor(images=question.image, text=text, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_each_row_is_what_patching_by_hand_gives(compared, loaded, question):
    model, processor = loaded
    names = [row.name for row in compared.rows]
    assert names == [
        "dense",
        "random@0.2",
        "divprune@40",
        "fastv:layer=3@0.25",
        "cdpruner@0.2",
        "divprune@0.5+fastv:layer=3@0.2",
        "grid@0.5+fastv@0.1",
        "pyramiddrop@published",
    ]
    assert compared.dense.answer == answer_of(model, processor, question).strip()
    assert compared.dense.tokens == compared.dense.average_tokens == 196
    assert compared.dense.flops_share == 1
    by_hand = {
        "divprune@40": vlmprune.method("divprune", keep_tokens=40),
        "fastv:layer=3@0.25": vlmprune.method("fastv", layer=3, keep_ratio=0.25),
    }
    for name, call in by_hand.items():
        row = compared.rows[names.index(name)]
        with vlmprune.patch(model, call) as handle:
            assert row.answer == answer_of(model, processor, question).strip()
            per_layer = handle.last.tokens_per_layer[0]
            assert row.tokens == handle.last.tokens_kept[0]
            drawn = handle.overlay(question.image)
        assert row.average_tokens == sum(per_layer) / len(per_layer)
        assert ImageChops.difference(row.picture, drawn).getbbox() is None
        decoder = vlmprune.adapters.registry.family_of(model).shape.decoder
        assert row.flops_share == visual_share(per_layer, 196, decoder)
        assert row.first_token_seconds > 0 and 0 < row.kv_bytes < compared.dense.kv_bytes
        assert row.correct == (row.answer == question.answer)


def test_the_model_stays_as_it_was(loaded, question):
    model, processor = loaded
    answer_of(model, processor, question)
    before = snapshot(model)
    vlmprune.compare(
        model, processor, question.image, question.question, ["hiprune@9", "cdpruner@9"], repeats=1
    )
    assert not differences(before, snapshot(model))


def test_a_patch_of_the_caller_is_back_afterwards(loaded, question):
    model, processor = loaded
    dense = answer_of(model, processor, question)
    with vlmprune.patch(model, "grid", keep_tokens=9) as handle:
        before = zoo.hooks(model)
        found = vlmprune.compare(
            model, processor, question.image, question.question, ["hiprune@9"], repeats=1
        )
        (swept,) = sweep_model(model, processor, [], [0.5], limit=1)
        assert found.dense.tokens == swept["tokens"]["kept_per_image"] == 196
        assert found.dense.answer == dense
        assert handle.active and zoo.hooks(model) == before


def test_what_a_method_cannot_do_is_a_row_of_its_own(compared):
    refused = compared.rows[4]
    assert isinstance(refused.refusal, vlmprune.MissingSignalError)
    assert refused.measured is refused.tokens is refused.picture is None
    line = compared.table().rows[4]
    assert line[0] == "cdpruner@0.2" and line[1].startswith("not applicable: cdpruner compares")
    assert str(compared).count("\n| ") == len(compared.rows) + 2  # headers, rule


def test_one_picture_for_all(compared):
    whole = compared.picture()
    shown = [row for row in compared.rows if row.picture is not None]
    assert len(shown) == 7
    narrow = compared.picture(columns=2)
    assert narrow.width < whole.width and narrow.height > whole.height
    assert compared.picture(columns=50).width > 7 * 300
    with pytest.raises(ValueError, match="columns=0"):
        compared.picture(columns=0)


def test_right_and_wrong_answers_differ_in_colour():
    def colours(color: str) -> set:
        panel = Panel(Image.new("RGB", (50, 40), "gray"), "what", "answer", color)
        return {color for _, color in side_by_side("title", [panel], 3).getcolors(100_000)}

    assert (176, 32, 32) in colours("#b02020") and (176, 32, 32) not in colours("#2a7a2a")


def test_long_answers_are_cut_not_spilled():
    panel = Panel(Image.new("RGB", (336, 336), "gray"), "caption", "word " * 200 + "x" * 400)
    sheet = side_by_side("a title " * 40, [panel], 3)
    assert sheet.width == 336 + 2 * 12
    right = sheet.crop((sheet.width - 10, 0, sheet.width, sheet.height))
    assert right.getcolors() == [(right.width * right.height, (255, 255, 255))]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.cells.append(data)


def test_html_holds_table_and_picture_and_escapes(loaded, question):
    text = '<script>alert("x")</script> & "quotes"'
    compared = vlmprune.compare(
        *loaded, question.image, text, "grid@0.5", max_new_tokens=2, repeats=1
    )
    written = compared._repr_html_()
    page = Page(written)
    assert "script" not in page.tags and page.tags.count("tr") == 3
    assert "grid@0.5" in page.cells and "98" in page.cells
    data = re.search(r'src="data:image/jpeg;base64,([^"]+)"', written)[1]
    with Image.open(io.BytesIO(base64.b64decode(data))) as found:
        assert found.size == compared.picture().size
    assert len(written) < 150_000


def test_pictures_are_read_from_files(loaded, question, tmp_path):
    path = tmp_path / "scene.png"
    question.image.convert("RGBA").save(path)
    for image in (path, str(path)):
        compared = vlmprune.compare(
            *loaded, image, question.question, "grid@0.5", max_new_tokens=8, repeats=1
        )
        assert compared.dense.answer == answer_of(*loaded, question).strip()


def test_several_budgets(loaded, question):
    compared = vlmprune.compare(
        *loaded,
        question.image,
        question.question,
        ["grid", "pyramiddrop"],
        budgets=[0.5, 20, "published"],
        max_new_tokens=1,
        repeats=1,
    )
    assert [row.name for row in compared.rows] == [
        "dense",
        *("grid@0.5", "grid@20"),
        *("pyramiddrop@0.5", "pyramiddrop@20", "pyramiddrop@published"),
    ]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"methods": "divprun"}, vlmprune.UnknownMethodError, "divprune"),
        ({"methods": "divprune"}, vlmprune.BudgetError, "divprune@0.25"),
        ({"methods": [3]}, vlmprune.MethodFieldError, "3 is no method"),
        ({"methods": [[]]}, vlmprune.MethodFieldError, "no method"),
        (
            {"methods": "grid", "keep_ratio": 0.5, "keep_tokens": 3},
            vlmprune.BudgetError,
            "exactly one",
        ),
        ({"methods": "grid", "keep_ratio": 0.5, "budgets": [3]}, vlmprune.BudgetError, "together"),
        ({"image": "no/such/file.png"}, InputError, "no/such/file.png"),
        ({"image": __file__}, InputError, "not a picture"),
        ({"question": " "}, InputError, "empty"),
    ],
)
def test_mistakes_are_named_before_anything_runs(changed, error, message):
    given = {"image": picture("A"), "question": "why?", "methods": "grid@0.5"} | changed
    with pytest.raises(error, match=re.escape(message)):
        vlmprune.compare(None, None, **given)


def test_a_processor_without_a_chat_template_is_refused():
    model = CASES["llava-clip-llama"].model()
    with pytest.raises(TaskError, match="chat template"):
        vlmprune.compare(model, object(), picture("A"), "why?", "grid@0.5")


class Chat(FakeProcessor):
    """A processor whose chat template marks the place of the image."""

    chat_template = "yes"

    def apply_chat_template(self, messages, add_generation_prompt, **options):
        assert add_generation_prompt
        (message,) = messages
        kinds = [part["type"] for part in message["content"]]
        assert message["role"] == "user" and kinds == ["image", "text"]
        return message["content"][1]["text"]

    def __call__(self, text, images, **options):
        assert text == ["why?"] and len(images) == 1
        return self.case.inputs([(9, "A", 2)])


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_every_family_is_asked_through_its_chat_template(name):
    case = CASES[name]
    compared = vlmprune.compare(
        case.model(), Chat(case), picture("A"), "why?", ["divprune", "vtc_cls"], keep_tokens=6
    )
    assert compared.dense.tokens == case.num_tokens("A")
    assert compared.rows[1].tokens == 6
    assert (compared.rows[2].refusal is None) == case.shape.tower.has_cls
    assert compared.picture().width > 300


def test_the_command_compares_several_methods(tmp_path, capsys):
    argv = ["ask", "embedded:18", "--method", "divprune", "--method", "cdpruner@9"]
    budget = ["--keep_ratio", "0.2", "--save", str(tmp_path / "all.png")]
    assert cli.main([*argv, "--method", "fastv:layer=3", *budget]) == 0
    captured = capsys.readouterr()
    lines = [line.split(" | ") for line in captured.out.splitlines() if " | " in line]
    names = [line[0].removeprefix("| ") for line in lines if "---" not in line[0]]
    assert names == ["Method", "dense", "divprune@0.2", "cdpruner@9", "fastv:layer=3@0.2"]
    assert captured.err.count("not applicable: cdpruner compares image") == 1
    with Image.open(tmp_path / "all.png") as drawn:
        assert drawn.width > 3 * 300 and drawn.height < 600
    assert cli.main([*argv, *budget, "--method_args", "layer=3"]) == 2
    assert "not which of divprune, cdpruner@9" in capsys.readouterr().err


def test_a_loaded_model_is_swept_in_process(loaded, tmp_path):
    def swept():
        return sweep_model(*loaded, ["grid"], [0.5], limit=6, output_path=tmp_path)

    dense, grid = records = swept()
    assert [method_name(r) for r in records] == ["dense", "grid"]
    assert dense["config"]["model"] == "embedded" and grid["tokens"]["kept_per_image"] == 98
    assert main_score(grid)[1]["n"] == 6
    assert swept() == records  # nothing was run again
