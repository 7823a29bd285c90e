"""What methods may ask to see: adapters read exactly what is declared.

Letters for shapes, as in the whole code base: B batch, N visual tokens of one image, K kept tokens,
T text tokens, L sequence, C width of the vision encoder, D width of the LLM, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

Per = Literal["token", "tile", "image"]
"""What the first dimension of a signal counts."""
RowRule = Callable[[Tensor, Tensor], Tensor]
"""Which text tokens are asked, at least one: (visual embeddings (N, D), text embeddings (T, D)) ->
(T,) bool."""
Rows = Literal["last", "text", "image"] | RowRule
"""Rows of attention: the prompt's last token; the text tokens behind the image, up to the prompt's
end (its last token where there is no text); those of them that a rule picks, once per prompt, from
what entered the LLM; the image's own tokens, as far as they are alive."""


@dataclass(frozen=True, slots=True)
class Signal:
    """A tensor that adapters capture because a method declares it.

    Its first dimension counts tokens, tiles, or (`per = "image"`) whatever its docstring says.
    """

    per: ClassVar[Per] = "token"
    of_cls: ClassVar[bool] = False
    """Needs an encoder with a CLS token."""
    of_text_twin: ClassVar[bool] = False
    """Needs the text encoder that the vision encoder was trained with."""
    of_prompt: ClassVar[bool] = False
    """Differs from question to question about the same image."""
    of_rows: ClassVar[bool] = False
    """Rows that may enter the LLM merged: a method that merges sees them with their gradients."""


@dataclass(frozen=True, slots=True)
class Features(Signal):
    """Visual tokens as the LLM would see them, after the projector: (N, D)."""

    of_rows: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class EncoderFeatures(Signal):
    """What the projector reads for each token: (N, C); patches that it merges are concatenated."""

    of_rows: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ClsFeatures(Signal):
    """The CLS token beside `EncoderFeatures`, one per tile: (tiles, C). Where the projector merges
    patches it is narrower than a token's, and cannot go through the projector."""

    per: ClassVar[Per] = "tile"
    of_cls: ClassVar[bool] = True
    of_rows: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ClsAttention(Signal):
    """Attention of the CLS query to each token in ViT layer `layer`, averaged over heads: (N,).

    The softmax runs over all keys, CLS included; the CLS column is then dropped unnormalised.
    """

    layer: int
    of_cls: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ClsLogits(Signal):
    """`ClsAttention` before the softmax: scaled q k^T, averaged over heads: (N,)."""

    layer: int
    of_cls: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ClsAttentionOneHead(Signal):
    """`ClsAttention` with the heads of q and k taken as one head of full width, scaled by its
    square root: (N,)."""

    layer: int
    of_cls: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class AttentionToCls(Signal):
    """Attention that each token gives to CLS in ViT layer `layer`, averaged over heads: (N,)."""

    layer: int
    of_cls: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ReceivedAttention(Signal):
    """Attention that each token receives in ViT layer `layer`: (N,), about 1 on average.

    Head mean, *summed* over all query rows (CLS row included), averaged over the patches behind a
    token.
    """

    layer: int


@dataclass(frozen=True, slots=True)
class Keys(Signal):
    """Keys of ViT layer `layer` as its attention uses them: (N, H, D_head), averaged over the
    patches behind a token."""

    layer: int


@dataclass(frozen=True, slots=True)
class BlockInput(Signal):
    """Rows that enter encoder block `layer`: (N, C), of merge units the mean of their patches. Only
    for methods inside the encoder."""

    layer: int


@dataclass(frozen=True, slots=True)
class HeadRank(Signal):
    """Importance of each row in encoder block `layer`, head by head: (N, H), of mean 1 over all
    rows of the picture, prefix included. Only for methods inside the encoder.

    Each head's attention map, transposed, is applied to a vote of the rows `rounds` times; they
    begin alike, but for CLS, whose vote begins `cls_start` times as large. One picture's map is
    held at a time.
    """

    layer: int
    rounds: int
    cls_start: float = 1.0


@dataclass(frozen=True, slots=True)
class ClipImage(Signal):
    """Each token in the space that CLIP shares with text, not normalised: (N, D_clip)."""

    of_text_twin: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ClipText(Signal):
    """The question in the space that CLIP shares with images, one row per segment of the text
    encoder's length: (segments, D_clip)."""

    per: ClassVar[Per] = "image"
    of_text_twin: ClassVar[bool] = True
    of_prompt: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class TextEmbeddings(Signal):
    """Input embeddings of the text that belongs to the image: (T, D).

    That is the text after it, up to the next image; the text before it where none follows.
    """

    per: ClassVar[Per] = "image"
    of_prompt: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class PixelSeed(Signal):
    """An integer that depends on the image's pixels alone, on no batch mate: a 0-d int64 tensor."""

    per: ClassVar[Per] = "image"


