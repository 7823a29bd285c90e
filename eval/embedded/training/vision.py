"""Stage A: the vision tower learns to say of each patch what is there, its colour and its place.

The CLS token of the feature layer learns which classes are present, which makes its attention
fall on objects. The heads are not shipped; their weights
seed the projector. Runs in bfloat16 autocast.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vocabulary import COLORS, NOUNS
from . import optimizer
from .architecture import VISION_WIDTH, build, features, init_vision, normalize
from .data import BACKGROUND, IGNORED, LOCATIONS, VisionBatches, loader

SEED, BATCH, RATE, DECAY = 1, 16, 1.2e-3, 0.5
LAST_LAYER_SHARE = 0.15  # the last layer, which the decoder does not see, is trained at the end
BACKGROUND_WEIGHT = 0.25


class Heads(nn.Module):
    """Linear read-outs of the feature layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(VISION_WIDTH)
        self.cls = nn.Linear(VISION_WIDTH, len(NOUNS) + 1)
        self.color = nn.Linear(VISION_WIDTH, len(COLORS))
        self.location = nn.Linear(VISION_WIDTH, LOCATIONS)
        self.anchor = nn.Linear(VISION_WIDTH, 1)
        self.present = nn.Linear(VISION_WIDTH, len(NOUNS))
        self.present_last = nn.Linear(VISION_WIDTH, len(NOUNS))

    @torch.no_grad()
    def readout(self) -> Tensor:
        """Rows that read class, colour, anchor and (in both signs) place out of raw features."""
        place = self.location.weight
        rows = torch.cat([self.cls.weight, self.color.weight, self.anchor.weight, place, -place])
        rows = rows * self.norm.weight
        rows = rows - rows.mean(1, keepdim=True)
        return rows / rows.norm(dim=1, keepdim=True) * 0.15


def losses(
    tower: nn.Module, heads: Heads, batch: dict[str, Tensor], last: bool
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch and what to log of it."""
    pixels = normalize(batch["pixels"])
    if last:
        output = tower(pixels, output_hidden_states=True)
        hidden = output.hidden_states[-2]
    else:
        hidden = features(tower, pixels)
    hidden = heads.norm(hidden)
    patches, cls = hidden[:, 1:], hidden[:, 0]
    logits = heads.cls(patches)
    weight = torch.ones(len(NOUNS) + 1, device=pixels.device)
    weight[BACKGROUND] = BACKGROUND_WEIGHT
    color = heads.color(patches).flatten(0, 1)
    parts = {
        "cls": F.cross_entropy(logits.flatten(0, 1), batch["cls"].flatten(), weight),
        "color": 0.5 * F.cross_entropy(color, batch["color"].flatten()),
        "location": 2 * F.mse_loss(heads.location(patches), batch["location"]),
        "anchor": 0.5
        * F.binary_cross_entropy_with_logits(heads.anchor(patches)[..., 0], batch["anchor"]),
        "present": 4 * F.binary_cross_entropy_with_logits(heads.present(cls), batch["present"]),
    }
    if last:
        parts["last"] = 4 * F.binary_cross_entropy_with_logits(
            heads.present_last(output.pooler_output), batch["present"]
        )
    with torch.no_grad():
        object_patch = (batch["cls"] != IGNORED) & (batch["cls"] != BACKGROUND)
        right = logits.argmax(-1) == batch["cls"]
        log = {name: part.item() for name, part in parts.items()}
        log["objects"] = right[object_patch].float().mean().item()
        log["background"] = right[batch["cls"] == BACKGROUND].float().mean().item()
    return torch.stack(list(parts.values())).sum(), log


def start() -> tuple[nn.Module, Heads]:
    """Tower and heads as the stage begins."""
    torch.manual_seed(SEED)
    tower = build().model.vision_tower
    init_vision(tower, np.random.default_rng(SEED))
    return tower, Heads()


def train(
    out: Path,
    steps: int,
    device: str = "cpu",
    resume: bool = False,
    workers: int = 1,
    stop: int | None = None,
    batch: int = BATCH,
    report: Callable[[str], None] = print,
    every: int = 50,
) -> None:
    """Run the stage into `out/vision.pt`; `stop` ends it early, to be resumed."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "vision.pt"
    tower, heads = start()
    tower.to(device)
    heads.to(device)
    modules = {"tower": tower, "heads": heads}
    optimizers = optimizer.Optimizers(modules)
    done = optimizer.load(file, modules, optimizers) if resume and file.exists() else 0
    began, since = time.time(), done
    totals: dict[str, float] = {}
    stop = min(steps, stop or steps)
    batches = loader(VisionBatches(SEED, batch, stop), done, workers)
    for step in range(done, stop):
        data = {name: value.to(device) for name, value in next(batches).items()}
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss, log = losses(tower, heads, data, last=step >= steps * (1 - LAST_LAYER_SHARE))
        optimizers.step(loss, optimizer.learning_rate(step, steps, RATE, DECAY))
        totals = {name: totals.get(name, 0) + value for name, value in log.items()}
        if (step + 1) % every == 0:
            means = " ".join(f"{name} {value / every:.3f}" for name, value in totals.items())
            speed = batch * (step + 1 - since) / (time.time() - began)
            report(f"{step + 1} {(time.time() - began) / 60:.1f} min {speed:.0f} images/s {means}")
            totals = {}
        if (step + 1) % 250 == 0:
            optimizer.save(file, modules, optimizers, step + 1)
    optimizer.save(file, modules, optimizers, stop)
