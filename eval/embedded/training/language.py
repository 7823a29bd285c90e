"""Stage B: projector and decoder learn to answer, behind the frozen vision tower.

All questions of a picture share its prefix: each attends to the prefix and to itself, and counts
its positions from the prefix's end. In most batches random visual tokens are dropped before the
decoder, their positions kept or repacked. Two teaching aids fade away: where the question should
look (`looks`, switched off for the control) and which visual token is the first of its object.

What is taught, from which model and how fast, is a `Course`: the first one starts from the vision
stage, `training.places` from the shipped model.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..asking import PACK
from ..scenes import PATCHES
from ..vocabulary import WORDS
from . import attention, optimizer, vision
from .architecture import TEXT_WIDTH, build, features, init_language, normalize
from .data import ASKABLE, IGNORED, IMAGE_AT, PREFIX, LanguageBatch, LanguageBatches, loader

SEED, BATCH, RATE, DECAY = 5, 16, 1.2e-3, 0.35
LOOK_LAYERS = {"word": 1, "early": 2, "late": 4}
LOOK_WEIGHTS = {"word": 0.5, "early": 1.0, "late": 1.0}
LOOK_WEIGHT, LOOK_UNTIL = 0.2, 1300
FIRST_LAYER, FIRST_WEIGHT = 3, 0.3


class Model(nn.Module):
    """The LLaVA with the training-only head that says which token is an object's first."""

    def __init__(self, words: int = len(WORDS)) -> None:
        super().__init__()
        self.llava: LlavaForConditionalGeneration = build(words)
        AttentionInterface.register(attention.NAME, attention.packed_prefix)
        self.llava.model.language_model.config._attn_implementation = attention.NAME
        self.first = nn.Linear(TEXT_WIDTH, 1)

    def visual(self, batch: LanguageBatch, tune: bool = False) -> Tensor:
        """Kept features of the vision tower, [B, K, width]."""
        with torch.set_grad_enabled(tune and torch.is_grad_enabled()):
            found = features(self.llava.model.vision_tower, normalize(batch.pixels))[:, 1:]
        index = batch.keep[..., None].expand(-1, -1, found.shape[-1])
        return found.gather(1, index)

    def forward(
        self, batch: LanguageBatch, tune: bool = False
    ) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor]]:
        """Last hidden states of the questions, the layers' inputs, and the rotary embedding."""
        language = self.llava.model.language_model
        image = self.llava.model.multi_modal_projector(self.visual(batch, tune))
        size, kept, _ = image.shape
        device = image.device
        before = language.embed_tokens(torch.tensor(PREFIX[:IMAGE_AT], device=device))
        questions = language.embed_tokens(batch.ids)
        hidden = torch.cat([before.expand(size, -1, -1), image, questions], dim=1)
        prefix, width = IMAGE_AT + kept, batch.ids.shape[1]
        own = batch.block[:, :, None] == batch.block[:, None, :]
        own = own & torch.ones(width, width, device=device).tril().bool()
        hidden_from = F.pad(~own, (prefix, 0))[:, None]
        mask = torch.zeros(hidden_from.shape, device=device).masked_fill_(hidden_from, -1e4)
        if batch.repacked:
            at, after = torch.arange(kept, device=device).expand(size, -1), prefix
        else:
            at, after = batch.keep, len(PREFIX)
        start = torch.arange(IMAGE_AT, device=device).expand(size, -1)
        positions = torch.cat([start, IMAGE_AT + at, after + batch.place], dim=1)
        rotary = language.rotary_emb(hidden, positions)
        inputs = []
        for layer in language.layers:
            inputs.append(hidden)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, prefix=prefix)
        return language.norm(hidden)[:, prefix:], inputs, rotary


