"""What tiny random models hide of real ones: pictures that processors scale and cut, embeddings
that are not replaced by features."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import vlmprune
from kit import zoo
from PIL import Image
from vlmprune.prune.tiling import Tiling

WIDE = Image.radial_gradient("L").resize((200, 100)).convert("RGB")


def test_sizes_of_mistral_3_are_those_behind_the_resize():
    """Rows of tokens are of the shrunk picture; the break behind each is text, and stays."""
    family, model = zoo.OF_TESTS["mistral3"], zoo.CASES["mistral3"].model()
    inputs = family.processor()(text=["w5 [IMG] w6"], images=[[WIDE]], return_tensors="pt")
    assert inputs["image_sizes"].tolist() == [[32, 64]]
    breaks = inputs["input_ids"] == zoo.VISION_START
    assert int(breaks.sum()) == 4 - 1  # behind the last row the picture ends
    with vlmprune.patch(model, "divprune", keep_tokens=1) as handle, torch.no_grad():
        model(**inputs)
        assert handle.last.tilings == [Tiling.single(4, 8)]
        assert handle.last.tokens_in == [32] and handle.last.tokens_kept == [1]
        assert handle.last.text_tokens == [inputs["input_ids"].shape[1] - 32]


def test_crops_of_pan_and_scan_are_images_of_their_own():
    """Gemma 3 has words between them, and nothing says that they are one picture."""
    family, model = zoo.OF_TESTS["gemma3"], zoo.CASES["gemma3"].model()
    cut = {"min_crop_size": 10, "max_num_crops": 4, "min_ratio_to_activate": 1.2}
    inputs = family.processor()(
        text=["w5 <start_of_image> w6"],
        images=[[WIDE]],
        return_tensors="pt",
        do_pan_and_scan=True,
        **{f"pan_and_scan_{name}": value for name, value in cut.items()},
    )
    assert len(inputs["pixel_values"]) == 3  # the picture, and its halves
    with vlmprune.patch(model, "divprune", keep_tokens=2) as handle, torch.no_grad():
        model(**inputs)
        assert handle.last.tokens_in == [9] * 3 and handle.last.tokens_kept == [2] * 3


@pytest.mark.parametrize("kind", ["video_llama_3", "molmo2", "aya_vision"])
def test_families_without_a_file_are_refused(kind):
    """Video-LLaMA 3 drops tokens of videos itself, Molmo 2 adds features to embeddings: neither
    does what the others' hooks count on."""
    model = torch.nn.Module()
    model.config = SimpleNamespace(model_type=kind)
    with pytest.raises(vlmprune.UnsupportedModelError, match=f"{kind}.*is not supported"):
        vlmprune.patch(model, "divprune", keep_ratio=0.5)
