"""The preset of classifiers: its flags are those of `classify`, its numbers stand beside measured
ones, and what it needs is said before anything is loaded."""

from __future__ import annotations

import json

import pytest
import torch
import vlmprune
from kit import skips
from vlmprune.eval import cli
from vlmprune.eval.arguments.classify import classify_parser
from vlmprune.eval.arguments.config import ConfigError, of_preset
from vlmprune.eval.arguments.sweep import sweep_parser
from vlmprune.eval.classify.classifier import Classifier
from vlmprune.eval.classify.counting import flops_of
from vlmprune.eval.classify.pictures import IMAGENET
from vlmprune.eval.presets import preset
from vlmprune.eval.results.records import CLASSES
from vlmprune.eval.results.statistics import mean_score, spread
from vlmprune.eval.words.parts import combined
from vlmprune.prune.errors import VlmpruneError

DEIT = preset("deit-s")
MODEL = "timm/deit_small_patch16_224.fb_in1k"


def test_its_flags_are_those_of_classify():
    given = of_preset(classify_parser(), "deit-s", "classify")
    assert given["model"] == MODEL and given["methods"] == list(DEIT.methods)
    assert len(combined(given["methods"], given["budgets"], 0)) == 1 + len(DEIT.methods)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sweep", "--preset", "deit-s"], "vlmprune classify --preset deit-s"),
        (["classify", "--preset", "llava-1.5"], "vlmprune sweep --preset llava-1.5"),
        (["classify", "--preset", "deit-t"], "Did you mean: deit-s"),
        (["classify", "--preset", "deit-s"], "give --data FOLDER"),
        (["classify", "--preset", "deit-s", "--data", "gone"], "is no folder"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(argv, said, capsys, monkeypatch):
    monkeypatch.delattr("vlmprune.eval.commands.classify.load_classifier")
    assert cli.main(argv) == 2
    assert said in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_fetched_says_what_else_there_is(tmp_path, capsys, monkeypatch):
    from vlmprune.eval.classify import classifier

    def offline(name):
        raise OSError("We cannot find the requested files in the local cache.\nmore")

    monkeypatch.setattr(classifier, "_of_timm", offline)
    out = ["-o", str(tmp_path / "out")]
    assert cli.main(["classify", "--preset", "deit-s", "--data", str(tmp_path), *out]) == 2
    said = capsys.readouterr().err
    assert "needs a network" in said and "leave --model out" in said


def _record(methods: list[dict], top1: float, gmacs: float, share: float) -> dict:
    config = {
        "model": MODEL,
        "fingerprint": "f",
        "methods": methods,
        "positions": None,
        "task": IMAGENET,
        "task_version": "v",
        "limit": 1000,
        "seed": 0,
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "task_kind": CLASSES,
        "batch_size": 4,
    }
    right = round(1000 * top1)
    return {
        "schema": 4,
        "id": f"{len(methods):016x}",
        "status": "ok",
        "config": config,
        "finished": "2026-01-02T03:04:05+00:00",
        "seconds": 2.0,
        "batch_size": 4,
        "load_average": None,
        "versions": {"vlmprune": "0"},
        "hardware": {"device": "cpu", "cpu": "c", "cpu_cores": 1, "torch_threads": 1},
        "scores": {"top-1": mean_score([1.0] * right + [0.0] * (1000 - right))},
        "tokens": None,
        "flops": {"forward": 2e9 * gmacs, "forward_share": share},
        "times": {"picture": spread([0.01]), "dense_picture": None, "share_of_dense": None},
        "peak_memory_bytes": None,
        "positions": None,
        "notes": [],
        "examples": [],
    }


def test_published_numbers_stand_beside_measured_ones(tmp_path, capsys):
    method = vlmprune.method("evit").method
    evit = [{"name": "evit", "fields": method.fields(), "budget": None}]
    records = [_record([], 0.79, 4.6, 1.0), _record(evit, 0.75, 3.03, 0.659)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert cli.main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "| evit | published | ImageNet | 75.0 | 79.5 | -4.5 | EViT" in shown
    assert "| evit | published | GMACs | 3.0 | 3 | +0.0 | EViT" in shown
    assert "measured on 1000 pictures only; trained with the method, which" in shown
    assert "| dense |  | FLOPs % | 100.0 | 100 | +0.0 | Zero-TPrune" in shown


@skips.needs("timm")
@pytest.mark.parametrize("rate", [None, 0.9, 0.8, 0.7, 0.6, 0.5])
def test_counted_multiply_adds_are_the_printed_ones(rate):
    """Of DeiT-S and EViT, to the digit; random weights cost as much."""
    import timm

    printed = {
        entry.fields.get("rate", 0.7) if entry.method == "evit" else None: entry.value
        for entry in DEIT.published
        if entry.lineage == "EViT" and entry.benchmark.name == "GMACs"
    }
    model = timm.create_model("deit_small_patch16_224", pretrained=False).eval()
    classifier = Classifier(model, lambda picture: picture, 1000, {}, "", "sdpa")
    pixels = torch.zeros(1, 3, 224, 224)
    with torch.inference_mode():
        if rate is not None:
            vlmprune.patch(model, "evit", rate=rate)
        assert round(flops_of(classifier, pixels) / 2e9, 1) == printed[rate]


def test_a_preset_of_another_command_is_refused_by_name():
    with pytest.raises(ConfigError, match="vlmprune classify --preset deit-s"):
        of_preset(sweep_parser(), "deit-s", "sweep")
    assert issubclass(ConfigError, VlmpruneError)
