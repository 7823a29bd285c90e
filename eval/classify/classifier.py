"""Load an image classifier with its own transform: the embedded one, timm's, or transformers'."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...prune.errors import VlmpruneError
from ..embedded import EMBEDDED
from ..embedded.classifying import load_classifying

_SAMPLED = 64  # values of each parameter that go into the fingerprint


class ClassifierError(VlmpruneError, ValueError):
    """A classifier or a folder of pictures that `vlmprune classify` cannot use.

    Symptom: `classify` stops at `--model` or `--data`.
    Cause: timm is not installed, no such model, no network to fetch it, a folder without class
        folders, or classes that are not the model's.
    Type: `pip install 'vlmprune[timm]'`; no `--model`, for the embedded one; a folder that
        `timm.models.save_for_hf` or `save_pretrained` wrote; one folder of pictures a class.
    Page: ERRORS.md#classifiererror
    """


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode and how pictures come into it.

    Attributes:
        transform: a picture as (C, H, W), as the model's own evaluation has it.
        classes: how many it tells apart.
        labels: its name of each class -> number; empty where it knows no names.
        fingerprint: 12 hex digits over configuration, transform and a sample of every weight.
        attention: how it is computed: `sdpa`, `eager`, ...
    """

    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    classes: int
    labels: Mapping[str, int]
    fingerprint: str
    attention: str

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        found = self.model(pixels)
        return found if isinstance(found, Tensor) else found[0]


def load_classifier(name: str, *, device: str, dtype: str) -> Classifier:
    """
    Args:
        name: `embedded`, a model of timm (its pretrained weights are fetched), `hf-hub:` or
            `local-dir:` names of timm, a folder that timm or transformers saved, or a name on the
            Hub: `timm/...` is timm's, all others are transformers'.

    Raises:
        ClassifierError: it cannot be had, or is no classifier.
    """
    try:
        found = _found(name)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        if isinstance(error, ClassifierError):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClassifierError(
            f"Classifier {name!r} cannot be loaded: {first} Give a name of timm, a folder that "
            f"timm or transformers saved, or a name on the Hugging Face Hub; what is there by name "
            f"alone is fetched, which needs a network (or the cache of an earlier run). Without "
            f"one, leave --model out, or give a folder."
        ) from error
    found.model.eval().to(device=device, dtype=getattr(torch, dtype))
    return found


def _found(name: str) -> Classifier:
    if name == EMBEDDED:
        return _embedded()
    source = _timm_source(name)
    return _of_transformers(name) if source is None else _of_timm(source)


def _embedded() -> Classifier:
    model, processor, labels = load_classifying()
    return _with_processor(model, processor, labels, len(labels))


def _timm_source(name: str) -> str | None:
    """What `timm.create_model` takes; None for a model of transformers."""
    folder = Path(name)
    if folder.is_dir():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ClassifierError(
                f"{name!r} has no config.json that can be read: give a folder that "
                f"timm.models.save_for_hf or save_pretrained wrote."
            ) from error
        return f"local-dir:{folder}" if "architecture" in config else None
    if name.startswith("timm/"):
        return f"hf-hub:{name}"
    return None if "/" in name and ":" not in name else name


def _of_timm(name: str) -> Classifier:
    try:
        import timm
        from timm.data import create_transform, resolve_model_data_config
    except ImportError as error:
        raise ClassifierError(
            f"{name!r} is a model of timm, which is not installed: pip install 'vlmprune[timm]'."
        ) from error
    model = timm.create_model(name, pretrained=True)
    if not getattr(model, "num_classes", 0):
        raise ClassifierError(f"{name!r} has no classes (num_classes=0): give a classifier.")
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    config = [model.pretrained_cfg.get("architecture"), str(transform), str(model)]
    return Classifier(
        model,
        transform,
        model.num_classes,
        _timm_labels(model),
        _fingerprint(model, config),
        "sdpa" if any(getattr(m, "fused_attn", False) for m in model.modules()) else "eager",
    )


def _timm_labels(model: Any) -> dict[str, int]:
    """The names in its configuration, else those of ImageNet's folders (n01440764, ...)."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names = list(model.pretrained_cfg.get("label_names") or ())
    if not names and model.num_classes >= 1000:
        subset = infer_imagenet_subset(model)
        names = ImageNetInfo(subset).label_names() if subset else []
    return {str(label): number for number, label in enumerate(names)}


def _of_transformers(name: str) -> Classifier:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(name)

    named = model.config.label2id
    labels = {} if "LABEL_0" in named else {str(k): int(v) for k, v in named.items()}
    return _with_processor(model, processor, labels, model.config.num_labels)


def _with_processor(
    model: Any, processor: Any, labels: Mapping[str, int], classes: int
) -> Classifier:
    def transform(picture: Image.Image) -> Tensor:
        return processor(images=picture, return_tensors="pt")["pixel_values"][0]

    config = [str(model), processor.to_json_string()]
    return Classifier(
        model,
        transform,
        classes,
        labels,
        _fingerprint(model, config),
        model.config._attn_implementation,
    )


def _fingerprint(model: nn.Module, config: list[Any]) -> str:
    digest = hashlib.sha256(json.dumps(config).encode())
    for key, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:12]