# --- What a method inside the decoder or on its cache may ask to see ---------------------------


@dataclass(frozen=True, slots=True)
class LayerSignal(Signal):
    """A signal of decoder layer `layer`, for the tokens alive there: (N, ...).

    At a cut a method sees the signals of all layers that have run, for the tokens that are still
    alive. Values are float32 unless said otherwise.
    """

    layer: int

    @property
    def of_attention(self) -> bool:
        """Whether the layer must have attention."""
        return False

    @property
    def of_neurons(self) -> bool:
        """Whether the layer must have an MLP whose neurons are the same for all tokens."""
        return False


@dataclass(frozen=True, slots=True)
class TextAttention(LayerSignal):
    """Attention that some `rows` give to each token: their mean over rows and heads, (N,), or of
    each row the largest among `heads` ("max"); with `each` one value per head and row, (N, H, R).

    The softmax is over all keys that a row sees. `ahead`: read where the layer is about to be cut,
    from the queries and keys that it would have for its uncut input.
    """

    rows: Rows = "last"
    ahead: bool = False
    each: bool = False
    heads: Literal["mean", "max"] = "mean"

    @property
    def of_attention(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class RotaryAffinity(LayerSignal):
    """What rotary positions alone add to a score: the product of two vectors of ones, turned to the
    positions of a token and of a text token, over the root of the head's width: (N, R)."""

    rows: Rows = "last"


@dataclass(frozen=True, slots=True)
class ReceivedInLayer(LayerSignal):
    """Attention that each token receives from all rows of the prompt: head mean, summed over rows
    (causal, streamed): (N,)."""

    @property
    def of_attention(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Hidden(LayerSignal):
    """Hidden states that enter the layer, before a cut of this layer: (N, D), the model's dtype.

    `normed`: as the norm behind the last layer would give them.
    """

    normed: bool = False
    of_rows: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class TextHidden(LayerSignal):
    """`Hidden` of the text behind the image (as for `Rows`): (T, D), the model's dtype."""

    per: ClassVar[Per] = "image"
    normed: bool = False


@dataclass(frozen=True, slots=True)
class LayerKeys(LayerSignal):
    """Keys of the layer, turned to their positions as if nothing was padded: (N, H_kv, D_head), the
    model's dtype. `ahead`: as for `TextAttention`."""

    ahead: bool = False

    @property
    def of_attention(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class GistAttention(LayerSignal):
    """Attention to each token of the mean query of all that the prompt holds up to the image's last
    token, text included: (N,). The softmax is over the keys of the same; neither queries nor keys
    are turned to positions. Always read ahead, as for `TextAttention`."""

    ahead: ClassVar[bool] = True

    @property
    def of_attention(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class TextKeys(LayerSignal):
    """`LayerKeys` of the text behind the image (as for `Rows`): (T, H_kv, D_head)."""

    per: ClassVar[Per] = "image"

    @property
    def of_attention(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class LayerValues(LayerSignal):
    """Values of the layer: (N, H_kv, D_head)."""

    @property
    def of_attention(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class TextValues(LayerSignal):
    """`LayerValues` of text: (T, H_kv, D_head). `part`: the text behind the image (as for `Rows`),
    or all of the prompt's."""

    per: ClassVar[Per] = "image"
    part: Literal["behind", "all"] = "behind"

    @property
    def of_attention(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class RotaryMeans(LayerSignal):
    """Cosine and sine of the angles by which the layer turns heads at each token's position, as if
    nothing was padded: their means over the head's width and, where positions have several axes,
    over these (each of which turns the whole head): (N, 2)."""


@dataclass(frozen=True, slots=True)
class MeanHidden(LayerSignal):
    """Mean of the hidden states that enter the layer, over a part of the prompt: (D,).

    `query`: the prompt's last image and the text behind it. `context`: everything before that
    image, or all of the prompt's text where no other image is before it.
    """

    per: ClassVar[Per] = "image"
    of: Literal["query", "context"] = "query"


@dataclass(frozen=True, slots=True)
class ModuleStep(LayerSignal):
    """`read(input, output)` of the layer's attention or MLP, (L, D) each over the real tokens of a
    prompt, before the residual is added: (L,), of which the method sees its tokens' (N,)."""

    module: Literal["attention", "mlp"]
    read: Callable[[Tensor, Tensor], Tensor]

    @property
    def of_attention(self) -> bool:
        return self.module == "attention"


@dataclass(frozen=True, slots=True)
class Neurons(LayerSignal):
    """`read(visual, text)` of the MLP's activations act(gate) * up, (N, M) of the tokens and (T, M)
    of the text behind the image (as for `Rows`): (N,)."""

    read: Callable[[Tensor, Tensor], Tensor]

    @property
    def of_neurons(self) -> bool:
        return True
