"""What a model family must say of itself; everything else is shared by all families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..prune.contract import Decoder, ModelShape, Tower
from .overlay import Fit

Model = Any
"""A loaded `transformers` model; its modules are untyped attributes."""
Grids = Sequence[tuple[int, int]]


class Family(ABC):
    """Where the visual tokens of one family of models are. One file in `families/` each.

    The modules that a family names belong to `transformers`' own classes; nothing is copied.
    """

    name: ClassVar[str]
    """The `model_type` of the configuration, which is also the file's name."""
    fit: ClassVar[Fit] = "stretch"
    """How the family's processors bring pictures to the token grid."""
    mrope: ClassVar[bool] = False
    """Multi-axis rotary positions: kept tokens must keep their original positions."""

    def core(self, model: Model) -> Any:
        """The module that owns the vision encoder and the text model."""
        return model.base_model

    def text_model(self, model: Model) -> Any:
        """The LLM decoder without its head."""
        return self.core(model).language_model

    @abstractmethod
    def vision_tower(self, model: Model) -> Any:
        """The vision encoder."""

    @abstractmethod
    def vision_attention(self, model: Model) -> Sequence[Any]:
        """The attention module of each encoder layer."""

    @abstractmethod
    def tower(self, model: Model) -> Tower:
        """The properties of the vision encoder."""

    @abstractmethod
    def grids(self, model: Model, features: Sequence[Tensor], inputs: Mapping[str, Any]) -> Grids:
        """Rows and columns of each image's visual tokens.

        Args:
            features: per image, (N, D).
            inputs: the arguments of `get_image_features`.
        """

    @abstractmethod
    def pixels(self, model: Model, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """The pixel values of each image, any shape."""

    @abstractmethod
    def per_image(
        self,
        model: Model,
        scores: Tensor,
        features: Sequence[Tensor],
        inputs: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        """Encoder scores as the attention modules saw them -> (N,) per image, in token order.

        Args:
            scores: one value per encoder token, (B, S) as given to the attention modules.
        """

    def check(self, model: Model) -> None:  # noqa: B027  (most families have no variants)
        """Raise `UnsupportedModelError` for a variant that this family cannot prune."""

    def fixed_tokens(self, model: Model) -> int | None:
        """Visual tokens of every image, where the model has one input size."""
        return None

    def shape(self, model: Model) -> ModelShape:
        """Sizes of encoder and decoder."""
        config = self.text_model(model).config
        decoder = Decoder(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
        )
        return ModelShape(tower=self.tower(model), decoder=decoder)
