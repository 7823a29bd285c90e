"""What tests need of GLM-4.6V: its tiny model, and its real processor."""

from __future__ import annotations

import transformers
from families.glm4v import MARKS as MARKS
from families.glm4v import processor_of

CASES = ("glm46v",)
ONE = None  # where one of a family is enough, GLM-4.1V asks all that it does


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    return processor_of("Glm46V")
