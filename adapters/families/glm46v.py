"""GLM-4.6V: GLM-4.1V with other words between the frames of a video."""

from __future__ import annotations

from .glm4v import Glm4V


class Glm46V(Glm4V):
    name = "glm46v"