def look_loss(
    model: Model, batch: LanguageBatch, inputs: list[Tensor], rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """-log of the attention to visual tokens that falls on the right ones, mean over heads."""
    cos, sin = rotary
    kept = batch.keep.shape[1]
    total = inputs[0].new_zeros(())
    for name, number in LOOK_LAYERS.items():
        where, right = batch.looks[name]
        layer = model.llava.model.language_model.layers[number]
        heads, hidden = layer.self_attn, layer.input_layernorm(inputs[number])
        row, token = where[:, 0], IMAGE_AT + kept + where[:, 1]
        image = slice(IMAGE_AT, IMAGE_AT + kept)
        size = heads.head_dim
        query = heads.q_proj(hidden[row, token]).unflatten(-1, (-1, size))[:, :, None]
        key = heads.k_proj(hidden[:, image]).unflatten(-1, (-1, size)).transpose(1, 2)
        query = apply_rotary_pos_emb(query, query, cos[row, token, None], sin[row, token, None])[0]
        key = apply_rotary_pos_emb(key, key, cos[:, image], sin[:, image])[0]
        logits = (query.float() @ key[row].float().transpose(-1, -2))[:, :, 0] * size**-0.5
        share = (logits.softmax(-1).mean(1) * right).sum(-1)
        total = total - LOOK_WEIGHTS[name] * (share + 1e-4).log().mean()
    return total


def exact(batch: LanguageBatch, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Per kind, how many questions were answered right in every word, and how many were asked."""
    spoken = batch.label != IGNORED
    wrong = torch.zeros(len(batch.kinds), device=predicted.device)
    wrong.index_add_(0, batch.asked[spoken], (predicted[spoken] != batch.label[spoken]).float())
    asked = torch.zeros_like(wrong).index_fill_(0, batch.asked[spoken], 1.0)
    right, total = torch.zeros(2, len(ASKABLE), device=predicted.device)
    right.index_add_(0, batch.kinds, asked * (wrong == 0))
    total.index_add_(0, batch.kinds, asked)
    return right.cpu(), total.cpu()


def start(out: Path) -> Model:
    """The model as the stage begins: the vision stage's tower and read-outs."""
    torch.manual_seed(SEED)
    model, heads = Model(), vision.Heads()
    tower = model.llava.model.vision_tower
    optimizer.load(out / "vision.pt", {"tower": tower, "heads": heads})
    init_language(model.llava, heads.readout())
    return model


@dataclass(frozen=True)
class Course:
    """What is taught: the model it starts from, the kinds asked of a picture, and how fast."""

    start: Callable[[Path], Model] = start
    seed: int = SEED
    kinds: tuple[str, ...] = PACK
    rate: float = RATE
    decay: float = DECAY  # share of the steps in which the rate falls
    first_weight: float = FIRST_WEIGHT
    look_until: int = LOOK_UNTIL


FIRST_COURSE = Course()


def train(
    out: Path,
    steps: int,
    device: str = "cpu",
    resume: bool = False,
    workers: int = 1,
    stop: int | None = None,
    batch: int = BATCH,
    course: Course = FIRST_COURSE,
    look: bool = True,
    tune_from: int | None = None,
    snapshots: tuple[int, ...] = (),
    name: str = "language",
    report: Callable[[str], None] = print,
    every: int = 50,
) -> None:
    """Run the stage into `out/{name}.pt`; `look=False` is the control without looks."""
    model, file = course.start(out).to(device), out / f"{name}.pt"
    out.mkdir(parents=True, exist_ok=True)
    llava = model.llava
    modules: dict[str, nn.Module] = {"model": model}
    parts = {
        "tower": llava.model.vision_tower,
        "projector": llava.model.multi_modal_projector,
        "language": llava.model.language_model,
        "head": llava.lm_head,
        "first": model.first,
    }
    optimizers = optimizer.Optimizers(parts, scale={"tower": 0.2})
    done = optimizer.load(file, modules, optimizers) if resume and file.exists() else 0
    stop = min(steps, stop or steps)
    batches = loader(LanguageBatches(course.seed, batch, stop, course.kinds), done, workers)
    began, since, log = time.time(), done, Log()
    for step in range(done, stop):
        data = next(batches).to(device)
        tune = tune_from is not None and step >= tune_from
        fade = max(0.0, 1 - step / course.look_until)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            hidden, inputs, rotary = model(data, tune)
            spoken = data.label != IGNORED
            logits = llava.lm_head(hidden[spoken])
            answer = F.cross_entropy(logits.float(), data.label[spoken])
            loss = answer
            if course.first_weight:
                kept = slice(IMAGE_AT, IMAGE_AT + data.keep.shape[1])
                first = F.binary_cross_entropy_with_logits(
                    model.first(inputs[FIRST_LAYER][:, kept])[..., 0].float(), data.first
                )
                loss = answer + course.first_weight * first
                log.add("first", first)
            if look and fade > 0:
                looking = look_loss(model, data, inputs, rotary)
                loss = loss + LOOK_WEIGHT * fade * looking
                log.add("look", looking)
        optimizers.step(loss, optimizer.learning_rate(step, steps, course.rate, course.decay))
        log.add("answer", answer)
        predicted = torch.zeros_like(data.label)
        predicted[spoken] = logits.argmax(-1)
        log.count(data.keep.shape[1] == PATCHES, *exact(data, predicted))
        if (step + 1) % every == 0:
            speed = batch * (step + 1 - since) / (time.time() - began)
            spent = (time.time() - began) / 60
            report(f"{step + 1} {spent:.1f} min {speed:.1f} images/s {log.line()}")
            log = Log()
        if step + 1 in snapshots:
            optimizer.save(out / f"{name}-{step + 1}.pt", modules, optimizers, step + 1)
        if (step + 1) % 100 == 0:
            optimizer.save(file, modules, optimizers, step + 1)
    optimizer.save(file, modules, optimizers, stop)


class Log:
    """Means of losses, and accuracy per kind with every visual token and with fewer."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.right = torch.zeros(2, len(ASKABLE))
        self.total = torch.zeros(2, len(ASKABLE))

    def add(self, name: str, value: Tensor) -> None:
        """One more value of a loss."""
        self.sums.setdefault(name, []).append(value.item())

    def count(self, full: bool, right: Tensor, total: Tensor) -> None:
        """One more batch of answers."""
        self.right[int(full)] += right
        self.total[int(full)] += total

    def line(self) -> str:
        """Everything in one line."""
        losses = " ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in self.sums.items())
        share = self.right / self.total.clamp(min=1)
        all_right = self.right.sum(1) / self.total.sum(1).clamp(min=1)
        full = zip(ASKABLE, share[1].tolist(), self.total[1].tolist(), strict=True)
        kinds = " ".join(f"{kind} {value:.2f}" for kind, value, asked in full if asked)
        return f"{losses} | full {all_right[1]:.3f} dropped {all_right[0]:.3f} | {kinds}"
