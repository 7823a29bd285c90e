"""What a model family must say of itself; everything else is shared by all families."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..prune.contract import Decoder, ModelShape, Tower
from ..prune.tiling import Tiling
from .both_ways import BothWays
from .encoder import Encoder
from .layer_names import LLAMA, LayerNames
from .modality import IMAGE as IMAGE
from .modality import MODALITIES as MODALITIES
from .modality import VIDEO as VIDEO
from .modality import Modality as Modality
from .sequence.masks import STATES, layer_kind
from .sequence.prompt import Prompt

Fit = Literal["crop", "stretch"]
"""How a processor brings a picture to the shape of the token grid."""
Model = Any
"""A loaded `transformers` model; its modules are untyped attributes."""
Inputs = Mapping[str, Any]
"""The arguments of `get_image_features` or `get_video_features`."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the method that encodes a modality."""

    modality: Modality
    inputs: Inputs
    """Its arguments."""
    parts: tuple[int, ...] | None = None
    """Pictures of each image, where only the prompt tells to which image a picture belongs."""


class Family(ABC):
    """Where the visual tokens of one model are. One file in `families/` for each family of models.

    The modules that a family names belong to `transformers`' own classes; nothing is copied.
    Videos count as images in all words below.
    """

    name: ClassVar[str]
    """The `model_type` of the configuration, which is also the file's name."""
    since: ClassVar[str] = "5.20"
    """The release of `transformers` from which on the family is right; one that has no such models
    has no such family."""
    modalities: ClassVar[tuple[Modality, ...]] = (IMAGE,)
    """What can be pruned; the rest is refused."""
    fit: ClassVar[Fit] = "stretch"
    """How the family's processors bring pictures to the token grid."""
    of_prompt: ClassVar[bool] = False
    """Whether only the prompt tells which pictures are of one image: `parts`."""
    mrope: ClassVar[bool] = False
    """Multi-axis rotary positions: kept tokens must keep their original positions."""
    beside: ClassVar[tuple[str, ...]] = ()
    """What the model reads of the encoder's output beside the features: of no image."""
    layer_names: ClassVar[LayerNames] = LLAMA
    """What the modules of a decoder layer are called."""
    by_token: ClassVar[tuple[str, ...]] = ()
    """Arguments of the text model with a row for each token, (B, L, ...), beside its embeddings:
    of placeholders all alike."""

    makes_masks: ClassVar[bool] = False
    """Whether the core makes the decoder's masks, and not the text model."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def core(self) -> Any:
        """The module that owns the vision encoder and the text model."""
        return self.model.base_model

    @property
    def text_model(self) -> Any:
        """The LLM decoder without its head."""
        return self.core.language_model

    def of(self, modality: Modality) -> Family:
        """The family as it is of one modality, where each has a vision encoder of its own; a view
        is the same object each time. By itself a family speaks of images."""
        return self

    @cached_property
    def views(self) -> Sequence[Family]:
        """One for each vision encoder, that of images first."""
        return list(dict.fromkeys(self.of(modality) for modality in self.modalities))

    @property
    @abstractmethod
    def vision_tower(self) -> Any:
        """The vision encoder."""

    @property
    @abstractmethod
    def vision_attention(self) -> Sequence[Any]:
        """The attention module of each encoder layer."""

    @property
    @abstractmethod
    def tower(self) -> Tower:
        """The properties of the vision encoder."""

    @cached_property
    def encoder(self) -> Encoder | None:
        """The blocks of the vision encoder, where rows can leave; None: they cannot."""
        return None

    @property
    def projectors(self) -> Sequence[Any]:
        """Modules that make tokens of the encoder's rows, each of the rows as they are where it
        runs."""
        return ()

    # --- one call of the encoder ---------------------------------------------------------------

    def call(self, modality: Modality, inputs: Inputs, prompt: Prompt | None = None) -> Call:
        """A call of the method that encodes a modality.

        Args:
            inputs: its arguments, or those of the model.
            prompt: what the images stand in; None: made of `input_ids`, if these are there.
        """
        if prompt is None and (ids := inputs.get("input_ids")) is not None:
            prompt = self.prompt(ids, inputs.get("attention_mask"))
        call = Call(modality, inputs)
        if prompt is None or not self.of_prompt:
            return call
        return replace(call, parts=self.parts(call, prompt))

    def gives(self, inputs: Inputs, modality: Modality) -> bool:
        """Whether there are pixels of a modality among the model's arguments."""
        return inputs.get(modality.pixels) is not None

    def prompt(self, ids: Tensor, mask: Tensor | None) -> Prompt:
        return Prompt(ids, mask, {one: self.placeholder(one) for one in self.modalities})

    def parts(self, call: Call, prompt: Prompt) -> tuple[int, ...] | None:
        """Pictures of each image: an image is what the user gave, however many pictures the encoder
        saw of it. Asked for where `of_prompt`."""
        return None

    def images(self, call: Call, pooled: Any) -> Sequence[Tensor]:
        """The tokens of each image, (N, D), of what `get_image_features` calls `pooler_output`."""
        return list(pooled)

    def pooled(self, call: Call, images: Sequence[Tensor], kind: type) -> Any:
        """The reverse of `images`; `kind` is the class of what the model made."""
        if issubclass(kind, Tensor):
            return torch.stack(list(images))
        return tuple(images) if issubclass(kind, tuple) else list(images)

    @abstractmethod
    def tilings(self, call: Call, features: Sequence[Tensor]) -> Sequence[Tiling]:
        """How the tokens of each image lie.

        Args:
            features: per image, (N, D).
        """

    @abstractmethod
    def pixels(self, call: Call) -> Sequence[Tensor]:
        """The pixel values of each image without padding, one behind the other as the model takes
        them: concatenated they are the argument again, unless `only` is the family's own."""

    @abstractmethod
    def pictures(self, call: Call) -> Sequence[Sequence[tuple[int, int]]]:
        """Per image, the pictures that the encoder saw of it (tiles, frames): rows and columns of
        what the projector makes a token of, padding included."""

    @abstractmethod
    def encoder_features(self, call: Call, output: Any) -> Tensor:
        """What the projector reads, as the encoder gives it: (B, S, C), CLS included.

        Args:
            output: what `get_image_features` returned.
        """

    def unread_layers(self, inputs: Inputs) -> Sequence[Any]:
        """The last encoder layers, those whose output no projector reads.

        Args:
            inputs: as the caller gave them, or none; they may say what is read.
        """
        return ()

    @abstractmethod
    def project(self, rows: Tensor) -> Tensor:
        """Rows (K, C) of `EncoderFeatures` through the projector: (K, D)."""

    @abstractmethod
    def per_image(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        """Values of encoder tokens -> (P, ...) per image, one per patch in the prompt's order.

        Values of encoder tokens that the model averages are averaged alike.

        Args:
            values: (B, S, ...) as the attention modules saw the tokens, CLS included.
        """

    def placeholder(self, modality: Modality) -> int:
        """Id of the tokens that its images take the place of."""
        return int(getattr(self.model.config, modality.token))

    def sizes(self, modality: Modality) -> str:
        """The argument that holds the sizes of each image, where there is one."""
        return f"{modality.name}_sizes"

    def per_image_arguments(self, modality: Modality) -> frozenset[str]:
        """The arguments that tell images apart: what `only` looks at."""
        return frozenset({modality.pixels, self.sizes(modality)})

    def apart(self, call: Call) -> Sequence[str]:
        """What tells each image from others with the same pixels."""
        sizes = call.inputs.get(self.sizes(call.modality))
        return [""] * len(self.pixels(call)) if sizes is None else list(map(str, sizes.tolist()))

    def only(self, call: Call, images: Sequence[int]) -> tuple[Sequence[int], Call]:
        """A call with some images of another.

        Args:
            images: their numbers in the call, ascending.

        Returns:
            the images that it holds, all of `images` among them, and the call.
        """
        pixels, sizes = self.pixels(call), self.sizes(call.modality)
        chosen = {**call.inputs, call.modality.pixels: torch.cat([pixels[i] for i in images])}
        if chosen.get(sizes) is not None:
            chosen[sizes] = chosen[sizes][list(images)]
        return images, replace(call, inputs=chosen)

    def merged_patches(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        """As `per_image`, but patches that the projector merges are concatenated: (P, C)."""
        return self.per_image(call, values)

    def both_ways(self, inputs: Inputs) -> BothWays | None:
        """Tokens of a prompt that see each other both ways; None: all are causal.

        Args:
            inputs: arguments of the core.
        """
        return None

    def rotates(self, layer: int) -> bool:
        """Whether a decoder layer turns queries and keys to positions."""
        return True

    def turned(self, attention: Any, heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Queries or keys (B, H, Q, D_head) at their positions, as a decoder layer's attention
        turns them.

        Args:
            rotary: cosines and sines, (B or 1, Q, D_head) each.
        """
        if not self.rotates(attention.layer_idx):
            return heads
        turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        turned: Tensor = turn(heads, heads[:, :0], *rotary)[0]
        return turned

    def check(self) -> None:  # noqa: B027  (most families have no variants)
        """Raise `UnsupportedModelError` for a variant that this family cannot prune.

        The first line of its documentation says which they are: it stands in the table of models.
        """

    def check_generate(self, kwargs: Mapping[str, Any], copies: int) -> None:  # noqa: B027
        """Raise `UnsupportedFeatureError` for what `generate` cannot do with this family.

        Args:
            copies: rows that a prompt is generated in: beams, or sequences that are returned.
        """

    @property
    def fixed_tokens(self) -> int | None:
        """Visual tokens of every image, where the model has one input size."""
        return None

    @cached_property  # which every check of every method asks for
    def shape(self) -> ModelShape:
        """Sizes of encoder and decoder."""
        config, layers = self.text_model.config, self.text_model.layers
        names = self.layer_names
        decoder = Decoder(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=_mlp_width(config),
            attention_layers=_attention_layers(config),
            expert_layers=tuple(n for n, layer in enumerate(layers) if _experts(layer, names)),
        )
        return ModelShape(tower=self.tower, decoder=decoder)


def _mlp_width(config: Any) -> int:
    """Neurons that a token passes in an MLP: of experts, those of the active ones."""
    active = getattr(config, "num_experts_per_tok", None)
    if active is None:  # Gemma 4's experts act beside an MLP
        beside = getattr(config, "top_k_experts", None)
        more = beside * config.moe_intermediate_size if beside else 0
        return int(config.intermediate_size + more)
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    return int(active * config.moe_intermediate_size + shared)


def _experts(layer: Any, names: LayerNames) -> bool:
    """Whether tokens are sent to experts of their own, in the MLP or beside it."""
    return any(hasattr(part, "experts") for part in (layer, getattr(layer, names.mlp, None)))


def _attention_layers(config: Any) -> tuple[int, ...] | None:
    """The layers with attention; None: all."""
    depth = config.num_hidden_layers
    layers = tuple(n for n in range(depth) if layer_kind(config, n) not in STATES)
    return None if len(layers) == depth else layers
