"""What benches, checks, loading and lmms-eval know of a model family, in one class a family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ...prune.errors import UnsupportedModelError
from .smaller import Count, Smaller
from .tiny_models import Case


@dataclass(frozen=True)
class Shape:
    """A configuration and the picture (height, width in pixels) that is usual for it."""

    name: str
    config: Callable[[], PreTrainedConfig]
    picture: tuple[int, int]


@dataclass(frozen=True)
class Pixels:
    """What a processor makes of a batch of pictures."""

    tokens: int
    """Visual tokens of each picture."""
    inputs: dict[str, Tensor]
    marks: tuple[int, int] | None = None
    """What stands around each picture."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How the family's wrapper in lmms-eval has qwen_vl_utils read and scale pictures and videos
    before the processor sees them."""

    limits_images: bool = False
    """Whether pictures too, and not videos alone, are given the processor's limits there."""
    thins_videos: bool = False
    """Whether two frames a second are read, and evenly spaced ones of these are shown."""
    limits_fps: bool = False
    """Whether `num_frames` is the most where frames a second are asked for."""
    system_prompt: bool = False
    """Whether chats without a system prompt are given one."""
    patch_size: int | None = None
    """Of the encoder, where the processor leaves pictures as they were scaled; None: it scales them
    once more."""


class EvalFamily(ABC):
    """One model family. A class is derived from it in `eval/models/families/<model_type>.py`."""

    line: ClassVar[str]
    """What the family and its relatives are called together."""
    shapes: ClassVar[tuple[Shape, ...]] = ()
    """Sizes of published checkpoints."""
    small_shapes: ClassVar[tuple[Shape, ...]] = ()
    tiny: ClassVar[tuple[Case, ...]]
    """Tiny models that methods are checked on and tests run."""
    wrapper: ClassVar[str]
    """What lmms-eval calls its own wrapper of such checkpoints of the Hugging Face Hub."""
    flat_pictures: ClassVar[bool] = False
    """Whether that wrapper hands the processor pictures without saying of which prompt each is."""
    scaling: ClassVar[Scaling | None] = None
    """None: the processor takes pictures as they are and knows no limits of their size."""

    @abstractmethod
    def usual_picture(self, config: Any) -> tuple[int, int]:
        """Height and width in pixels, for a model that is no shape."""

    @abstractmethod
    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        """Noise of `picture` (height, width in pixels), once a prompt.

        Raises:
            MethodFieldError: the model sees no pictures of this size.
        """

    def kinds(self, config: Any, ids: Tensor) -> dict[str, Tensor]:
        """What a processor says of the kinds of tokens `ids` (B, L)."""
        return {}

    def processor(self, config: Any, tokenizer: Any) -> Any:
        """A processor for a model of random weights, whose pictures are of their usual size.

        Args:
            config: the model's.
            tokenizer: of words, one of which is `tokenizer.image_token`.

        Raises:
            UnsupportedModelError: nobody has said how.
        """
        raise UnsupportedModelError(
            f"A processor of {config.model_type} is not made here: give a checkpoint by --model, "
            f"which has one, or leave --shape out."
        )

    def smaller(self, config: Any, processor: Any, count: Count) -> Smaller:
        """How `downsample` makes pictures smaller.

        Args:
            config: the model's.
            processor: the model's, which stays as it is.
            count: as many tokens as are wanted, of an image that has so many.

        Raises:
            UnsupportedModelError: nobody has said how, or its processor does not allow it.
        """
        raise UnsupportedModelError(
            f"downsample: how pictures of {config.model_type} become smaller is not known; its "
            f"tokens do not follow from one size alone. Use pool or grid there, or say it in "
            f"EvalFamily.smaller."
        )


class EvalFamilyBySizes(EvalFamily):
    """The family whose models the bench makes of any width, depth and number of visual tokens."""

    @abstractmethod
    def of_sizes(self, *, layers: int, width: int, side: int) -> PreTrainedConfig:
        """A model of `side` x `side` visual tokens."""


def noise(device: str, *shape: int) -> Tensor:
    """The same values every time; none on the device `meta`."""
    if device == "meta":
        return torch.empty(*shape, device=device)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
