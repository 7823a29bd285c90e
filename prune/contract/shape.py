"""What a model looks like to a method: sizes and properties, never its name."""

from __future__ import annotations

from dataclasses import dataclass

from .signals import Signal


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
    """Sizes of the LLM decoder: layers, width `hidden_size` and MLP width `intermediate_size`."""

    num_layers: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that turn a method's fields into layers and counts, without any tensor."""

    tower: Tower
    decoder: Decoder

    def lacks(self, signal: Signal) -> bool:
        """Whether the model's encoder has no such signal."""
        return (signal.of_cls and not self.tower.has_cls) or (
            signal.of_text_twin and not self.tower.text_twin
        )
