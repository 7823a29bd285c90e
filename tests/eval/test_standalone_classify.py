"""`vlmprune classify` on tiny classifiers and a dozen pictures, offline."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
import torch
import vlmprune
from kit import skips
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from vlmprune.eval import cli
from vlmprune.eval.classify.benchmark import METRIC, Classification
from vlmprune.eval.classify.classifier import ClassifierError, load_classifier
from vlmprune.eval.classify.pictures import read_pictures
from vlmprune.eval.report.repeat import command_of
from vlmprune.eval.results import read_records
from vlmprune.eval.results.statistics import difference
from vlmprune.eval.words.parts import combined

CLASSES = ("cat", "dog", "eel")


@pytest.fixture
def data(tmp_path):
    """Four noisy pictures of each class."""
    noise = torch.Generator().manual_seed(0)
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 256, (40, 50, 3), generator=noise, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def _of_timm(folder, classes=3):
    import timm

    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        **{"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 32, "patch_size": 4},
        num_classes=classes,
    )
    torch.nn.init.normal_(vit.head.weight)
    sizes = {"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 32, "patch_size": 4}
    vit.pretrained_cfg["input_size"] = (3, 32, 32)
    timm.models.save_for_hf(vit, folder, model_args=sizes, safe_serialization=True)


def _of_transformers(folder):
    torch.manual_seed(0)
    config = ViTConfig(
        **{"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4},
        **{"num_attention_heads": 2, "image_size": 32, "patch_size": 4},
        id2label={0: "eel", 1: "dog", 2: "cat", 3: "fox"},
        label2id={"eel": 0, "dog": 1, "cat": 2, "fox": 3},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.fixture(params=[pytest.param(_of_timm, marks=skips.needs("timm")), _of_transformers])
def model(request, tmp_path):
    request.param(tmp_path / "model")
    return tmp_path / "model"


def classify(model, data, out, *more) -> int:
    where = ["--model", str(model), "--data", str(data), "-o", str(out), "--device", "cpu"]
    return cli.main(["classify", *where, "--batch_size", "5", *more])


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def measured(classifier, pictures, *calls, batch_size=5):
    return Classification(classifier, pictures, batch_size=batch_size).run(calls)[0]


def test_every_cell_is_recorded_and_run_once(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert classify(model, data, out, "--methods", "tome", "evit@0.25", "--budgets", "0.5") == 0
    dense, tome, evit = found = lines(out)
    assert [r["status"] for r in found] == ["ok"] * 3
    assert [r["scores"][METRIC]["n"] for r in found] == [12] * 3
    assert dense["tokens"]["kept_per_image"] == dense["tokens"]["in_per_image"] == 64
    assert 64 > tome["tokens"]["kept_per_image"] > evit["tokens"]["kept_per_image"]
    assert dense["flops"]["forward_share"] == 1 > tome["flops"]["forward_share"] > 0
    shown = capsys.readouterr().out
    value, low, high = difference(tome["scores"][METRIC], dense["scores"][METRIC])
    assert f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" in shown
    assert (out / "table.md").read_text().strip() in shown and (out / "frontier.png").is_file()
    assert classify(model, data, out, "--methods", "tome,evit@0.25,tome@0.25") == 0
    assert len(lines(out)) == 4
    assert "1 run, 3 already there" in capsys.readouterr().err


def test_another_picture_or_batch_size_is_another_cell(model, data, tmp_path):
    out = tmp_path / "out"
    assert classify(model, data, out, "--methods", "dense") == 0
    assert classify(model, data, out, "--methods", "dense", "--batch_size", "4") == 0
    Image.new("RGB", (40, 50)).save(data / "cat" / "0.png")
    assert classify(model, data, out, "--methods", "dense") == 0
    assert len({record["id"] for record in lines(out)}) == 3


def test_methods_that_cannot_work_inside_are_recorded_as_such(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert classify(model, data, out, "--methods", "divprune@0.5,tome@0.5") == 0
    assert [r["status"] for r in lines(out)] == ["ok", "not_applicable", "ok"]
    assert "not applicable: divprune" in capsys.readouterr().err


def test_a_cell_that_fails_is_recorded_and_tried_again(model, data, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "out", Classification.run

    def broken(self, calls=(), **options):
        if calls:
            raise RuntimeError("no room")
        return real(self, calls, **options)

    monkeypatch.setattr(Classification, "run", broken)
    for runs in (1, 2):
        assert classify(model, data, out, "--methods", "tome@0.5") == 1
        failed = [r for r in lines(out) if r["status"] == "failed"]
        assert len(failed) == runs and "failed: tome" in capsys.readouterr().err
    assert [r["status"] for r in lines(out)].count("ok") == 1


def test_an_interrupted_run_goes_on_where_it_stopped(model, data, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "out", Classification.run

    def interrupted(self, calls=(), **options):
        if calls:
            raise KeyboardInterrupt
        return real(self, calls, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Classification, "run", interrupted)
        assert classify(model, data, out, "--methods", "tome@0.5") == 130
    assert len(lines(out)) == 1
    assert classify(model, data, out, "--methods", "tome@0.5") == 0
    assert "1 run, 1 already there" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["html", "md", "csv", "tex"])
def test_reports_show_classifiers_as_they_show_sweeps(model, data, tmp_path, end):
    out, page = tmp_path / "out", tmp_path / f"report.{end}"
    assert classify(model, data, out, "--methods", "tome@0.5,divprune@0.5") == 0
    assert cli.main(["report", str(out), "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert {"html": "Images/s", "md": "Images/s", "csv": "images_per_second", "tex": "GFLOPs"}[
        end
    ] in text
    assert "decoder" not in text.lower() or end == "html"  # whose script is for all
    if end in ("html", "md"):
        assert "vlmprune classify --model" in text and f"--data {data}" in text
        assert "What was kept" not in text or "data:image/jpeg" in text


def test_a_cell_s_command_measures_the_same_cell(model, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert classify(model, data, out, "--methods", "tome:r=2@published", "--limit", "9") == 0
    monkeypatch.chdir(tmp_path)
    for record in read_records(out):
        assert cli.main(shlex.split(command_of(record))[1:]) == 0
    ids = [{record["id"] for record in lines(folder)} for folder in (out, tmp_path / "repeated")]
    assert ids[0] == ids[1]


def test_lm_eval_s_files_hold_classifiers_too(model, data, tmp_path):
    out, folder = tmp_path / "out", tmp_path / "files"
    assert classify(model, data, out, "--methods", "dense", "--log_samples") == 0
    assert cli.main(["report", str(out), "-o", str(folder)]) == 0
    results, samples = sorted(path for path in folder.rglob("*") if path.is_file())
    found = json.loads(results.read_text())["results"]["data"]
    assert found["top-1,none"] == lines(out)[0]["scores"][METRIC]["value"]
    assert len(samples.read_text().splitlines()) == 12


def test_flops_are_those_of_a_vit(model, data):
    """Patches, projections, attention and MLP (of timm four times as wide, of ours twice), head."""
    classifier = load_classifier(str(model), device="cpu", dtype="float32")
    pictures = read_pictures(str(data), classifier, None)
    n, c, depth = 65, 24, 4
    wide = 4 if type(classifier.model).__module__.startswith("timm") else 2
    block = 2 * n * c * c * (4 + 2 * wide) + 4 * n * n * c
    total = 2 * (n - 1) * 48 * c + depth * block + 2 * c * classifier.classes
    dense = measured(classifier, pictures, batch_size=4)
    assert dense["flops"] == {"forward": pytest.approx(total), "forward_share": 1}


def test_outcomes_are_the_model_s_own(model, data):
    """In the order of pictures, against one pass over all; and the model is left as it was."""
    classifier = load_classifier(str(model), device="cpu", dtype="float32")
    pictures = read_pictures(str(data), classifier, None)
    ((pixels, shown),) = pictures.batches(classifier, 12)
    right = [pictures.numbers[each.label] for each in shown]
    with torch.no_grad():
        logits = classifier.logits(pixels)
    wanted = [float(a == b) for a, b in zip(logits.argmax(-1).tolist(), right, strict=True)]
    measured(classifier, pictures, *(part.call for part in combined(["tome"], ["0.5"], 0)[1]))
    assert measured(classifier, pictures, batch_size=12)["scores"][METRIC]["outcomes"] == wanted
    assert torch.equal(classifier.logits(pixels), logits)


def test_patches_that_enter_blocks_are_counted(model, data):
    """EViT in the second of four blocks: its MLP is the first to see fewer rows."""
    classifier = load_classifier(str(model), device="cpu", dtype="float32")
    pictures = read_pictures(str(data), classifier, None)
    call = vlmprune.method("evit", layers=(1,), keep_ratio=0.25)
    tokens = measured(classifier, pictures, call)["tokens"]
    left = tokens["kept_per_image"]
    assert tokens["per_layer"] == [64, (64 + left) / 2, left, left]
    assert tokens["average_per_layer"] == pytest.approx(sum(tokens["per_layer"]) / 4)


def test_pictures_are_limited_with_every_class_alike(model, data):
    classifier = load_classifier(str(model), device="cpu", dtype="float32")
    pictures = read_pictures(str(data), classifier, 6)
    assert [each.label for each in pictures.shown] == [n for n in CLASSES for _ in range(2)]


def test_folders_are_classes_by_their_names(data, tmp_path):
    """Where the model knows them all: three of its four classes, in another order."""
    _of_transformers(tmp_path / "model")
    classifier = load_classifier(str(tmp_path / "model"), device="cpu", dtype="float32")
    pictures = read_pictures(str(data), classifier, None)
    assert dict(pictures.numbers) == {"cat": 2, "dog": 1, "eel": 0}
    (data / "cat").rename(data / "cow")
    with pytest.raises(ClassifierError, match=r"3 class folders.*4 classes"):
        read_pictures(str(data), classifier, None)


@skips.needs("timm")
def test_without_names_there_are_as_many_folders_as_classes(data, tmp_path):
    _of_timm(tmp_path / "three")
    _of_timm(tmp_path / "five", classes=5)
    three, five = (
        load_classifier(str(tmp_path / name), device="cpu", dtype="float32")
        for name in ("three", "five")
    )
    assert dict(read_pictures(str(data), three, None).numbers) == {"cat": 0, "dog": 1, "eel": 2}
    with pytest.raises(ClassifierError, match="5 classes"):
        read_pictures(str(data), five, None)


def test_what_cannot_be_loaded_says_what_to_type(data, tmp_path, monkeypatch):
    with pytest.raises(ClassifierError, match=r"no config\.json"):
        load_classifier(str(data), device="cpu", dtype="float32")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ClassifierError, match=r"pip install 'vlmprune\[timm\]'"):
        load_classifier("vit_tiny_patch16_224", device="cpu", dtype="float32")
