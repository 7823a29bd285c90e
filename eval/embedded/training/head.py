"""The linear head of the embedded classifier, on the frozen tower: a few seconds on a CPU.

Pictures of one object, 60 of each class, from the training split; logistic regression by L-BFGS on
standardised CLS features. Without a bias, so that the head is a projection of CLIP's: a constant
feature would be needed for one, and none is missed.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import load_model
from ..classifying import HEAD
from ..objects import scenes
from ..scenes import render
from ..vocabulary import NOUNS
from .architecture import normalize

SEED, PER_CLASS, DECAY, STEPS, BATCH = 3, 60, 1e-3, 200, 64


@torch.no_grad()
def features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """uint8 (N, 112, 112, 3) -> CLS behind the last block and its norm, (N, width)."""
    parts = [tower(normalize(part)).pooler_output for part in pixels.split(BATCH)]
    return torch.cat(parts)


def fit(found: Tensor, labels: Tensor) -> Tensor:
    """Logistic regression of features (N, width) on classes (N,): weights (classes, width)."""
    spread = found.std(0)
    scaled = found / spread
    weight = nn.Parameter(torch.zeros(len(NOUNS), found.shape[1]))
    optimizer = torch.optim.LBFGS([weight], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(scaled @ weight.T, labels) + DECAY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (weight / spread).detach()


def train(out: Path = HEAD, report: Callable[[str], None] = print) -> Tensor:
    """Train the head and write it."""
    began = time.time()
    drawn = list(scenes(SEED, "train", PER_CLASS))
    pixels = torch.from_numpy(np.stack([render(scene).pixels for scene in drawn]))
    labels = torch.tensor([scene.things[0].cls for scene in drawn])
    found = features(load_model()[0].model.vision_tower, pixels)
    weight = fit(found, labels)
    right = ((found @ weight.T).argmax(1) == labels).float().mean().item()
    save_file({"weight": weight.contiguous()}, out)
    report(f"{len(drawn)} pictures, {time.time() - began:.0f} s, {100 * right:.1f} % of them right")
    return weight
