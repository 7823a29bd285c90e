"""Chat messages of lmms-eval -> inputs of a model, as the family's own wrapper makes them.

The wrappers of most families hand pictures to the processor as they are; those of the Qwen
families have qwen_vl_utils scale them first. Both are followed to the last pixel, but for JPEG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from ...adapters.family import VIDEO
from ...adapters.registry import family_class, family_of, model_names
from ...prune.errors import UnsupportedFeatureError, VlmpruneError
from ..models.family import Scaling
from ..models.registry import known_family

if TYPE_CHECKING:
    from lmms_eval.protocol import ChatMessages
    from transformers import PreTrainedModel

MIN_PIXELS, MAX_PIXELS = 256 * 28 * 28, 1605632
"""The limits that the wrappers of the Qwen families load the processor with."""
SYSTEM_PROMPT = "You are a helpful assistant."
NUM_FRAMES = 32

Pictures = Image.Image | list[Image.Image]
"""A picture, or the frames of a video."""


class MediaError(VlmpruneError, ValueError):
    """A picture or video that cannot be read.

    Symptom: a cell over a task of lmms-eval fails at one of its questions.
    Cause: the video is damaged or empty, or `fps` is given for a model that sees a fixed number of
        frames.
    Type: `--model_args num_frames=8` in place of `fps`; fetch the data again.
    Page: ERRORS.md#mediaerror
    """


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A batch: the model's inputs, left-padded, and what each row holds."""

    inputs: dict[str, Any]
    images: list[int]
    videos: list[int]
    media: list[list[Pictures]]
    """Of each row, in the order of the prompt."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """How videos are read: `num_frames` evenly spaced, or `fps` a second and `num_frames` at most
    (the Qwen families only)."""

    num_frames: int = NUM_FRAMES
    fps: float | None = None


class Encoder(Protocol):
    """Makes inputs of chats."""

    default_new_tokens: int
    """Where the task does not say how long answers may be."""

    def __call__(self, chats: Sequence[ChatMessages]) -> Encoded: ...


def encoder_for(model: PreTrainedModel, processor: Any, video: Video) -> Encoder:
    """What makes inputs of this model."""
    family = known_family(model.config.model_type)
    if family is None or family.scaling is None:
        return PlainEncoder(model, processor, video)
    return ScalingEncoder(family.scaling, processor, video)


class PlainEncoder:
    """Families whose processor takes pictures as they are, and those of which nothing is known."""

    default_new_tokens = 1024

    def __init__(self, model: PreTrainedModel, processor: Any, video: Video) -> None:
        if video.fps is not None:
            raise MediaError(
                f"fps={video.fps}: {model.config.model_type} models see a fixed number of frames: "
                f"give num_frames={NUM_FRAMES} instead."
            )
        self.model = model
        self.processor = processor
        self.num_frames = video.num_frames
        self.takes_videos = _takes_videos(model)
        family = known_family(model.config.model_type)
        self.flat = family is not None and family.flat_pictures

    def __call__(self, chats: Sequence[ChatMessages]) -> Encoded:
        texts = [_prompt(self.processor, chat.model_dump()["messages"]) for chat in chats]
        found = [_media(chat) for chat in chats]
        if not self.takes_videos and any(videos for _, videos, _ in found):
            raise UnsupportedFeatureError(
                f"{self.model.config.model_type} models take no videos: choose a model that does, "
                f"e.g. {_with_videos()}, or tasks with pictures."
            )
        clips = [[_frames(video, self.num_frames) for video in videos] for _, videos, _ in found]
        images = [images for images, _, _ in found]
        if self.flat:
            images = [image for of_prompt in images for image in of_prompt]
        videos = [clip for row in clips for clip in row]
        inputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            **({"videos": videos} if videos else {}),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return Encoded(
            inputs=dict(inputs),
            images=[len(images) for images, _, _ in found],
            videos=[len(videos) for _, videos, _ in found],
            media=[
                _in_order(kinds, images, [list(map(Image.fromarray, clip)) for clip in row])
                for (images, _, kinds), row in zip(found, clips, strict=True)
            ],
        )


class ScalingEncoder:
    """Families for which qwen_vl_utils reads and scales pictures and videos.

    The wrapper of Qwen2-VL hands pictures on as JPEG, which ours does not.
    """

    default_new_tokens = 128

    def __init__(self, scaling: Scaling, processor: Any, video: Video) -> None:
        self.scaling = scaling
        self.processor = processor
        self.video = video
        size = processor.image_processor.size
        self.limits = {
            "min_pixels": size["shortest_edge"],
            "max_pixels": size["longest_edge"],
        }

    def __call__(self, chats: Sequence[ChatMessages]) -> Encoded:
        from qwen_vl_utils import process_vision_info

        size = self.scaling.patch_size
        messages = [self._messages(chat) for chat in chats]
        texts = [_prompt(self.processor, rows) for rows in messages]
        images, videos, options = process_vision_info(
            messages,
            return_video_kwargs=True,
            return_video_metadata=True,
            **({"image_patch_size": size} if size else {}),
        )
        clips, metadata = map(list, zip(*videos, strict=True)) if videos else ([], [])
        if self.scaling.thins_videos:
            clips, metadata = [_thinned(clip, self.video.num_frames) for clip in clips], []
        inputs = self.processor(
            text=texts,
            images=images,
            videos=clips or None,
            video_metadata=metadata or None,
            **({**options, "do_resize": False} if size else {}),  # scaled once is enough
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        found = [_media(chat) for chat in chats]
        shown = iter([_as_pictures(clip) for clip in clips])
        return Encoded(
            inputs=dict(inputs),
            images=[len(images) for images, _, _ in found],
            videos=[len(videos) for _, videos, _ in found],
            media=[
                _in_order(kinds, images, [next(shown) for _ in videos])
                for images, videos, kinds in found
            ],
        )

    def _messages(self, chat: ChatMessages) -> list[dict[str, Any]]:
        messages = chat.to_hf_messages(
            video_kwargs=self.limits, image_kwargs=self.limits if self.scaling.limits_images else {}
        )
        for message in messages:
            for content in message["content"]:
                if content["type"] == "video":
                    content |= self._sampling(content["video"])
        if self.scaling.system_prompt and messages[0]["role"] != "system":
            text = {"type": "text", "text": SYSTEM_PROMPT}
            messages.insert(0, {"role": "system", "content": [text]})
        return messages

    def _sampling(self, path: str) -> dict[str, float]:
        """How many frames: even, as two make one, and no more than there are."""
        if self.video.fps is not None:
            most = {"max_frames": self.video.num_frames} if self.scaling.limits_fps else {}
            return {"fps": self.video.fps} | most
        if self.scaling.thins_videos:  # two a second, and evenly spaced ones of these
            return {}
        return {"nframes": max(2, min(self.video.num_frames, _count_frames(path)) // 2 * 2)}


def _thinned(clip: Any, most: int) -> Any:
    """At most so many frames of a video (T, 3, H, W), evenly spaced."""
    return clip[np.unique(np.linspace(0, len(clip) - 1, most, dtype=int))]


def _prompt(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _takes_videos(model: PreTrainedModel) -> bool:
    return VIDEO in family_of(model).modalities


def _with_videos() -> str:
    """The name of a family that takes videos."""
    return next(name for name in model_names() if VIDEO in family_class(name).modalities)


def _media(chat: ChatMessages) -> tuple[list[Any], list[Any], list[str]]:
    """Images and videos of a chat, and in which order the two come."""
    images, videos, sounds = chat.extract_media()
    if sounds:
        raise UnsupportedFeatureError(
            "This task has sound, which no supported model hears: choose tasks with pictures."
        )
    kinds = [content.type for message in chat.messages for content in message.content]
    return images, videos, [kind for kind in kinds if kind != "text"]


def _in_order(
    kinds: Sequence[str], images: Sequence[Any], videos: Sequence[list[Image.Image]]
) -> list[Pictures]:
    stills, clips = iter(images), iter(videos)
    return [_opened(next(stills)) if kind == "image" else next(clips) for kind in kinds]


def _opened(image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.open(image)


def _as_pictures(clip: Any) -> list[Image.Image]:
    """Frames (T, 3, H, W) of a video."""
    return [Image.fromarray(frame) for frame in clip.byte().permute(0, 2, 3, 1).numpy()]


def _count_frames(path: str) -> int:
    """Frames of a video file."""
    import av

    with _opened_video(path) as container:
        stream = container.streams.video[0]
        return stream.frames or sum(1 for _ in container.decode(stream)) or _empty(path, av)


def _frames(path: str, count: int) -> Any:
    """`count` evenly spaced frames of a video file, some of them twice if it is shorter, so that
    videos make a batch: (T, H, W, 3), uint8."""
    wanted = np.linspace(0, _count_frames(path) - 1, count, dtype=int).tolist()
    found: dict[int, Any] = {}
    with _opened_video(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
    last = found[max(found)]  # where a file promises more frames than it has
    return np.stack([found.get(number, last) for number in wanted])


def _opened_video(path: str) -> Any:
    import av

    try:
        return av.open(path)
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"The video {path!r} cannot be read: {error}.") from error


def _empty(path: str, av: Any) -> int:
    raise MediaError(f"The video {path!r} has no frames.")
