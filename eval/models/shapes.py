"""Models by their sizes: those of published checkpoints and small ones, with a picture for each.

A shape is a configuration that `transformers` builds with random weights; nothing is downloaded.
Pictures come as the tensors that the family's processor would give. What differs between families
is said in `families/`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ...prune.errors import MethodFieldError, did_you_mean
from .family import EvalFamilyBySizes, Shape
from .registry import all_families, eval_family

TEXT_TOKENS = 40
_BEFORE_IMAGE = 5
_FIRST_WORD, _LAST_WORD = 10, 30000
_NO_PICTURE = "No picture can be made"
_PUBLISHED = [shape for family in all_families() for shape in family.shapes]
_SMALL = [shape for family in all_families() for shape in family.small_shapes]
SHAPES = {shape.name: shape for shape in _PUBLISHED + _SMALL}
"""The published sizes of all families, then the small ones."""
BY_SIZES = next(family for family in all_families() if isinstance(family, EvalFamilyBySizes))


def shape(name: str) -> Shape:
    """The shape of this name.

    Raises:
        MethodFieldError: there is none.
    """
    if name not in SHAPES:
        raise MethodFieldError(f"Unknown shape {name!r}. {did_you_mean(name, list(SHAPES))}")
    return SHAPES[name]


def prompt(
    config: PreTrainedConfig,
    picture: tuple[int, int],
    *,
    batch_size: int,
    device: str,
    ragged: bool = False,
) -> dict[str, Tensor]:
    """Prompts of one picture between words, all alike but for the pixels.

    Args:
        picture: height and width in pixels.
        device: of the pixels; what sizes are read from stays on the CPU for `meta`.
        ragged: the last prompt has as many words again before its picture, the first has none of
            these, the others some; padding on the left makes up for them.

    Raises:
        UnsupportedModelError, MethodFieldError: no picture is known for this family, or not of this
            size.
    """
    family = eval_family(config.model_type, _NO_PICTURE)
    made = family.pixels(config, picture, batch_size, device)
    longer = TEXT_TOKENS if ragged else 0
    text = words(config, TEXT_TOKENS + longer, seed=0)
    before = _BEFORE_IMAGE + longer
    image = torch.full((made.tokens,), config.image_token_id)
    if made.marks is not None:
        image = torch.tensor([made.marks[0], *image, made.marks[1]])
    ids = torch.cat([text[:before], image, text[before:]])
    inputs = made.inputs | {"input_ids": ids.repeat(batch_size, 1)}
    missing = torch.linspace(longer, 0, batch_size).long()
    inputs["attention_mask"] = (torch.arange(len(ids)) >= missing[:, None]).long()
    if made.marks is not None:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    inputs |= family.kinds(config, inputs["input_ids"])
    if device != "meta":
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    return inputs


def words(config: Any, count: int, *, seed: int) -> Tensor:
    """Random token ids (count,) that are no placeholders."""
    text = getattr(config, "text_config", config)
    around = [f"{what}_{end}" for what in ("vision", "image", "video") for end in ("start", "end")]
    names = ("image", "video", *around)
    special = [getattr(config, f"{name}_token_id", None) for name in names]
    known = torch.arange(_FIRST_WORD, min(text.vocab_size, _LAST_WORD))
    usable = known[~torch.isin(known, torch.tensor([i for i in special if i is not None]))]
    draw = torch.Generator().manual_seed(seed)
    return usable[torch.randint(len(usable), (count,), generator=draw)]


def usual_picture(config: Any) -> tuple[int, int]:
    """A picture (height, width in pixels) for a model that has no shape here.

    Raises:
        UnsupportedModelError: no picture is known for this family.
    """
    return eval_family(config.model_type, _NO_PICTURE).usual_picture(config)
