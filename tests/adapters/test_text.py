"""Text that methods read: which text belongs to which image, and CLIP's joint space."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import zoo
from vlmprune.adapters.family import IMAGE, VIDEO
from vlmprune.adapters.sequence.prompt import Prompt
from vlmprune.eval.checking.tiny_clip import WORDS, clip, clip_words, words
from vlmprune.prune.contract import (
    BeforeLLM,
    ClipImage,
    ClipText,
    EncoderFeatures,
    Selection,
    TextEmbeddings,
)

IM, VI = zoo.IMAGE, zoo.VIDEO


# --- which text belongs to which image ---------------------------------------------------------


def texts(rows, modality, counts, mask=None):
    ids = torch.tensor(rows)
    prompt = Prompt(ids, mask, {IMAGE: IM, VIDEO: VI})
    return [found.tolist() for found in prompt.texts(modality, counts)]


def test_text_after_the_image_up_to_the_next():
    assert texts([[1, IM, IM, 2, 3, IM, 4]], IMAGE, [2, 1]) == [[2, 3], [4]]


def test_text_before_where_none_follows():
    assert texts([[1, 2, IM, IM]], IMAGE, [2]) == [[1, 2]]
    assert texts([[1, IM, 2, 3, IM]], IMAGE, [1, 1]) == [[2, 3], [2, 3]]


def test_no_text_at_all():
    assert texts([[IM, IM]], IMAGE, [2]) == [[]]


def test_adjacent_images_and_several_rows():
    assert texts([[IM, IM, IM, 5], [6, IM, 7, 8]], IMAGE, [1, 2, 1]) == [[], [5], [7, 8]]


def test_videos_end_the_text_of_an_image():
    row = [[1, IM, 2, VI, VI, 3]]
    assert texts(row, IMAGE, [1]) == [[2]]
    assert texts(row, VIDEO, [2]) == [[3]]


def test_pads_are_no_text():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert texts([[0, 4, IM, 5], [IM, 6, 7, 0]], IMAGE, [1, 1], mask) == [[5], [6, 7]]


@pytest.mark.parametrize("counts", [[3], [1], [2, 1], []])
def test_counts_that_do_not_fit_are_an_error(counts):
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="do not belong together"):
        texts([[1, IM, IM, 2]], IMAGE, counts)


# --- signals of a running model ----------------------------------------------------------------


class Recorder(BeforeLLM):
    """Keeps the first tokens and remembers what it saw."""

    name = "recorder"
    wants = (TextEmbeddings(),)
    scopes = ("image",)

    def needs(self, shape):
        return self.wants

    def select(self, tokens, keep):
        self.seen.append(tokens.signals)
        return Selection(kept=torch.arange(keep))


def recorder(*wants) -> vlmprune.prune.budget.MethodCall:
    from vlmprune.prune.budget import Budget, MethodCall

    method = Recorder()
    object.__setattr__(method, "wants", wants)
    object.__setattr__(method, "seen", [])
    return MethodCall(method, Budget("keep_ratio", 0.5))


@zoo.each("run", ["forward", "generate", "beams"])
def test_text_embeddings_are_those_of_the_text_of_each_image(case, run):
    model, call = case.model(), recorder(TextEmbeddings())
    rows = ((3, "A", 2, "B", 5), (4, "C"), (9,))
    inputs = case.inputs(rows)
    vlmprune.patch(model, call)
    if run == "forward":
        model(**inputs)
    else:
        beams = 2 if run == "beams" else 1
        model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=beams)
    embed = case.reference().get_input_embeddings()
    before, behind = case.layout.around("B")[0], case.layout.around("A")[1]  # marks are text
    expected = []
    for row in (0, 1):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        visual = zoo.is_visual(ids)
        places = visual.nonzero()[:, 0].split(case.counts([rows[row]]))
        starts, ends = [int(at[0]) for at in places], [int(at[-1]) + 1 for at in places]
        for number, end in enumerate(ends):
            stop = starts[number + 1] if number + 1 < len(starts) else len(ids)
            text = ids[end:stop] if stop > end else ids[: starts[number]]
            expected.append(embed(text))
    found = [signals[TextEmbeddings()] for signals in call.method.seen]
    assert [len(x) for x in found][:2] == [behind + 2 + before, behind + 5]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_text_is_unknown_where_images_are_encoded_on_their_own():
    case = zoo.CASES["llava-clip-llama"]
    model = case.model()
    vlmprune.patch(model, recorder(TextEmbeddings()))
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="together with input_ids"):
        model.base_model.get_image_features(case.inputs()["pixel_values"])


# --- CLIP's joint space ------------------------------------------------------------------------

CLIP_CASES = pytest.mark.parametrize(
    "case",
    [case for case in zoo.CASES.values() if case.shape.tower.text_twin],
    ids=lambda case: case.name,
)


@CLIP_CASES
def test_image_and_text_reach_the_joint_space(case):
    model, call = case.model(), recorder(ClipImage(), ClipText(), EncoderFeatures())
    vlmprune.patch(model, call, clip=clip())
    inputs = case.inputs(((3, "A", 2, "B", 5), (7, "C", 30)))
    model(**inputs)
    twin = clip()._clip
    assert [len(seen[ClipText()]) for seen in call.method.seen] == [1, 1, 3]
    with torch.no_grad():
        for seen in call.method.seen:
            hidden = seen[EncoderFeatures()]
            image = twin.visual_projection(twin.vision_model.post_layernorm(hidden))
            torch.testing.assert_close(seen[ClipImage()], image, atol=1e-5, rtol=1e-4)
            assert len(image) == seen[ClipImage()].shape[0]
        ids = inputs["input_ids"][0][-5:]
        tokens = torch.tensor([[WORDS.index(f"w{i}") for i in ids.tolist()] + [0] * 7])
        expected = twin.text_projection(twin.text_model(input_ids=tokens).pooler_output)
    torch.testing.assert_close(call.method.seen[1][ClipText()], expected)


def test_the_template_behind_the_question_is_cut_off():
    template = "{% for m in messages %}w5 {{ m['content'][0]['text'] }}{% endfor %} w6 w7"
    processor = words()
    processor.chat_template = template
    try:
        reader = vlmprune.ClipText(clip()._clip, clip_words(), processor)
        assert reader.question(torch.tensor([10, 11, 6, 7])) == "w10 w11"
        assert reader.question(torch.tensor([10, 11])) == "w10 w11"
    finally:
        processor.chat_template = None


def test_clip_is_loaded_from_a_folder(tmp_path):
    clip()._clip.save_pretrained(tmp_path)
    clip_words().save_pretrained(tmp_path)
    loaded = vlmprune.ClipText.from_pretrained(tmp_path, words())
    ids = torch.tensor([10, 11, 12])
    torch.testing.assert_close(loaded.text(ids), clip().text(ids))


def test_a_method_that_needs_clip_says_how_to_give_it():
    case = zoo.CASES["llava-clip-llama"]
    with pytest.raises(vlmprune.MissingSignalError, match=r"clip=vlmprune\.ClipText"):
        vlmprune.patch(case.model(), recorder(ClipText()))
    with pytest.raises(vlmprune.UnsupportedModelError, match="width 32"):
        vlmprune.patch(case.model(), recorder(ClipText()), clip=clip(width=32))
    with pytest.raises(vlmprune.MissingSignalError, match="was not trained with"):
        model = zoo.CASES["llava-siglip-qwen2"].model()
        vlmprune.patch(model, recorder(ClipText()), clip=clip())
    with pytest.raises(vlmprune.UnsupportedModelError, match="CLIPModel"):
        vlmprune.ClipText(case.model(), clip_words(), words())
