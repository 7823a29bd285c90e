"""Our model among those of lmms-eval: `lmms-eval --model vlmprune --model_args ...`.

    pretrained=llava-hf/llava-1.5-7b-hf,method=divprune,keep_ratio=0.11
    pretrained=embedded,method=fastv,layer=3,average_tokens=64
    pretrained=Qwen/Qwen2.5-VL-7B-Instruct,method=divprune@0.5+fastv:layer=3@0.25

A failed generation is raised, in every process of the run; it is never scored as an empty answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from ...adapters.clip_text import ClipText
from ...adapters.devices import input_device
from ...adapters.handle import Handle
from ...adapters.patching import patch
from ...prune.budget import BUDGET_WORDS, Budget, MethodCall
from ...prune.contract import Positions
from ...prune.errors import MethodFieldError, UnsupportedFeatureError
from ..embedded import EMBEDDED
from ..measure.answering import Answer, answer, tokens_of
from ..measure.times import PatchOptions
from ..models.loading import (
    limit_pixels,
    load,
    load_clip,
    resolve_device,
    scales_pictures,
)
from ..processes import Processes
from .arguments import calls_of
from .prompts import MAX_PIXELS, MIN_PIXELS, NUM_FRAMES, Encoded, Video, encoder_for
from .stock import address, wrapper_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ARGUMENTS = (
    "pretrained",
    "method",
    "positions",
    "clip",
    "dtype",
    "attn_implementation",
    "device",
    "device_map",
    "revision",
    "trust_remote_code",
    "min_pixels",
    "max_pixels",
    "num_frames",
    "fps",
    "system_prompt",
    "batch_size",
    "max_batch_size",
)
_LOADING = ("device_map", "revision", "trust_remote_code")
_PIXELS = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}


class OnAnswer(Protocol):
    """Told of every answer while the handle still knows of its prefill."""

    def __call__(
        self,
        request: Instance,
        answer: Answer,
        handle: Handle | None,
        encoded: Encoded,
        row: int,
    ) -> None: ...


def ignore(
    request: Instance, answer: Answer, handle: Handle | None, encoded: Encoded, row: int
) -> None:
    """What is told where nobody listens."""


class VlmPrune(lmms):  # type: ignore[misc]
    """A model of any supported family, pruned or dense. Arguments are those of `--model_args`.

    Args:
        pretrained: a folder, a name on the Hugging Face Hub, or `embedded`.
        method: a method, or several, as `vlmprune sweep --methods` takes them; `none` for the
            dense model. Fields of a single method may be arguments of their own (`layer=3`).
        keep_ratio, keep_tokens, average_tokens, flops_ratio: the budget.
        positions, clip: as in `vlmprune.patch`; `clip` names a checkpoint.
        dtype, attn_implementation, device, device_map, revision, trust_remote_code: for loading.
        min_pixels, max_pixels: of a picture, for the Qwen families.
        num_frames, fps: see `Video`.
        system_prompt: replaces the one that the family's wrapper or chat template gives.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = EMBEDDED,
        method: str = "none",
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        *,
        positions: Positions | None = None,
        clip: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        num_frames: int = NUM_FRAMES,
        fps: float | None = None,
        system_prompt: str | None = None,
        **others: Any,
    ) -> None:
        budget = Budget.of(**{word: others.pop(word) for word in BUDGET_WORDS if word in others})
        loading = {name: others.pop(name) for name in _LOADING if name in others}
        pixels = {name: others.pop(name) for name in _PIXELS if name in others}
        calls = calls_of(str(method), budget, others, _ARGUMENTS)
        size = _batch_size(batch_size, max_batch_size)
        processes = Processes.started(cpu=device == "cpu")
        device = resolve_device(device or processes.device, may_shard=True)
        model, processor = _load(
            pretrained,
            pixels,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device=device,
            **loading,
        )
        self._set(
            model,
            processor,
            batch_size=size,
            clip=load_clip(clip, processor, device=device),
            processes=processes,
            video=Video(num_frames=num_frames, fps=fps),
            system_prompt=system_prompt,
        )
        if processes.world > 1:  # lmms-eval gathers and waits with it
            from accelerate import Accelerator

            self.accelerator = Accelerator()
        self.use(calls, positions)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        processor: Any,
        *,
        batch_size: int = 1,
        clip: ClipText | None = None,
        processes: Processes | None = None,
        video: Video | None = None,
        system_prompt: str | None = None,
    ) -> VlmPrune:
        """Of a model that is loaded already; dense until `use` says otherwise."""
        self = cls.__new__(cls)
        self._set(
            model,
            processor,
            batch_size=batch_size,
            clip=clip,
            processes=processes or Processes(),
            video=video or Video(),
            system_prompt=system_prompt,
        )
        return self

    def _set(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        batch_size: int,
        clip: ClipText | None,
        processes: Processes,
        video: Video,
        system_prompt: str | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.processes = processes
        self.system_prompt = system_prompt
        self.encode = encoder_for(model, processor, video)
        self.wrapper = wrapper_of(model)
        self.device = input_device(model)
        self.on_answer: OnAnswer = ignore
        self._clip = clip
        self._rank, self._world_size = processes.rank, processes.world
        self.calls: tuple[MethodCall, ...] = ()
        self.options: PatchOptions = {"positions": None, "clip": clip}

    def use(self, calls: Sequence[MethodCall], positions: Positions | None = None) -> None:
        """What the model is patched with from now on; nothing for the dense model.

        Raises:
            VlmpruneError: the model cannot be patched so.
        """
        self.calls = tuple(calls)
        self.options = {"positions": positions, "clip": self._clip}
        with self.patched():
            pass

    def patched(self) -> AbstractContextManager[Handle | None]:
        return patch(self.model, self.calls, **self.options) if self.calls else nullcontext()

    def clean(self) -> None:
        """Keep the model: more evaluations may follow."""

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers, in order. An error in one process is raised in all."""
        answers: list[Answer] = []
        started = time.perf_counter()
        self.processes.gather(lambda: answers.extend(self.answers(requests)))
        _log(answers, time.perf_counter() - started)
        return [result(answer) for answer in answers]

    def answers(self, requests: Sequence[Instance]) -> list[Answer]:
        """What this process says, batch by batch: requests with equal generation settings."""
        import torch

        address(requests, self.wrapper)
        found: dict[int, Answer] = {}
        with self.patched() as handle, torch.inference_mode():
            for generation, numbers in _batches(requests, self.batch_size):
                encoded = self.inputs([requests[n] for n in numbers])
                answered = answer(
                    self.model,
                    self.processor,
                    encoded.inputs,
                    handle,
                    images=encoded.images,
                    videos=encoded.videos,
                    **self._generate(generation),
                )
                for row, (number, one) in enumerate(zip(numbers, answered, strict=True)):
                    found[number] = one
                    self.on_answer(requests[number], one, handle, encoded, row)
        return [found[number] for number in range(len(requests))]

    def inputs(self, requests: Sequence[Instance]) -> Encoded:
        """What the model is given, on its device."""
        encoded = self.encode([self.chat(request) for request in requests])
        for name, tensor in encoded.inputs.items():
            if not hasattr(tensor, "to"):
                continue
            dtype = self.model.dtype if tensor.is_floating_point() else tensor.dtype
            encoded.inputs[name] = tensor.to(self.device, dtype)
        return encoded

    def chat(self, request: Instance) -> ChatMessages:
        """The messages of a request."""
        _, messages_of, _, doc_id, task, split = request.arguments
        messages = messages_of(self.task_dict[task][split][doc_id])
        if self.system_prompt:
            messages = self._apply_system_prompt(
                messages, self._resolve_system_prompt(self.system_prompt)
            )
        return ChatMessages(messages=messages)

    def _generate(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `generate`, as the families' wrappers read those of a task: sampling if
        there is a temperature; `until` and what only other models know are left out."""
        temperature = given.get("temperature") or 0
        sample = temperature > 0
        tokenizer = self.processor.tokenizer
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        return {
            "do_sample": sample,
            "temperature": temperature if sample else None,
            "top_p": given.get("top_p") if sample else None,
            "top_k": given.get("top_k") if sample else None,
            "num_beams": given.get("num_beams") or 1,
            "max_new_tokens": self.new_tokens(given),
            **({"eos_token_id": end} if end is not None else {}),
            **({"pad_token_id": end if pad is None else pad} if (end, pad) != (None, None) else {}),
        }

    def new_tokens(self, generation: Mapping[str, Any]) -> int:
        """How long an answer may be."""
        return int(generation.get("max_new_tokens") or self.encode.default_new_tokens)

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        _refuse("loglikelihood", "choose a task that generates (e.g. seedbench, not seedbench_ppl)")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        _refuse("generate_until_multi_round", "choose a task with one question and one answer")


def result(answer: Answer) -> GenerationResult:
    """An answer as lmms-eval takes it, with its tokens: those that entered the first layer."""
    counts = TokenCounts(
        input_tokens=answer.text_tokens + answer.visual, output_tokens=answer.generated
    )
    return GenerationResult(text=answer.text, token_counts=counts)


def _log(answers: Sequence[Answer], seconds: float) -> None:
    """For the `throughput` of lmms-eval's results: speed, and means of visual tokens."""
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    tokens, generated = tokens_of(answers), sum(answer.generated for answer in answers)
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=generated,
        avg_speed=generated / seconds,
        additional_metrics={
            "visual_tokens": tokens["in_per_image"],
            "visual_tokens_kept": tokens["kept_per_image"],
            "visual_tokens_per_layer": tokens["average_per_layer"],
        },
    )


