"""What `vlmprune bench model` measures: a model, and prompts with a picture each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from ...adapters.clip_text import ClipText
from ...adapters.registry import family_of
from ...prune.errors import MethodFieldError
from ..image_file import read_picture
from ..models.loading import ModelLoadError, load, path_of, short_name
from ..models.shapes import BY_SIZES, prompt, shape, usual_picture
from ..words.parts import Parts
from .text_twin import random_text_twin


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is measured (a named shape, a checkpoint, or a LLaVA by its sizes), and
    pictures between text tokens for it."""

    shape: str | None = None
    model_name: str | None = None
    picture: tuple[int, int] | None = None
    image: str | None = None
    """A file; else noise of the size of `picture`."""
    layers: int = 12
    width: int = 1024
    visual_tokens: int = 576
    batch_size: int = 1
    ragged: bool = False
    """Whether the prompts differ in length, so that all but the longest are padded."""
    dtype: str = "float32"
    attn_implementation: str = "sdpa"

    @property
    def name(self) -> str:
        if self.model_name is not None:
            return short_name(self.model_name)
        return f"{self.shape or BY_SIZES.line}, random weights"

    def config(self) -> PreTrainedConfig:
        if self.model_name is not None:
            from transformers import AutoConfig

            try:
                return AutoConfig.from_pretrained(path_of(self.model_name))
            except (OSError, ValueError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ModelLoadError(
                    f"Model {self.model_name!r} cannot be loaded: {first} Give embedded, a folder, "
                    f"a name on the Hugging Face Hub, or --shape for random weights."
                ) from error
        if self.shape is not None:
            return shape(self.shape).config()
        side = math.isqrt(self.visual_tokens)
        return BY_SIZES.of_sizes(layers=self.layers, width=self.width, side=side)

    def model(self, device: str) -> PreTrainedModel:
        """On the device `meta` there are sizes only."""
        if self.model_name is not None and device != "meta":
            model, _ = load(
                self.model_name,
                dtype=self.dtype,
                attn_implementation=self.attn_implementation,
                device=device,
            )
            return model
        torch.manual_seed(0)
        dtype = getattr(torch, self.dtype)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(
                self.config(), dtype=dtype, attn_implementation=self.attn_implementation
            )
        return model.eval().to(dtype)

    def text_twin(self, device: str, parts: Parts) -> ClipText | None:
        """The text encoder beside a CLIP tower of random weights, where one of `parts` needs it;
        None for other models, where a method that needs one says so."""
        config: Any = self.config()
        vision = config.vision_config
        if self.model_name is not None or vision.model_type != "clip_vision_model":
            return None
        tower = family_of(self.model("meta")).shape
        needs = [need for part in parts for need in part.call.method.needs(tower)]
        if not any(need.of_text_twin for need in needs):
            return None
        return random_text_twin(vision, device=device, dtype=getattr(torch, self.dtype))

    def inputs(self, device: str) -> dict[str, Tensor]:
        if self.image is not None:
            return self._of_image(device)
        config = self.config()
        usual = shape(self.shape).picture if self.shape else usual_picture(config)
        made = prompt(
            config,
            self.picture or usual,
            batch_size=self.batch_size,
            device=device,
            ragged=self.ragged,
        )
        pixels = made["pixel_values"].to(getattr(torch, self.dtype))
        return made | {"pixel_values": pixels}

    def _of_image(self, device: str) -> dict[str, Tensor]:
        """What the checkpoint's processor makes of the file and a question, once a sample."""
        if self.model_name is None:
            raise MethodFieldError(
                f"--image {self.image!r} needs a processor, so --model: random weights see noise."
            )
        from transformers import AutoProcessor

        picture = read_picture(str(self.image))
        try:
            processor: Any = AutoProcessor.from_pretrained(path_of(self.model_name))
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"--image {self.image!r}: {error}") from error
        content = [{"type": "image"}, {"type": "text", "text": "what is in the picture ?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        made = processor(images=[picture], text=[text], return_tensors="pt")
        dtype = getattr(torch, self.dtype)
        return {
            name: value.repeat(self.batch_size, *[1] * (value.dim() - 1)).to(
                "cpu" if device == "meta" else device,
                dtype if value.is_floating_point() else value.dtype,
            )
            for name, value in made.items()
            if name != "labels"  # PaliGemma's, for training
        }

    def parameter_bytes(self) -> int:
        model = self.model("meta")
        return sum(p.numel() * p.element_size() for p in model.parameters())

    def as_json(self) -> dict[str, Any]:
        model = self.model("meta")
        decoder = family_of(model).shape.decoder
        inputs = self.inputs("meta")
        visual = visual_tokens_of(model, inputs)
        return {
            "name": self.name,
            "layers": decoder.num_layers,
            "width": decoder.hidden_size,
            "picture": self.picture,
            "visual_tokens": visual,
            "text_tokens": int(inputs["input_ids"].shape[1]) - visual,
            "batch_size": self.batch_size,
            "ragged": self.ragged,
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameter_bytes": self.parameter_bytes(),
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
        }


def dtype_on(device: str, dtype: str) -> str:
    """`auto` is float32 on the CPU, else bfloat16."""
    if dtype != "auto":
        return dtype
    return "float32" if torch.device(device).type == "cpu" else "bfloat16"


def visual_tokens_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> int:
    """Of each prompt; all have as many."""
    return int((inputs["input_ids"][0] == model.config.image_token_id).sum())
