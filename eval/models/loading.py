"""Load the embedded model or any other, and tell two models apart by what they compute with."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...adapters.devices import offload_hooks
from ...prune.errors import MethodFieldError, VlmpruneError, did_you_mean
from ..embedded import MODELS
from .registry import all_families, known_family

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from ...adapters.clip_text import ClipText

LOADING_ARGS = ("revision", "trust_remote_code")
PIXEL_ARGS = ("min_pixels", "max_pixels")
SHARDED = "auto"
"""The device of a model that is spread over all devices there are, then memory, then disk."""
_SAMPLED = 64  # values of each parameter that go into the fingerprint


class ModelLoadError(VlmpruneError, OSError):
    """A model or device that cannot be had.

    Symptom: a command stops at `--model`, `--device` or `--clip`.
    Cause: no such folder or name on the Hub, no network, a package that the processor wants, or a
        device that this PyTorch does not see.
    Type: a folder, a name on the Hub, or no `--model` for the embedded one; `pip install
        num2words` for SmolVLM; `--device cpu`.
    Page: ERRORS.md#modelloaderror
    """


def resolve_device(name: str | None, *, may_shard: bool = False) -> str:
    """`name`, or CUDA where there is one, else the CPU.

    Args:
        may_shard: let `auto` pass, which `load` spreads the model for.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == SHARDED:
        if may_shard:
            return name
        raise ModelLoadError(
            "Device 'auto' spreads one checkpoint over all devices, which neither a model that is "
            "made here nor one of several processes can be: write cpu, cuda or cuda:0."
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        auto = " (or auto, to spread a large model)" if may_shard else ""
        raise ModelLoadError(f"Unknown device {name!r}: write cpu, cuda or cuda:0{auto}.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(
            f"Device {name!r}: this PyTorch sees no CUDA device; use --device cpu."
        )
    return name


def load(
    name: str,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device: str = "cpu",
    device_map: str | Mapping[str, str | int] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    processor_args: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model in evaluation mode and its processor.

    Args:
        name: `embedded`, `embedded-where`, a folder, or a name on the Hugging Face Hub.
        dtype: `auto` is float32 on the CPU and elsewhere the checkpoint's own.
        attn_implementation: None leaves the choice to transformers.
        device: where the whole model goes; `auto` is device_map="auto".
        device_map: which device each part goes to, as `from_pretrained` takes it: `auto` fills all
            accelerators, then memory, then the disk. It takes the place of `device`.
        revision: branch, tag or commit of a model on the Hub.
        trust_remote_code: whether code of the checkpoint may be run.
        processor_args: further arguments of the processor, e.g. {"max_pixels": 1003520}.

    Raises:
        ModelLoadError: the model cannot be had, or not in this way.
    """
    if device == SHARDED and device_map is None:
        device_map = SHARDED
    on_cpu = not torch.cuda.is_available() if device_map is not None else device == "cpu"
    if dtype == "auto" and (on_cpu or name in MODELS):
        dtype = "float32"
    source: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        source["revision"] = revision
    chosen: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if attn_implementation:
        chosen["attn_implementation"] = attn_implementation
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        path = path_of(name)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **chosen, **source)
        if device_map is None:
            model = model.to(device)
        return model.eval(), AutoProcessor.from_pretrained(path, **source, **(processor_args or {}))
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        instead = "Give a folder, a name on the Hugging Face Hub, or leave --model out for the "
        if isinstance(error, ImportError):  # which says what to install
            instead = "Install that, or leave --model out for the "
        raise ModelLoadError(
            f"Model {name!r} cannot be loaded: {first} {instead}embedded model."
        ) from error


def split_model_args(args: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`--model_args` as what `load` takes and the limits of pictures.

    Raises:
        MethodFieldError: an argument that is neither.
    """
    for name in args:
        if name not in LOADING_ARGS + PIXEL_ARGS:
            hint = did_you_mean(name, [*LOADING_ARGS, *PIXEL_ARGS])
            raise MethodFieldError(f"--model_args {name}: unknown. {hint}")
    parts = (
        {name: args[name] for name in some if name in args} for some in (LOADING_ARGS, PIXEL_ARGS)
    )
    loading, pixels = parts
    return loading, pixels


def scales_pictures(model: PreTrainedModel) -> bool:
    """Whether the processors of this model's family scale pictures to limits."""
    family = known_family(model.config.model_type)
    return family is not None and family.scaling is not None


def limit_pixels(model: PreTrainedModel, processor: Any, limits: Mapping[str, int]) -> Any:
    """A copy of a processor that scales pictures to `min_pixels` and `max_pixels`.

    Raises:
        MethodFieldError: the model's family knows no such limits.
    """
    if not scales_pictures(model):
        lines = {family.line for family in all_families() if family.scaling}
        raise MethodFieldError(
            f"{', '.join(limits)}: only the {' and '.join(sorted(lines))} families scale pictures "
            f"to limits, not "
            f"{model.config.model_type}: leave it out."
        )
    limited = copy.deepcopy(processor)
    for part in (limited.image_processor, limited.video_processor):
        old: dict[str, Any] = dict(part.size if isinstance(part.size, dict) else vars(part.size))
        new = {
            "shortest_edge": limits.get("min_pixels", old.get("shortest_edge")),
            "longest_edge": limits.get("max_pixels", old.get("longest_edge")),
        }
        part.size = new if isinstance(part.size, dict) else type(part.size)(**new)
    return limited


def path_of(name: str) -> str:
    """What `from_pretrained` takes for a model's name."""
    return str(MODELS.get(name, name))


def load_clip(name: str | None, processor: Any, *, device: str) -> ClipText | None:
    """The text encoder of a CLIP checkpoint, a folder or a hub name; None without a name."""
    if name is None:
        return None
    from ...adapters.clip_text import ClipText

    try:
        return ClipText.from_pretrained(name, processor).to(
            resolve_device(None) if device == SHARDED else device
        )
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

    The same for a checkpoint loaded from a folder or from the Hub, on one device or on several;
    another one after retraining.
    """
    digest = hashlib.sha256()
    config = model.config.to_diff_dict()
    digest.update(json.dumps(_stable(config), sort_keys=True, default=str).encode())
    for key, tensor in model.state_dict().items():
        flat = (_offloaded(model, key) if tensor.is_meta else tensor.detach()).flatten()
        step = max(1, flat.numel() // _SAMPLED)
        values = flat[::step].to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:12]


def _offloaded(model: PreTrainedModel, key: str) -> Tensor:
    """A parameter that waits in memory or on the disk until its module runs."""
    path, _, name = key.rpartition(".")
    for hook in offload_hooks(model.get_submodule(path)):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and name in weights:
            found: Tensor = weights[name]
            return found
    raise ModelLoadError(
        f"{key} is on the meta device, and nothing says where its values are: load the model with "
        f"its weights."
    )


def _stable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what depends on how and by which version it was loaded."""
    loose = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
    return {
        key: _stable(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in loose and not key.startswith("_attn")
    }
