"""What is refused before vLLM is there, and how many tokens a served image keeps."""

from __future__ import annotations

import json

import pytest
import torch
import vlmprune
from kit import tiny_internvl, tiny_llava, tiny_tiled
from vlmprune.adapters.family import IMAGE
from vlmprune.adapters.serving.engine import check_engine
from vlmprune.adapters.serving.on_paper import on_paper
from vlmprune.adapters.serving.served import Served, requested
from vlmprune.adapters.serving.sizes import served_of
from vlmprune.adapters.serving.travelling import Span, digits, offsets, shortened
from vlmprune.adapters.serving.versions import check_version
from vlmprune.eval import cli
from vlmprune.eval.models.families.gemma3 import tiny_gemma3
from vlmprune.eval.models.families.llava import CLIP, SIGLIP
from vlmprune.prune.contract import EncoderFeatures, Features
from vlmprune.prune.tiling import Tiling

GRID = Tiling.single(6, 6)


def served(method, shape=CLIP, **words):
    return Served.of({"method": method, **words}, shape, GRID, True)


@pytest.mark.parametrize(
    ("budget", "keep"),
    [({"keep_ratio": 0.25}, 9), ({"keep_tokens": 40}, 36), ({"keep_ratio": 1}, 36)],
)
def test_counts_come_from_sizes(budget, keep):
    assert served("divprune", **budget).keep(GRID) == keep


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        ("fastv", vlmprune.UnsupportedFeatureError, "paged KV cache"),
        ("visual_press", vlmprune.UnsupportedFeatureError, "paged KV cache"),
        ("tome", vlmprune.UnsupportedFeatureError, "attention of their own"),
        ("expedit", vlmprune.UnsupportedFeatureError, "attention of their own"),
        ("catp", vlmprune.UnsupportedFeatureError, "vLLM"),
        ("cdpruner", vlmprune.UnsupportedFeatureError, "give relevance='prompt'"),
        ("random", vlmprune.UnsupportedFeatureError, "not shown inside vLLM"),
        ("nobody", vlmprune.UnknownMethodError, "nobody"),
    ],
)
def test_methods_that_cannot_be_served_are_refused(method, error, says):
    with pytest.raises(error, match=says):
        served(method, keep_ratio=0.5)


def test_a_count_that_the_method_finds_is_refused():
    with pytest.raises(vlmprune.BudgetError, match="before any image is encoded"):
        served("prumerge")


def test_cls_is_refused_where_there_is_none():
    with pytest.raises(vlmprune.MissingSignalError, match="received"):
        served("cls_topk", SIGLIP, keep_ratio=0.5)


def test_a_request_may_change_the_budget_alone():
    options = {"method": "divprune", "keep_ratio": 0.25}
    assert requested(options, None) == options
    assert requested(options, {"keep_tokens": 7}) == {"method": "divprune", "keep_tokens": 7}
    for wrong in ({"method": "grid"}, {}, 3):
        with pytest.raises(vlmprune.MethodFieldError, match="budget alone"):
            requested(options, wrong)
    with pytest.raises(vlmprune.BudgetError):
        requested(options, {"keep_ratio": 2})


class Settings:
    def __init__(self, **words):
        self.__dict__.update(words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"speculative": object()}, "--speculative-config"),
        ({"graphs": True}, "cudagraph_mm_encoder"),
        ({"compiled": True}, "compile_mm_encoder"),
        ({"tensor": 2}, "--tensor-parallel-size"),
        ({"pipeline": 2}, "--pipeline-parallel-size"),
        ({"video": True}, "--video-pruning-rate"),
        ({"tower": True}, "--enable-tower-connector-lora"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused(words, says):
    check_engine(settings(), served("vtc_cls", keep_ratio=0.5), travels=True)
    with pytest.raises(vlmprune.UnsupportedFeatureError, match=says):
        check_engine(settings(**words), served("vtc_cls", keep_ratio=0.5), travels=True)


def test_a_method_may_read_rows_of_the_encoder_where_each_process_has_all():
    call = Settings(name="reading")
    reading = Settings(call=call, needs=(Features(), EncoderFeatures()), asks=False)
    check_engine(settings(tensor=2), reading)
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="--mm-encoder-tp-mode data"):
        check_engine(settings(tensor=2, mode="data"), reading)


def test_a_question_is_embedded_without_adapters_and_may_be_shared_out():
    asking = served("cdpruner", relevance="prompt", keep_ratio=0.5)
    assert asking.asks and not served("divprune", keep_ratio=0.5).asks
    check_engine(settings(compiled=True, tensor=2, mode="data"), asking)
    adapted = settings()
    adapted.lora_config = Settings(enable_tower_connector_lora=False)
    check_engine(adapted, served("divprune", keep_ratio=0.5))
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="--enable-lora"):
        check_engine(adapted, asking)


