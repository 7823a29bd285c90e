"""`vlmprune classify` on tiny classifiers and a dozen pictures, offline."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from kit import skips
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from vlmprune.eval import cli
from vlmprune.eval.classify import running
from vlmprune.eval.classify.classifier import ClassifierError, load_classifier
from vlmprune.eval.classify.measuring import measure
from vlmprune.eval.classify.pictures import read_pictures
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
    return [json.loads(line) for line in (out / "classify.jsonl").read_text().splitlines()]


def test_every_cell_is_recorded_and_run_once(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert classify(model, data, out, "--methods", "tome", "evit@0.25", "--budgets", "0.5") == 0
    dense, tome, evit = found = lines(out)
    assert [r["status"] for r in found] == ["ok"] * 3
    assert [r["top1"]["n"] for r in found] == [12] * 3
    assert dense["tokens_kept"] is None and tome["tokens_kept"] > evit["tokens_kept"]
    assert dense["gflops"] > tome["gflops"] > 0
    shown = capsys.readouterr().out
    value, low, high = difference(tome["top1"], dense["top1"])
    assert f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" in shown
    assert classify(model, data, out, "--methods", "tome,evit@0.25,tome@0.25") == 0
    assert len(lines(out)) == 4
    assert "1 run, 3 already there" in capsys.readouterr().err
    assert cli.main(["report", str(out / "classify.jsonl")]) == 2
    assert "classify.md" in capsys.readouterr().err


def test_another_picture_or_batch_size_is_another_cell(model, data, tmp_path):
    out = tmp_path / "out"
    assert classify(model, data, out, "--methods", "dense") == 0
    assert classify(model, data, out, "--methods", "dense", "--batch_size", "4") == 0
    Image.new("RGB", (40, 50)).save(data / "cat" / "0.png")
    assert classify(model, data, out, "--methods", "dense") == 0
    assert len({record["id"] for record in lines(out)}) == 3


def test_a_cell_that_fails_is_recorded_and_tried_again(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    for runs in (1, 2):
        assert classify(model, data, out, "--methods", "divprune@0.5,tome@0.5") == 1
        failed = [r for r in lines(out) if r["status"] == "failed"]
        assert len(failed) == runs
        assert failed[0]["error"]["message"] and "failed: divprune" in capsys.readouterr().err
    assert [r["status"] for r in lines(out)].count("ok") == 2


def test_an_interrupted_run_goes_on_where_it_stopped(model, data, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "out", running.measure

    def interrupted(classifier, pictures, calls, **options):
        if calls:
            raise KeyboardInterrupt
        return real(classifier, pictures, calls, **options)

    with monkeypatch.context() as patched:
        patched.setattr(running, "measure", interrupted)
        assert classify(model, data, out, "--methods", "tome@0.5") == 130
    assert len(lines(out)) == 1
    assert classify(model, data, out, "--methods", "tome@0.5") == 0
    assert "1 run, 1 already there" in capsys.readouterr().err


def test_flops_are_those_of_a_vit(model, data):
    """Patches, projections, attention and MLP (of timm four times as wide, of ours twice), head."""
    classifier = load_classifier(str(model), device="cpu", dtype="float32")
    pictures = read_pictures(data, classifier, None)
    n, c, depth = 65, 24, 4
    wide = 4 if type(classifier.model).__module__.startswith("timm") else 2
    block = 2 * n * c * c * (4 + 2 * wide) + 4 * n * n * c
    total = 2 * (n - 1) * 48 * c + depth * block + 2 * c * classifier.classes
    dense = measure(classifier, pictures, [], batch_size=4, seed=0)
    assert dense["gflops"] == pytest.approx(total / 1e9)


def test_outcomes_are_the_model_s_own(model, data):
    """In the order of pictures, against one pass over all; and the model is left as it was."""
    classifier = load_classifier(str(model), device="cpu", dtype="float32")
    pictures = read_pictures(data, classifier, None)
    ((pixels, right),) = pictures.batches(classifier, 12)
    with torch.no_grad():
        logits = classifier.logits(pixels)
    wanted = [float(a == b) for a, b in zip(logits.argmax(-1).tolist(), right, strict=True)]
    calls = [part.call for part in combined(["tome"], ["0.5"], 0)[1]]
    measure(classifier, pictures, calls, batch_size=5, seed=0)
    dense = measure(classifier, pictures, [], batch_size=12, seed=0)
    assert dense["top1"]["outcomes"] == wanted
    assert torch.equal(classifier.logits(pixels), logits)


def test_pictures_are_limited_with_every_class_alike(model, data):
    classifier = load_classifier(str(model), device="cpu", dtype="float32")
    pictures = read_pictures(data, classifier, 6)
    assert [name for _, name in pictures.files] == [name for name in CLASSES for _ in range(2)]


def test_folders_are_classes_by_their_names(data, tmp_path):
    """Where the model knows them all: three of its four classes, in another order."""
    _of_transformers(tmp_path / "model")
    classifier = load_classifier(str(tmp_path / "model"), device="cpu", dtype="float32")
    pictures = read_pictures(data, classifier, None)
    assert pictures.named and dict(pictures.numbers) == {"cat": 2, "dog": 1, "eel": 0}
    (data / "cat").rename(data / "cow")
    with pytest.raises(ClassifierError, match=r"3 class folders.*4 classes"):
        read_pictures(data, classifier, None)


@skips.needs("timm")
def test_without_names_there_are_as_many_folders_as_classes(data, tmp_path):
    _of_timm(tmp_path / "three")
    _of_timm(tmp_path / "five", classes=5)
    three, five = (
        load_classifier(str(tmp_path / name), device="cpu", dtype="float32")
        for name in ("three", "five")
    )
    assert dict(read_pictures(data, three, None).numbers) == {"cat": 0, "dog": 1, "eel": 2}
    with pytest.raises(ClassifierError, match="5 classes"):
        read_pictures(data, five, None)


def test_what_cannot_be_loaded_says_what_to_type(data, tmp_path, monkeypatch):
    with pytest.raises(ClassifierError, match=r"no config\.json"):
        load_classifier(str(data), device="cpu", dtype="float32")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ClassifierError, match=r"pip install 'vlmprune\[timm\]'"):
        load_classifier("vit_tiny_patch16_224", device="cpu", dtype="float32")
