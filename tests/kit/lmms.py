"""Tiny checkpoints with processors and chat templates, and local tasks, for runs of lmms-eval."""

from __future__ import annotations

import functools
import json
import string
from pathlib import Path

import av
import numpy as np
import transformers
from kit import zoo
from kit.words import FRAMED as QWEN
from kit.words import IDS, chat_template
from kit.words import PLAIN as LLAVA
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from vlmprune.eval.models.families.llava_onevision import ASPECT_RATIO

CHARACTERS = [*string.printable[:95], "\n"]

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>\n{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' and DEFAULT %}system: be brief\n{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
    "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer(special: dict[str, str]) -> transformers.PreTrainedTokenizerFast:
    """Every character is a token, so that prompts that differ have different ids."""
    words = {zoo.PAD: "<pad>", 2: "</s>"} | {IDS[name]: text for name, text in special.items()}
    free = (i for i in range(zoo.FIRST_WORD, zoo.VOCAB) if i not in words)
    words |= dict(zip(free, CHARACTERS, strict=False))
    words |= {i: f"w{i}" for i in range(zoo.VOCAB) if i not in words}
    built = Tokenizer(models.WordLevel({text: i for i, text in words.items()}, unk_token="?"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
        additional_special_tokens=list(special.values()),
        extra_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )


def _llava() -> transformers.ProcessorMixin:
    side = {"height": zoo.PIXELS, "width": zoo.PIXELS}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": zoo.PIXELS}, crop_size=side)
    return transformers.LlavaProcessor(
        images,
        tokenizer(LLAVA),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def _llava_next() -> transformers.ProcessorMixin:
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": zoo.PIXELS},
        crop_size={"height": zoo.PIXELS, "width": zoo.PIXELS},
        image_grid_pinpoints=zoo.PINPOINTS,
    )
    return transformers.LlavaNextProcessor(
        images,
        tokenizer(LLAVA),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def _llava_onevision() -> transformers.ProcessorMixin:
    size = {"height": zoo.PIXELS, "width": zoo.PIXELS}
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=zoo.PINPOINTS),
        tokenizer(LLAVA),
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=zoo.SIDE**2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=ASPECT_RATIO,
        chat_template=LLAVA_TEMPLATE,
    )


def _qwen(processor: str, videos: str) -> transformers.ProcessorMixin:
    options = {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 2560},
        "do_sample_frames": False,
    }
    default = "true" if processor != "Qwen3VLProcessor" else "false"
    return getattr(transformers, processor)(
        transformers.Qwen2VLImageProcessor(**options),
        tokenizer(QWEN),
        getattr(transformers, videos)(**options),
        chat_template=QWEN_TEMPLATE.replace("DEFAULT", default),
    )