def settings(
    speculative=None,
    graphs=False,
    compiled=False,
    tensor=1,
    pipeline=1,
    video=False,
    tower=False,
    mode="weights",
) -> Settings:
    return Settings(
        lora_config=Settings(enable_tower_connector_lora=True) if tower else None,
        speculative_config=speculative,
        compilation_config=Settings(cudagraph_mm_encoder=graphs, compile_mm_encoder=compiled),
        parallel_config=Settings(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline),
        model_config=Settings(
            multimodal_config=Settings(
                is_multimodal_pruning_enabled=lambda: video, mm_encoder_tp_mode=mode
            )
        ),
    )


def test_positions_travel_as_digits_and_text_keeps_its_own():
    """Two images of 4 and 3 tokens, of which 2 and 3 are kept, in a prompt of 12."""
    whole = torch.arange(12).expand(3, -1).clone()
    whole[1:, 2:6] = torch.tensor([[2, 2, 3, 3], [2, 3, 2, 3]])
    short, further = shortened(whole, [Span(2, 4, 2), Span(8, 3, 3)])
    assert short[0].tolist() == [0, 1, 2, 2, 6, 7, 8, 8, 8, 11]
    assert short[2].tolist() == short[0].tolist()
    assert further == 12 - 10
    far = torch.tensor([[0, 300, 65535], [255, 256, 257], [1, 2, 3]])
    assert offsets(digits(far, torch.bfloat16)).equal(far)


@pytest.mark.parametrize("name", ["next", "onevision"])
def test_tiles_are_counted_from_sizes_as_the_processor_counts_them(name):
    config = getattr(tiny_tiled, f"{name}_config")()
    processor = getattr(tiny_tiled, f"{name}_processor")()
    family = on_paper(config)
    assert family is on_paper(getattr(tiny_tiled, f"{name}_config")())
    for width, height in ((100, 100), (190, 90), (100, 150), (30, 200)):
        given = processor(
            text="<image>", images=tiny_llava.picture(0, width, height), return_tensors="pt"
        )
        (tiling,) = family.tilings(family.call(IMAGE, {"image_sizes": given["image_sizes"]}), ())
        assert tiling.num_tokens == int((given["input_ids"] == config.image_token_id).sum())
    options = {"method": "divprune", "keep_tokens": 10}
    assert served_of(config, options).shape == family.shape
    config.vision_feature_layer = [-2, -1]
    with pytest.raises(vlmprune.UnsupportedModelError, match="use one layer"):
        served_of(config, options)


def test_a_tile_of_internvl_is_counted_from_sizes():
    config = tiny_internvl.config()
    found = served_of(config, {"method": "divprune", "keep_ratio": 0.25})
    assert found.usual.num_tokens == 9 and found.keep(found.usual) == 2
    config.vision_feature_layer = -2
    with pytest.raises(vlmprune.UnsupportedModelError, match="reads the last layer"):
        served_of(config, {"method": "divprune", "keep_ratio": 0.25})


@pytest.mark.parametrize("version", ["0.30.2", "0.33.0", "1.0.0"])
def test_other_versions_of_vllm_are_refused(version):
    with pytest.raises(vlmprune.VlmpruneError, match=r"pip install 'vllm>=0\.31,<0\.33'"):
        check_version(version)
    check_version("0.31.0")
    with pytest.raises(vlmprune.VlmpruneError, match=r"pip install 'vllm>=0\.32,<0\.33'"):
        check_version("0.31.0", since=(0, 32))
    check_version("0.32.1+cpu")


def test_the_way_in_reads_the_configuration_alone(tmp_path):
    tiny_llava.config().save_pretrained(tmp_path)
    args = vlmprune.vllm_args(str(tmp_path), "divprune", keep_ratio=0.25)
    assert args == {
        "hf_overrides": {
            "architectures": ["VlmPruneLlavaForConditionalGeneration"],
            "vlmprune": {"method": "divprune", "keep_ratio": 0.25},
        }
    }
    with pytest.raises(vlmprune.UnsupportedFeatureError):
        vlmprune.vllm_args(str(tmp_path), "fastv", keep_ratio=0.25)
    tiny_gemma3().save_pretrained(tmp_path)
    with pytest.raises(vlmprune.UnsupportedModelError, match="see each other both ways"):
        vlmprune.vllm_args(str(tmp_path), "divprune", keep_ratio=0.25)
    tiny_llava.config().text_config.save_pretrained(tmp_path)
    with pytest.raises(vlmprune.UnsupportedModelError, match="not served"):
        vlmprune.vllm_args(str(tmp_path), "divprune", keep_ratio=0.25)


def test_the_command_prints_it_for_a_server(tmp_path, capsys):
    tiny_llava.config().save_pretrained(tmp_path)
    argv = ["vllm-args", str(tmp_path), "--method", "cls_topk", "--method_args", "scores=received"]
    assert cli.main([*argv, "--keep_tokens", "9"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = vlmprune.vllm_args(str(tmp_path), "cls_topk", scores="received", keep_tokens=9)
    assert found == expected["hf_overrides"]
    word = [*argv[:2], "--method", "cls_topk:scores=received", "--keep_tokens", "9"]
    assert cli.main(word) == 0 and json.loads(capsys.readouterr().out) == found
    assert cli.main([*argv[:2], "--method", "fastv", "--keep_tokens", "9"]) == 2
    assert "fastv" in capsys.readouterr().err
