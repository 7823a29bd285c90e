"""Models inside of something: PEFT's, those of several processes, compiled ones, pipelines.

A wrapper's calls run pruned, or the wrapper is refused with what to pass instead.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import vlmprune
from kit import skips, zoo
from kit.snapshots import differences, snapshot
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import ImageTextToTextPipeline
from vlmprune.adapters.wrappers import unwrapped

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's
    pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning"),
]
CLIP = zoo.CASES["llava-clip-llama"]
ROWS: tuple[zoo.Row, ...] = ((3, "A", 2, "B", 5), (7, "C", 3))
INPUTS = CLIP.inputs(ROWS)
METHODS = pytest.mark.parametrize("name", ["divprune", "pool", "transprune", "corematching"])
"""By place and by what they read: features, merged rows, keys made ahead, an MLP's neurons."""
LORA = LoraConfig(
    r=2,
    lora_alpha=4,
    init_lora_weights=False,
    target_modules=r".*language_model.*\.(q_proj|k_proj|down_proj)",
)


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LORA)


def sharded_by_wrapping(model: nn.Module) -> nn.Module:
    layers = ModuleWrapPolicy({type(model.base_model.language_model.layers[0])})
    model.requires_grad_(True)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=layers, device_id=torch.device("cpu"), use_orig_params=True
    )


def sharded_in_place(model: nn.Module) -> nn.Module:
    for layer in model.base_model.language_model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {
    "lora": with_lora,
    "lora's tuner": lambda model: with_lora(model).base_model,
    "data parallel": nn.DataParallel,
    "processes": lambda model: DistributedDataParallel(model.requires_grad_(True)),
    "lora in processes": lambda model: DistributedDataParallel(with_lora(model)),
    "sharded by wrapping": sharded_by_wrapping,
    "sharded in place": sharded_in_place,
}
WRAPPED = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


@WRAPPED
@METHODS
def test_calls_of_a_wrapper_are_pruned(wrap, name):
    model = wrap(CLIP.model())
    dense = logits(model)
    handle = vlmprune.patch(model, name, keep_ratio=0.4)
    pruned = logits(model)
    assert handle.last.tokens_kept == [14, 14, 14]
    patched_first = CLIP.model()
    vlmprune.patch(patched_first, name, keep_ratio=0.4)
    assert torch.equal(logits(wrap(patched_first)), pruned)
    vlmprune.unpatch(model)
    assert not handle.active
    assert torch.equal(logits(model), dense)


def only_hooks(model: nn.Module) -> list[tuple[int, int]]:
    """Without attributes, which FSDP adds to."""
    return [counts[:2] for counts in zoo.hooks(model)]


class Failure(Exception):
    """Of something inside a call."""


@WRAPPED
def test_a_failure_inside_a_wrapper_s_call_leaves_nothing(wrap):
    model = wrap(CLIP.model())
    handle = vlmprune.patch(model, "transprune", keep_ratio=0.4)
    expected = logits(model)
    hooks = only_hooks(model)

    def fail(module, args):
        raise Failure

    hook = unwrapped(model).base_model.language_model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(Failure), torch.no_grad():
        model(**INPUTS)
    hook.remove()
    assert only_hooks(model) == hooks
    assert torch.equal(logits(model), expected)
    handle.remove()


def test_a_pipeline():
    pipeline = ImageTextToTextPipeline.__new__(ImageTextToTextPipeline)
    pipeline.model = CLIP.model()
    handle = vlmprune.patch(pipeline, "divprune", keep_ratio=0.4)
    logits(pipeline.model)
    assert handle.last.tokens_kept == [14, 14, 14]
    vlmprune.unpatch(pipeline)
    assert not handle.active


def test_compiled_code_is_refused_with_what_to_pass():
    model = torch.compile(CLIP.model(), backend="eager")
    with pytest.raises(vlmprune.UnsupportedModelError) as refused:
        vlmprune.patch(nn.DataParallel(model), "divprune", keep_ratio=0.4)
    said = "vlmprune.patch(model.module._orig_mod, ...) and torch.compile(model.module._orig_mod)"
    assert "model.module is compiled" in str(refused.value) and said in str(refused.value)


