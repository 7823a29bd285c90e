"""What a model family must say of itself; everything else is shared by all families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..prune.contract import Decoder, ModelShape, Tower
from ..prune.tiling import Tiling
from .pictures.canvas import Fit

Model = Any
"""A loaded `transformers` model; its modules are untyped attributes."""
Inputs = Mapping[str, Any]
"""The arguments of `get_image_features` or `get_video_features`."""


@dataclass(frozen=True, slots=True)
class Modality:
    """What a prompt may hold beside text, in the words of `transformers`."""

    name: str

    @property
    def encode(self) -> str:
        """The method of the core that encodes it."""
        return f"get_{self.name}_features"

    @property
    def pixels(self) -> str:
        """The argument that brings it."""
        return "pixel_values" if self.name == "image" else f"pixel_values_{self.name}s"

    @property
    def token(self) -> str:
        """The configuration's name for the id of its placeholders."""
        return f"{self.name}_token_id"


IMAGE, VIDEO = Modality("image"), Modality("video")
MODALITIES = (IMAGE, VIDEO)


class Family(ABC):
    """Where the visual tokens of one family of models are. One file in `families/` each.

    The modules that a family names belong to `transformers`' own classes; nothing is copied.
    Videos count as images in all words below.
    """

    name: ClassVar[str]
    """The `model_type` of the configuration, which is also the file's name."""
    modalities: ClassVar[tuple[Modality, ...]] = (IMAGE,)
    """What can be pruned; the rest is refused."""
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
    def tilings(
        self, model: Model, modality: Modality, features: Sequence[Tensor], inputs: Inputs
    ) -> Sequence[Tiling]:
        """How the tokens of each image lie.

        Args:
            features: per image, (N, D).
        """

    @abstractmethod
    def pixels(self, model: Model, modality: Modality, inputs: Inputs) -> Sequence[Tensor]:
        """The pixel values of each image without padding, one behind the other as the model takes
        them: concatenated they are the argument again."""

    @abstractmethod
    def pictures(
        self, model: Model, modality: Modality, inputs: Inputs
    ) -> Sequence[Sequence[tuple[int, int]]]:
        """Per image, the pictures that the encoder saw of it (tiles, frames): rows and columns of
        what the projector makes a token of, padding included."""

    @abstractmethod
    def encoder_features(self, model: Model, output: Any, inputs: Inputs) -> Tensor:
        """What the projector reads, as the encoder gives it: (B, S, C), CLS included.

        Args:
            output: what `get_image_features` returned.
        """

    def unread_layers(self, model: Model, inputs: Inputs) -> Sequence[Any]:
        """The last encoder layers, those whose output no projector reads.

        Args:
            inputs: as the caller gave them; they may say what is read.
        """
        return ()

    @abstractmethod
    def project(self, model: Model, rows: Tensor) -> Tensor:
        """Rows (K, C) of `EncoderFeatures` through the projector: (K, D)."""

    @abstractmethod
    def per_image(
        self, model: Model, modality: Modality, values: Tensor, inputs: Inputs
    ) -> Sequence[Tensor]:
        """Values of encoder tokens -> (P, ...) per image, one per patch in the prompt's order.

        Values of encoder tokens that the model averages are averaged alike.

        Args:
            values: (B, S, ...) as the attention modules saw the tokens, CLS included.
        """

    def sizes(self, modality: Modality) -> str:
        """The argument that holds the sizes of each image, where there is one."""
        return f"{modality.name}_sizes"

    def per_image_arguments(self, modality: Modality) -> frozenset[str]:
        """The arguments that tell images apart: what `only` looks at."""
        return frozenset({modality.pixels, self.sizes(modality)})

    def only(
        self, model: Model, modality: Modality, inputs: Inputs, images: Sequence[int]
    ) -> tuple[Sequence[int], Inputs]:
        """Arguments for some images of a call.

        Args:
            images: their numbers in the call, ascending.

        Returns:
            the images that the arguments hold, all of `images` among them, and the arguments.
        """
        pixels = self.pixels(model, modality, inputs)
        chosen = {**inputs, modality.pixels: torch.cat([pixels[i] for i in images])}
        if (sizes := inputs.get(self.sizes(modality))) is not None:
            chosen[self.sizes(modality)] = sizes[list(images)]
        return images, chosen

    def merged_patches(
        self, model: Model, modality: Modality, values: Tensor, inputs: Inputs
    ) -> Sequence[Tensor]:
        """As `per_image`, but patches that the projector merges are concatenated: (P, C)."""
        return self.per_image(model, modality, values, inputs)

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
