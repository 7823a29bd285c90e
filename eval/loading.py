"""Load the embedded model or any other, and tell two models apart by what they compute with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..prune.errors import VlmpruneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from ..adapters.clip_text import ClipText

EMBEDDED = "embedded"
_SAMPLED = 64  # values of each parameter that go into the fingerprint


class ModelLoadError(VlmpruneError, OSError):
    """A model or device that cannot be had."""


def resolve_device(name: str | None) -> str:
    """`name`, or CUDA where there is one, else the CPU."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelLoadError(f"Unknown device {name!r}: write cpu, cuda or cuda:0.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(
            f"Device {name!r}: this PyTorch sees no CUDA device; use --device cpu."
        )
    return name


def load(
    name: str, *, dtype: str = "auto", attn_implementation: str | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model in evaluation mode and its processor.

    Args:
        name: `embedded`, a folder, or a name on the Hugging Face Hub.
        dtype: `auto` is float32 on the CPU and elsewhere the checkpoint's own.
        attn_implementation: None leaves the choice to transformers.
    """
    if dtype == "auto" and (device == "cpu" or name == EMBEDDED):
        dtype = "float32"
    try:
        if name == EMBEDDED:
            from . import embedded

            model, processor = embedded.load_model(
                dtype=dtype, attn_implementation=attn_implementation or "sdpa", device=device
            )
            return model.eval(), processor
        from transformers import AutoModelForImageTextToText, AutoProcessor

        chosen = {"attn_implementation": attn_implementation} if attn_implementation else {}
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **chosen)
        return model.eval().to(device), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"Model {name!r} cannot be loaded: {first} Give a folder, a name on the Hugging Face "
            f"Hub, or leave --model out for the embedded model."
        ) from error


def load_clip(name: str | None, processor: Any, *, device: str) -> ClipText | None:
    """The text encoder of a CLIP checkpoint, a folder or a hub name; None without a name."""
    if name is None:
        return None
    from ..adapters.clip_text import ClipText

    try:
        return ClipText.from_pretrained(name, processor).to(device)
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"--clip {name!r} cannot be loaded: {error} Give the CLIP checkpoint that the model's "
            f"vision tower comes from, e.g. openai/clip-vit-large-patch14-336."
        ) from error


def short_name(name: str) -> str:
    """How result files call a model: a folder by its last part, so that results can move."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def fingerprint(model: PreTrainedModel) -> str:
    """12 hex digits over the configuration and a sample of every parameter's values.

    The same for a checkpoint loaded from a folder or from the Hub; another one after retraining.
    """
    digest = hashlib.sha256()
    config = model.config.to_diff_dict()
    digest.update(json.dumps(_stable(config), sort_keys=True, default=str).encode())
    for key, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // _SAMPLED)
        values = flat[::step].to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:12]


def _stable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what depends on how and by which version it was loaded."""
    loose = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
    return {
        key: _stable(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in loose and not key.startswith("_attn")
    }
