"""The numbers of the model card: `python -m vlmprune.eval.embedded.evaluate`.

Dense accuracy per kind of question beside the blind baseline and chance, a grounding check (the
asked objects' tokens dropped), and accuracy against kept tokens for four ways to choose them in
both position modes. The choosing here is a few plain lines, independent of the library's methods.
"""

import argparse
import json
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters.cache_names import CACHE, cache_of
from . import (
    EMBEDDED,
    MODELS,
    TASK,
    WHERE_MODEL,
    WHERE_TASK,
    Question,
    benchmark,
    is_correct,
    load_model,
    prompt,
)
from .asking import PACK, answer_choices, ask
from .scenes import GRID, PATCHES, compose
from .task import shipped_tasks
from .vocabulary import KINDS, WHERE
from .where import CELLS
from .where import FILE as WHERE_FILE

RATIOS = (0.5, 0.25, 0.11)
LONGEST = 4  # answer tokens, the end included
Select = Callable[["Seen", int, list[Question]], Tensor]


class Seen:
    """What the vision side gives for a file's pictures: all, or the first `count`."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        batch: int = 32,
        count: int | None = None,
        file: Path = benchmark.FILE,
    ):
        from PIL import Image

        tower = model.model.vision_tower
        tower.set_attn_implementation("eager")  # CLIP's other attentions do not return the weights
        features, looks = [], []
        count = len(benchmark.records(file)) if count is None else count
        for start in range(0, count, batch):
            pictures = [
                Image.fromarray(benchmark.rendered(i, file).pixels)
                for i in range(start, min(start + batch, count))
            ]
            pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            out = tower(pixels, output_hidden_states=True, output_attentions=True)
            layer = model.config.vision_feature_layer
            features.append(model.model.multi_modal_projector(out.hidden_states[layer][:, 1:]))
            looks.append(out.attentions[layer][:, :, 0, 1:].mean(1))
        self.features = torch.cat(features)  # [images, 196, width]
        self.cls_attention = torch.cat(looks)  # [images, 196]


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores, ascending."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def pick_random(seed: int) -> Select:
    """Uniformly random tokens, the same for every question of a picture."""

    def select(seen: Seen, count: int, asked: list[Question]) -> Tensor:
        noise = torch.rand(seen.cls_attention.shape, generator=torch.Generator().manual_seed(seed))
        return top(noise[[q.image_id for q in asked]], count)

    return select


def pick_grid(seen: Seen, count: int, asked: list[Question]) -> Tensor:
    """An even lattice, thinned along the reading order where its size is not `count`."""
    side = int(np.ceil(np.sqrt(count)))
    line = ((np.arange(side) + 0.5) * GRID / side).astype(int)
    lattice = np.array([row * GRID + column for row in line for column in line])
    chosen = lattice[np.linspace(0, len(lattice) - 1, count).round().astype(int)]
    return torch.from_numpy(chosen).expand(len(asked), -1)


def pick_cls(seen: Seen, count: int, asked: list[Question]) -> Tensor:
    """The tokens that CLS attends to most."""
    return top(seen.cls_attention[[q.image_id for q in asked]], count)


def pick_diverse(seen: Seen, count: int, asked: list[Question]) -> Tensor:
    """Greedy max-min distance between projected features."""
    features = F.normalize(seen.features[[q.image_id for q in asked]], dim=-1)
    distance = 1 - features @ features.transpose(1, 2)
    rows = torch.arange(len(asked))
    others = distance + 9 * torch.eye(PATCHES)
    chosen = [others.min(2).values.argmax(1)]
    nearest = distance[rows, chosen[0]]
    for _ in range(count - 1):
        nearest.scatter_(1, chosen[-1][:, None], -1.0)
        chosen.append(nearest.argmax(1))
        nearest = torch.minimum(nearest, distance[rows, chosen[-1]])
    return torch.stack(chosen, dim=1).sort(dim=1).values


def drop_asked(seen: Seen, count: int, asked: list[Question], ring: int = 0) -> Tensor:
    """Random tokens, but none of the asked objects' (for questions that have such), nor within so
    many patches of them."""
    noise = torch.rand(seen.cls_attention.shape, generator=torch.Generator().manual_seed(0))
    noise = noise[[q.image_id for q in asked]]
    for row, question in enumerate(asked):
        theirs = torch.zeros(1, 1, GRID, GRID)
        theirs.view(-1)[list(question.patches)] = 1
        near = F.max_pool2d(theirs, 2 * ring + 1, stride=1, padding=ring)
        noise[row, near.view(-1) > 0] = -1.0
    return top(noise, count)


@torch.no_grad()
def answers(
    model: Any,
    processor: Any,
    seen: Seen,
    asked: list[Question],
    select: Select | None = None,
    count: int = PATCHES,
    positions: str = "original",
    batch: int = 64,
) -> list[str]:
    """Greedy answers from the kept tokens alone; the decoder never sees the others."""
    language, image_token = model.model.language_model, model.config.image_token_id
    ids = [processor.tokenizer(prompt(processor, q.question)).input_ids for q in asked]
    by_length = defaultdict(list)
    for index, line in enumerate(ids):
        by_length[len(line)].append(index)
    spoken = [""] * len(asked)
    for same in by_length.values():
        for start in range(0, len(same), batch):
            rows = same[start : start + batch]
            some = [asked[i] for i in rows]
            keep = torch.arange(PATCHES).expand(len(rows), -1)
            if select is not None:
                keep = select(seen, count, some)
            line = torch.tensor([ids[i] for i in rows])
            at = int((line[0] == image_token).nonzero()[0, 0])
            words = language.embed_tokens(line)
            image = seen.features[[q.image_id for q in some]]
            image = image.gather(1, keep[..., None].expand(-1, -1, image.shape[-1]))
            hidden = torch.cat([words[:, :at], image, words[:, at + 1 :]], dim=1)
            after = torch.arange(line.shape[1] - at - 1).expand(len(rows), -1)
            before = torch.arange(at).expand(len(rows), -1)
            if positions == "original":
                where = torch.cat([before, at + keep, at + PATCHES + after], dim=1)
            else:
                where = torch.arange(hidden.shape[1]).expand(len(rows), -1)
            cache, said = None, []
            for _ in range(LONGEST):
                out = language(
                    inputs_embeds=hidden, position_ids=where, use_cache=True, **{CACHE: cache}
                )
                cache = cache_of(out)
                token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
                said.append(token)
                hidden, where = language.embed_tokens(token), where[:, -1:] + 1
            for index, tokens in zip(rows, torch.cat(said, dim=1).tolist(), strict=True):
                end = processor.tokenizer.eos_token_id
                tokens = tokens[: tokens.index(end)] if end in tokens else tokens
                spoken[index] = processor.tokenizer.decode(tokens)
    return spoken


@torch.no_grad()
def generated(model: Any, processor: Any, asked: list[Question], batch: int = 32) -> list[str]:
    """Answers by the model's own `generate`, as a user gets them (also on a patched model)."""
    texts = [prompt(processor, question.question) for question in asked]
    by_length = defaultdict(list)
    for index, text in enumerate(texts):
        by_length[len(text.split())].append(index)
    spoken = [""] * len(asked)
    for same in by_length.values():
        for start in range(0, len(same), batch):
            rows = same[start : start + batch]
            inputs = processor(
                images=[asked[i].image for i in rows],
                text=[texts[i] for i in rows],
                return_tensors="pt",
            )
            out = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
            out = out[:, inputs["input_ids"].shape[1] :]
            said = processor.batch_decode(out, skip_special_tokens=True)
            for index, words in zip(rows, said, strict=True):
                spoken[index] = words
    return spoken


