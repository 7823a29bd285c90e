"""Before the LLM: a choice per image, between the vision encoder and the decoder."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...prune.contract import Signal
from ...prune.errors import UnsupportedModelError
from ...prune.tiling import Tiling
from ..checks.encoding import refuse_encoder, refuse_tuple
from ..encoded import MARK, Encoded, encode, encode_merged
from ..family import Call, Family, Inputs, Modality
from ..hooks import Hooks, Undo, all_of, shadow
from ..patch_setup import Setup
from ..remember import ImageMemory
from ..signals.encoder import Images
from .call import InFlight
from .driver import Driver
from .encoder import EncoderDriver
from .handover import Handover


class BeforeLLMDriver(Driver):
    """Encodes images, chooses from them, and hands on the rows that enter the LLM.

    Args:
        family: as it is of the vision encoder that `encoder` drives.
        wanted: what a call that begins now runs with; None: without any method.
        memory: images that were asked about before.
    """

    def __init__(
        self,
        family: Family,
        encoder: EncoderDriver,
        hooks: Hooks,
        flight: InFlight,
        wanted: Callable[[], Setup | None],
        memory: ImageMemory | None,
    ) -> None:
        self._family, self._encoder, self._hooks = family, encoder, hooks
        self._flight, self._wanted, self._memory = flight, wanted, memory

    def install(self) -> Undo:
        """Shadow the methods that encode images and videos with this vision encoder."""
        family = self._family
        return all_of(
            [
                shadow(family.core, modality.encode, functools.partial(self._encode, modality))
                for modality in family.modalities
                if family.of(modality) is family
            ]
        )

    @torch.compiler.disable
    def _encode(
        self, modality: Modality, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        flight = self._flight
        if self._encoder.reading:  # Qwen3-VL encodes videos as it does images
            return original(*args, **kwargs)
        setup = flight.setup if flight.active else self._wanted()
        if setup is None:
            return original(*args, **kwargs)
        inputs = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
        inputs |= inputs.pop("kwargs", {})
        call = self._family.call(modality, inputs, flight.prompt)
        encode_images = functools.partial(self._encode_images, setup, original)
        if self._memory is None or not flight.active:
            output, encoded = encode_images(call)
        else:
            output, encoded = self._memory.encode(self._family, call, encode_images, setup)
        if encoded is not None:
            setattr(output, MARK, encoded)
            flight.encoded[modality] = encoded
        return output

    def _encode_images(
        self,
        setup: Setup,
        original: Callable[..., Any],
        call: Call,
        numbers: Sequence[int] | None = None,
    ) -> tuple[Any, Encoded | None]:
        """Images on their way through the encoder, and what was chosen of them; `numbers`: which
        images of the call they are, where not all."""
        flight = self._flight
        handover = self._handover(setup, call, numbers)
        passage = None if handover is None else handover.passage
        # Another caller may read all that the encoder gives.
        unread = self.unread(setup, call.inputs) if flight.active else frozenset()
        self._hooks.hold(setup.standing)
        try:
            with self._encoder.read(setup.tapped, unread, passage) as recording:
                output = original(**call.inputs)
        finally:
            self._hooks.release(setup.standing)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:  # return_dict=False: a plain tuple cannot carry the choice
            if passage is not None:
                refuse_tuple(passage.method)
            return output, None
        features = self._family.images(call, pooled)
        tilings = None if handover is None else handover.tilings
        tilings = self._tilings(call, features, tilings)
        device = features[0].device
        left = None if handover is None else handover.selections(device)
        signals: list[dict[Signal, Tensor]] = [{} for _ in features]
        if setup.first is not None:
            compete = setup.first.newline_policy == "compete" and passage is None
            images = Images(
                self._family,
                call,
                output,
                features,
                tilings,
                flight.prompt,
                setup.clip,
                compete,
                None if passage is None else passage.spread_at,
            )
            signals = recording.of_images(images, setup.read)
            if handover is not None and left is not None:
                signals = handover.alive(left, signals)
        encoded = encode(
            setup,
            tilings,
            signals,
            device,
            self._numbers(setup, call, numbers, len(tilings)),
            left=left,
            entering=() if passage is None else passage.entering,
            stopwatch=None if passage is None else passage.stopwatch,
        )
        emitted = self._emit(features, encoded)
        output.pooler_output = self._family.pooled(call, emitted, type(pooled))
        return output, encoded

    def _handover(self, setup: Setup, call: Call, numbers: Sequence[int] | None) -> Handover | None:
        """The images of a call for a method inside the encoder; None without one."""
        if setup.in_encoder is None:
            return None
        refuse_encoder(self._family, call, setup.in_encoder)
        calls = setup.calls_of(self._numbers(setup, call, numbers))
        return Handover(self._family, call, setup, calls)

    def _numbers(
        self, setup: Setup, call: Call, numbers: Sequence[int] | None, count: int | None = None
    ) -> Sequence[int]:
        """Those of the images of a call among all that budgets are given for."""
        if count is None:
            count = len(self._family.pictures(call))
        numbers = range(count) if numbers is None else numbers
        if setup.per_image is None or not self._flight.active:
            return numbers
        # An earlier modality of the call has the first budgets.
        others = [one for other, one in self._flight.encoded.items() if other is not call.modality]
        before = sum(len(one.images) for one in others)
        return [before + number for number in numbers]

    def _tilings(
        self, call: Call, features: Sequence[Tensor], tilings: Sequence[Tiling] | None
    ) -> Sequence[Tiling]:
        """How the tokens of each image lie, if the family knows it; `tilings`: found already."""
        tilings = self._family.tilings(call, features) if tilings is None else tilings
        for tiling, feature in zip(tilings, features, strict=True):
            if tiling.num_tokens != len(feature):
                raise UnsupportedModelError(
                    f"An {call.modality.name} gave {len(feature)} visual tokens, but its layout "
                    f"has {tiling.num_tokens}: this variant of {self._family.name} is not "
                    f"supported."
                )
        return tilings

    def unread(self, setup: Setup, inputs: Inputs) -> frozenset[nn.Module]:
        """Encoder layers that neither the projector nor a method reads."""
        return self._encoder.unread(setup.tapped, self._family.unread_layers(inputs))

    def _emit(self, features: Sequence[Tensor], encoded: Encoded) -> list[Tensor]:
        """The encoder's features with merged and moved rows in their slots."""
        pairs = zip(features, encoded.images, strict=True)
        return [image.emit(feature, self._family.project) for feature, image in pairs]

    def from_embeds(self, setup: Setup, embeds: Tensor, visual: Tensor) -> tuple[Tensor, Encoded]:
        """Images that the caller merged into `embeds` (B, L, D) itself, at the columns `visual`:
        the same with merged and moved rows in their slots, and what was chosen."""
        encoded = encode_merged(setup, embeds, visual)
        if all(image.as_is for image in encoded.images):
            return embeds, encoded
        features = embeds[visual].split([image.num_tokens for image in encoded.images])
        emitted = torch.cat(self._emit(features, encoded))
        return embeds.masked_scatter(visual[..., None], emitted), encoded