def _refuse(what: str, instead: str) -> NoReturn:
    raise UnsupportedFeatureError(f"vlmprune does not answer requests of type {what}: {instead}.")


def _batches(requests: Sequence[Instance], size: int) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Generation settings, and the numbers of up to `size` requests that share them."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.arguments[2].items(), key=str)), []).append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            yield dict(requests[batch[0]].arguments[2]), batch


def _batch_size(given: int | str, most: int | str | None) -> int:
    try:
        size = int(given)
        limit = size if most is None else int(most)
    except ValueError:
        size = limit = 0
    if min(size, limit) < 1:
        raise MethodFieldError(
            f"batch_size={given}, max_batch_size={most}: write whole numbers of at least 1, e.g. "
            f"--batch_size 8; there is no automatic size."
        )
    return min(size, limit)


def _load(name: str, pixels: Mapping[str, int], **options: Any) -> tuple[PreTrainedModel, Any]:
    model, processor = load(name, **options)
    return model, as_wrapper_scales(model, processor, pixels)


def as_wrapper_scales(model: PreTrainedModel, processor: Any, pixels: Mapping[str, int]) -> Any:
    """The processor; for families that scale pictures a copy with their wrappers' limits, where
    `pixels` gives no others.

    Raises:
        MethodFieldError: `pixels` for another family.
    """
    if not pixels and not scales_pictures(model):
        return processor
    return limit_pixels(model, processor, _PIXELS | dict(pixels))
