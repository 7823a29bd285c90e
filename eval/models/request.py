"""Which model is to be loaded, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """A checkpoint; see `loading.load`.

    Attributes:
        name: `embedded`, a folder, or a name on the Hugging Face Hub.
        device: None: CUDA where there is one; `auto` spreads the model.
        model_args: see `loading.split_model_args`.
        clip: the CLIP checkpoint of its vision tower, for methods that read its text encoder.
    """

    name: str
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    model_args: Mapping[str, object] = field(default_factory=dict)
    clip: str | None = None
