"""What a prompt may hold beside text."""

from __future__ import annotations

from dataclasses import dataclass


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