def test_a_patch_is_taken_off_through_compiled_code():
    model = CLIP.model()
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.4)
    vlmprune.unpatch(torch.compile(model, backend="eager"))
    assert not handle.active


def test_replicas_on_several_devices_are_refused():
    model = nn.DataParallel(CLIP.model())
    model.device_ids = [0, 1]  # as with two GPUs
    with pytest.raises(vlmprune.UnsupportedModelError, match=r"patch\(model\.module, \.\.\.\)"):
        vlmprune.patch(model, "divprune", keep_ratio=0.4)


class Trainer(nn.Module):
    """Holds a model, and is none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.policy = nn.ModuleDict({"actor": model})


def test_a_module_that_holds_a_model_is_told_where():
    with pytest.raises(vlmprune.UnsupportedModelError, match=r"pass model\.policy\.actor\."):
        vlmprune.patch(Trainer(CLIP.model()), "divprune", keep_ratio=0.4)


# --- LoRA ---------------------------------------------------------------------------------------


def trained(model: nn.Module, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of some steps, and the adapter's weights after them."""
    weights = [p for p in model.parameters() if p.requires_grad]
    # Steps so small that the same tokens stay chosen: losses of others cannot be compared.
    optimizer, losses = torch.optim.SGD(weights, lr=1e-4), []
    labels = INPUTS["input_ids"].where(INPUTS["attention_mask"].bool(), -100)
    for _ in range(steps):
        loss = model(**INPUTS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in weights)
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@METHODS
def test_an_adapter_before_and_after_the_patch_learn_the_same(name):
    found = []
    for patch_first in (True, False):
        model = CLIP.model()
        if patch_first:
            handle = vlmprune.patch(model, name, keep_ratio=0.4)
            tuned = with_lora(model)
        else:
            tuned = with_lora(model)
            handle = vlmprune.patch(tuned, name, keep_ratio=0.4)
        losses, weights = trained(tuned)
        assert losses[-1] < losses[0]
        assert handle.last.tokens_kept == [14, 14, 14]
        found.append((losses, weights))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])


@METHODS
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch-lora", "lora-patch"])
def test_an_adapter_is_merged_into_a_patched_model(name, patch_first):
    model = CLIP.model()
    wrapped = with_lora(model) if not patch_first else model
    handle = vlmprune.patch(wrapped, name, keep_ratio=0.4)
    tuned = with_lora(model) if patch_first else wrapped
    adapted = logits(tuned)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, atol=1e-3, rtol=1e-3)
    assert handle.last.tokens_kept == [14, 14, 14]
    plain = with_lora(CLIP.model()).merge_and_unload()
    dense = logits(plain)
    vlmprune.patch(plain, name, keep_ratio=0.4)
    assert torch.equal(logits(merged), logits(plain))
    handle.remove()
    assert torch.equal(logits(merged), dense)


@METHODS
def test_nothing_is_left_of_a_patch_inside_an_adapter(name):
    model = CLIP.model()
    logits(model)
    tuned = with_lora(model)
    logits(tuned)
    before = snapshot(unwrapped(tuned))
    vlmprune.patch(tuned, name, keep_ratio=0.4)
    logits(tuned)
    vlmprune.unpatch(tuned)
    assert differences(before, snapshot(unwrapped(tuned))) == []


@skips.needs("adapters")
def test_an_adapter_of_transformers_own():
    model = CLIP.model()
    handle = vlmprune.patch(model, "transprune", keep_ratio=0.4)
    torch.manual_seed(0)
    model.add_adapter(LORA)
    expected = with_lora(CLIP.model())
    vlmprune.patch(expected, "transprune", keep_ratio=0.4)
    assert torch.equal(logits(model), logits(expected))
    assert handle.last.tokens_kept == [14, 14, 14]