def library(
    model: Any, processor: Any, asked: list[Question], names: list[str]
) -> dict[str, dict[str, float]]:
    """Accuracy with methods of this library, patched in with their own defaults."""
    from ...adapters.patching import patch

    rows = {"dense, generate()": accuracy(asked, generated(model, processor, asked))}
    for name in names:
        for ratio in RATIOS[1:]:
            with patch(model, name, keep_ratio=ratio) as handle:
                spoken = generated(model, processor, asked)
                rows[f"vlmprune {name} {ratio} {handle.positions}"] = accuracy(asked, spoken)
    return rows


def accuracy(asked: list[Question], spoken: list[str]) -> dict[str, float]:
    """Percent right: `all`, then each kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, said in zip(asked, spoken, strict=True):
        ok = is_correct(said, question.answer)
        right["all"].append(ok)
        right[question.kind].append(ok)
    return {kind: round(100 * float(np.mean(right[kind])), 1) for kind in ("all", *kinds_of(asked))}


def kinds_of(asked: list[Question]) -> list[str]:
    """The kinds that are asked: those of the benchmark as they are named, then cells."""
    found = {question.kind for question in asked}
    return [kind for kind in (*KINDS, *CELLS) if kind in found]


def blind(asked: list[Question], scenes: int = 2000) -> dict[str, float]:
    """Always the commonest training answer to the same question, or else to the same kind."""
    rng = np.random.default_rng(99)
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    kinds = PACK if any(question.kind in KINDS for question in asked) else (WHERE,) * 3
    for _ in range(scenes):
        for question in ask(rng, compose(rng), kinds):
            answer = " ".join(question.answer)
            by_text[question.text][answer] += 1
            by_kind[question.kind][answer] += 1
    said = [(by_text[q.question] or by_kind[q.kind]).most_common(1)[0][0] for q in asked]
    return accuracy(asked, said)


def evaluate(
    folder: Path,
    limit: int | None,
    random_seeds: int,
    ratios: list[float],
    methods: list[str],
    name: str = TASK,
) -> dict[str, Any]:
    """Every row of the card for one model folder and one task."""
    task, file = shipped_tasks()[name], benchmark.FILE if name == TASK else WHERE_FILE
    model, processor = load_model(folder=folder)
    asked: list[Any] = list(task.questions(limit))
    began = time.time()
    with torch.no_grad():
        seen = Seen(model, processor, file=file)

    def score(*args: Any, **kwargs: Any) -> dict[str, float]:
        return accuracy(asked, answers(model, processor, seen, asked, *args, **kwargs))

    chance = {kind: round(100 / answer_choices(kind), 1) for kind in kinds_of(asked)}
    rows: dict[str, dict[str, float]] = {
        "dense": score(),
        "blind": blind(asked),
        "chance": {"all": round(float(np.mean([chance[q.kind] for q in asked])), 1), **chance},
    }
    if ratios:
        half = round(PATCHES * 0.5)
        rows["asked object dropped, 50 %"] = score(drop_asked, half)
        rows["asked object and around it dropped, 50 %"] = score(partial(drop_asked, ring=1), half)
        choices = {"grid": pick_grid, "cls": pick_cls, "diverse": pick_diverse}
        for positions in ("original", "repacked"):
            for ratio in ratios:
                count = round(PATCHES * ratio)
                draws = [score(pick_random(s), count, positions) for s in range(random_seeds)]
                mean = {k: round(float(np.mean([d[k] for d in draws])), 1) for k in draws[0]}
                rows[f"random {ratio} {positions}"] = mean
                for choice, select in choices.items():
                    rows[f"{choice} {ratio} {positions}"] = score(select, count, positions)
    if methods:
        model, processor = load_model(folder=folder)  # its fast attention again
        rows |= library(model, processor, asked, methods)
    objects = torch.from_numpy(
        np.stack([benchmark.rendered(q.image_id, file).owned.any(0) for q in asked])
    )
    looks = seen.cls_attention[[q.image_id for q in asked]]
    on_objects = (looks * objects).sum(1).mean()
    return {
        "task": name,
        "task_version": task.version,
        "benchmark_sha256": benchmark.digest(file),
        "questions": len(asked),
        "kinds": Counter(q.kind for q in asked),
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seconds": round(time.time() - began),
        "patches_with_objects_percent": round(100 * objects.float().mean().item(), 1),
        "cls_attention_on_objects_percent": round(100 * on_objects.item(), 1),
        "accuracy": rows,
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """A markdown table."""
    head = ("", *next(iter(rows.values())))
    lines = [head, tuple("---" for _ in head)]
    lines += [(name, *(f"{row[kind]:.1f}" for kind in head[1:])) for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print the tables; write them where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=(TASK, WHERE_TASK), default=TASK)
    parser.add_argument("--model", type=Path, help="a folder (default: the task's own model)")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--random-seeds", type=int, default=3)
    parser.add_argument(
        "--ratios", type=float, nargs="*", default=RATIOS, help="kept; none: dense and baselines"
    )
    parser.add_argument("--library", nargs="*", default=[], help="methods of vlmprune to add")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = args.model or MODELS[EMBEDDED if args.task == TASK else WHERE_MODEL]
    draws = args.random_seeds
    result = evaluate(folder, args.limit, draws, args.ratios, args.library, args.task)
    facts = {key: value for key, value in result.items() if key != "accuracy"}
    sys.stdout.write(f"{facts}\n{table(result['accuracy'])}\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
