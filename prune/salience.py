"""How much the encoder looks at each token: from its CLS token, or from all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from .contract import ClsAttention, ReceivedAttention
from .fields import check_choice

Scores = Literal["cls", "received"]
"""Field of methods whose papers read the CLS token: `cls`, or on encoders without one (or by the
user's wish) `received`, the mean attention that a token receives from all others."""
WITHOUT_CLS: Mapping[str, object] = {"scores": "received"}


def check_scores(value: object) -> None:
    """Refuse everything but the two words."""
    check_choice("scores", value, get_args(Scores))


def salience(scores: Scores, layer: int) -> ClsAttention | ReceivedAttention:
    """The signal of ViT layer `layer`: (N,) per token."""
    return ClsAttention(layer) if scores == "cls" else ReceivedAttention(layer)