PROCESSORS = {
    "llava-clip-llama": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": functools.partial(_qwen, "Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": functools.partial(_qwen, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": functools.partial(_qwen, "Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}


def processor_of(name: str) -> transformers.ProcessorMixin:
    """With letters for words; for further families one that takes all words of a task alike."""
    if name in PROCESSORS:
        return PROCESSORS[name]()
    family = zoo.PROCESSORS[name]
    made = family.processor()
    made.chat_template = chat_template(family.MARKS)
    return made


def pixels(name: str) -> dict[str, int]:
    """What a picture may have, of models that else see as many as a real one's take: minutes."""
    return {"min_pixels": 3136, "max_pixels": 12544} if zoo.CASES[name].packed else {}


def checkpoint(name: str, folder: Path) -> Path:
    """A tiny model of the zoo on disk, with its processor."""
    path = folder / name
    if not path.exists():
        model = zoo.CASES[name].model()
        model.generation_config.eos_token_id = 2
        model.save_pretrained(path)
        processor_of(name).save_pretrained(path)
    return path


UTILS = '''
import numpy as np
from PIL import Image


def picture(seed, width, height):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def doc_to_visual(doc):
    return [picture(doc["seed"] + i, *size) for i, size in enumerate(doc["sizes"])]


def doc_to_video(doc):
    return [doc["video"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    kwargs = lmms_eval_specific_kwargs or {}
    return kwargs.get("pre_prompt", "") + doc["question"] + kwargs.get("post_prompt", "")


def process_results(doc, results):
    return {"exact_match": float(len(results[0]) % 2)}


def process_pairs(doc, results):
    score = float(len(results[0]) % 3 > 0)
    return {"pairs": {"group": doc["group"], "score": score}}


def pairs(items):
    """Like MME's: points of groups whose questions are all right, and of single questions."""
    groups = {}
    for item in items:
        groups.setdefault(item["group"], []).append(item["score"])
    return sum(100 * sum(s) / len(s) + 100 * min(s) for s in groups.values())


def fail(doc, results):
    raise KeyError("no such answer")
'''
TASK = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: data.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function utils.{visual}
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.{process}
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
  do_sample: false
metric_list:
  - metric: {metric}
    aggregation: {aggregation}
    higher_is_better: true
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: "\\nAnswer with a word."
  qwen2_5_vl:
    pre_prompt: "Look! "
    post_prompt: "\\nAnswer."
  qwen3_vl:
    pre_prompt: "See: "
    post_prompt: ""
  llava_hf:
    pre_prompt: "Well: "
    post_prompt: "\\nBriefly."
model_specific_generation_kwargs:
  default:
    num_beams: 1
  qwen3_vl:
    max_new_tokens: 4
metadata:
  {version}
"""
GROUP = """
group: tiny_group
task:
  - tiny_pictures
  - tiny_pairs
"""
QUESTIONS = 7


def tasks(folder: Path) -> Path:
    """Local tasks: pictures of many sizes (one or two a question), videos, points of groups, and
    one whose scoring fails."""
    path = folder / "tasks"
    if path.exists():
        return path
    path.mkdir()
    (path / "utils.py").write_text(UTILS)
    rows = []
    for n in range(QUESTIONS):
        video = path / f"{n}.mp4"
        write_video(video, seed=n, frames=6 + n, width=64, height=48)
        rows.append(
            {
                "question": "What is this" + " and that" * (n % 3) + "?",
                "answer": "yes",
                "seed": 10 * n,
                "sizes": [[40 + 10 * n, 60 - 5 * n]] * (1 + (n == 3)),
                "group": n // 2,
                "video": str(video),
            }
        )
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"visual": "doc_to_visual", "process": "process_results", "metric": "exact_match"}
    common |= {"aggregation": "mean", "version": "version: 2.0"}
    points = {"process": "process_pairs", "metric": "pairs"}
    points |= {"aggregation": "!function utils.pairs", "version": "- version: 1.5"}
    for task, changes in {
        "tiny_pictures": {},
        "tiny_videos": {"visual": "doc_to_video"},
        "tiny_pairs": points,
        "tiny_failing": {"process": "fail"},
    }.items():
        (path / f"{task}.yaml").write_text(TASK.format(task=task, **common | changes))
    (path / "tiny_group.yaml").write_text(GROUP)
    return path


def write_video(path: Path, *, seed: int, frames: int, width: int, height: int) -> None:
    draw = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(frames):
            pixels = draw.integers(0, 255, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def published(folder: Path, rows: int = 8) -> Path:
    """POPE and MME as lmms-eval has them, on pictures drawn here."""
    import datasets
    import lmms_eval.tasks
    from PIL import Image

    path = folder / "published"
    if path.exists():
        return path
    path.mkdir()
    draw = np.random.default_rng(0)
    pixels = [draw.integers(0, 255, (40, 60, 3)).astype(np.uint8) for _ in range(rows)]
    data = datasets.Dataset.from_list(
        [
            {
                "question_id": f"{n // 2}.png",
                "question": f"Is there a thing {n}? Please answer yes or no.",
                "answer": ["Yes", "No"][n % 2],
                "category": ["existence", "code_reasoning"][n // 2 % 2],
                "image": Image.fromarray(pixels[n]),
            }
            for n in range(rows)
        ]
    )
    data.to_parquet(path / "test.parquet")
    home = Path(lmms_eval.tasks.__file__).parent
    for name in ("pope", "mme"):
        (path / f"local_{name}.yaml").write_text(
            f"include: {home / name / name}.yaml\ntask: local_{name}\ndataset_path: parquet\n"
            "dataset_name: null\ndataset_kwargs:\n  data_files:\n    test: test.parquet\n"
        )
    return path
