"""GLM-4.6V-Flash: the sizes of GLM-4.1V."""

from __future__ import annotations

from transformers import Glm46VConfig

from ..tiny_models import Case
from .glm4v import FramesAsImages, Glm4V, tiny_glm
from .qwen2_vl import MERGING


class Glm46V(Glm4V):
    shapes = ()  # those of GLM-4.1V
    tiny = (Case("glm46v", lambda: tiny_glm(Glm46VConfig), MERGING, FramesAsImages(), True),)
