"""What a model looks like to a method: sizes and properties, never its name."""

from __future__ import annotations

from dataclasses import dataclass

from .signals import LayerSignal, Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """Properties of a vision encoder that rules may depend on (never its name).

    `prefix` counts the rows in front of the patches (CLS, distillation, registers); blocks from
    `blocks_read` on are not read by the projector (None: all are); `rotary` tells whether attention
    turns queries and keys by the positions of patches; `full_attention` lists the layers whose
    attention is not windowed; `merge_unit` is the number of encoder patches behind one visual token
    (4 for the 2 x 2 mergers of Qwen, else 1); `text_twin` tells whether the encoder was trained
    with a text encoder of the same space (CLIP).
    """

    num_layers: int
    has_cls: bool
    merge_unit: int = 1
    full_attention: tuple[int, ...] | None = None
    text_twin: bool = False
    prefix: int = 0
    blocks_read: int | None = None
    rotary: bool = False

    @property
    def depth_read(self) -> int:
        """Blocks whose result the projector reads."""
        return self.num_layers if self.blocks_read is None else self.blocks_read


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Sizes of the LLM decoder: layers, width `hidden_size` and MLP width `intermediate_size` (of
    experts, the width of those that a token passes).

    `attention_layers` lists the layers with attention; None: all. The others (linear attention,
    short convolutions) keep a state of fixed size, and say nothing of single tokens.
    `expert_layers` lists those whose MLP sends each token to experts of its own.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    attention_layers: tuple[int, ...] | None = None
    expert_layers: tuple[int, ...] = ()

    @property
    def attending(self) -> tuple[int, ...]:
        """The layers with attention."""
        if self.attention_layers is None:
            return tuple(range(self.num_layers))
        return self.attention_layers

    def attends_at(self, layer: int) -> int:
        """The first layer from `layer` on that has attention; the last of all that have it, where
        none is."""
        if self.attention_layers is None:
            return layer
        return next((n for n in self.attention_layers if n >= layer), self.attention_layers[-1])

    def attends_before(self, cut: int) -> int:
        """The layer nearest before `cut` that has attention; the first of all that have it, where
        none is."""
        if self.attention_layers is None:
            return cut - 1
        return max((n for n in self.attention_layers if n < cut), default=self.attention_layers[0])

    def lacks(self, signal: LayerSignal) -> bool:
        """Whether the signal's layer has no such signal."""
        return (signal.of_attention and signal.layer not in self.attending) or (
            signal.of_neurons and signal.layer in self.expert_layers
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that turn a method's fields into layers and counts, without any tensor."""

    tower: Tower
    decoder: Decoder

    def lacks(self, signal: Signal) -> bool:
        """Whether the model has no such signal."""
        if isinstance(signal, LayerSignal):
            return self.decoder.lacks(signal)
        return (signal.of_cls and not self.tower.has_cls) or (
            signal.of_text_twin and not self.tower.text_twin
        )
