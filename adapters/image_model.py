"""What an image encoder must say of itself that is a model of its own, without an LLM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from ..prune.contract import Tower
from ..prune.errors import UnsupportedModelError
from .encoder import Encoder

Model = Any
"""A loaded model of another library; its modules are untyped attributes."""
Keywords = dict[str, Any]


class ImageModel(ABC):
    """A loaded image encoder, or classifier, of another library: a file of `encoders/` for each.

    Classes are told by their names and their modules' names, so that no library is imported.
    """

    library: ClassVar[str]
    """What the modules of its classes begin with."""
    classes: ClassVar[Mapping[str, str]]
    """Classes that can be patched, with the attribute that holds the encoder; "": it is one."""
    entry: ClassVar[str] = "forward"
    """The method of the encoder that takes pixels and runs the blocks."""
    full: ClassVar[Sequence[str]] = ()
    """Methods of the encoder that return maps of all patches, and need each of them."""
    pixels: ClassVar[str] = "pixel_values"
    """The argument of `entry` that brings the pictures."""
    masks: ClassVar[Sequence[str]] = ("attention_mask",)
    """Arguments of `entry` that are as long as all patches."""

    crops: bool = False
    """Whether its own transforms cut the centre of a picture out; else they stretch it."""

    def __init__(self, model: Model, found: str) -> None:
        self.model = model
        inner = self.classes[found]
        self.tower: Any = getattr(model, inner) if inner else model
        self.found = found

    @cached_property
    @abstractmethod
    def encoder(self) -> Encoder:
        """Its blocks."""

    @property
    @abstractmethod
    def width(self) -> int:
        """C"""

    @property
    def rotary(self) -> bool:
        """Whether attention turns queries and keys by the positions of patches."""
        return False

    @property
    def has_cls(self) -> bool:
        """Whether the first row is CLS."""
        return self.encoder.prefix > 0

    @property
    def shape(self) -> Tower:
        """Its properties."""
        encoder = self.encoder
        return Tower(
            num_layers=len(encoder.blocks),
            has_cls=self.has_cls,
            prefix=encoder.prefix,
            rotary=self.rotary,
        )

    @abstractmethod
    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of pictures (B, 3, H, W)."""

    @property
    @abstractmethod
    def fixed_grid(self) -> tuple[int, int] | None:
        """Those of every picture, where the model has one input size."""

    @property
    @abstractmethod
    def checkpointing(self) -> bool:
        """Whether blocks would run a second time for gradients."""

    def check(self) -> None:  # noqa: B027  (most have no variants)
        """Raise `UnsupportedModelError` for a variant in which rows cannot leave."""

    def check_pooling(self, name: str) -> None:  # noqa: B027
        """Raise `UnsupportedModelError` where rows of several patches, which a method called
        `name` makes, cannot be pooled."""

    def check_values(self, name: str) -> None:  # noqa: B027
        """Raise `UnsupportedModelError` where attention cannot read the values of merged rows,
        which a method called `name` wants."""

    # --- pooling of rows that stand for several patches ----------------------------------------

    @property
    def pooling(self) -> Callable[..., Any] | None:
        """The method of the encoder that pools what `entry` returned, where it is one of its
        own."""
        return None

    @property
    def attention_pool(self) -> Any:
        """The module that pools rows by attention; None: there is none."""
        return None

    def biased(self, kwargs: Keywords, bias: Tensor, rows: Tensor) -> Keywords:
        """Arguments of the `attention_pool` that let it attend to rows (B, S, C) as to their
        patches, by what is added to logits: (B, 1, 1, S)."""
        raise NotImplementedError(f"{self.found} has no attention pooling that is known.")

    def pools_by_size(
        self, original: Callable[..., Any], rows: Tensor, *args: Any, **kwargs: Any
    ) -> bool:
        """Whether what `pooling` makes of rows depends on how many patches each stands for."""
        return False

    def pooled(
        self, original: Callable[..., Any], rows: Tensor, bias: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """What `pooling` makes of rows of several patches, whose means are those of patches;
        `original` is that method."""
        raise NotImplementedError(f"{self.found} has no pooling by sizes that is known.")

    def weighed(self, output: Any, bias: Tensor) -> Any:
        """What `entry` returns, so that the model's mean over rows is one over patches; `bias`
        holds the logarithm of each row's patches: (B, 1, 1, S)."""
        return output


def weigh(rows: Tensor, bias: Tensor, start: int) -> Tensor:
    """Rows (B, S, C), those from `start` on multiplied so that their plain mean is the mean over
    patches."""
    sizes = bias[:, 0, 0, start:].exp()
    share = sizes * (sizes.shape[1] / sizes.sum(1, keepdim=True))
    scale = share.new_ones(rows.shape[:2])
    scale[:, start:] = share
    return rows * scale[..., None].to(rows.dtype)


def unlike(model: Model, what: str) -> UnsupportedModelError:
    """The error for a model of a supported class whose parts are others."""
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be patched: {what}. Rows can leave in plain pre-norm "
        f"blocks, x + attention(norm(x)), then y + MLP(norm(y))."
    )
