"""Training through a patched model: the gradients are the derivatives of the pruned loss.

Which tokens stay, and by which weights they are merged, counts as given: steps are so small that no
merge moves, and the weights that move are read by no weight of a merge.
"""

from __future__ import annotations

import functools

import pytest
import torch
import vlmprune
from kit import zoo
from torch import Tensor
from vlmprune.prune import choose
from vlmprune.prune.registry import method_class

ROWS: tuple[zoo.Row, ...] = ((3, "A", 2, "B", 5), (7, "C", 3))
STEP = 1e-4


def projector(model) -> torch.nn.Linear:
    """The last map from the encoder's width to the decoder's."""
    core = model.base_model
    if hasattr(core, "multi_modal_projector"):
        return core.multi_modal_projector.linear_2
    return core.visual.merger.mlp[2]


def in_double(case) -> tuple[torch.nn.Module, dict]:
    """A model whose last map of the projector is trained, and prompts for it."""
    model = case.model().double().train()
    projector(model).weight.requires_grad_(True)
    inputs = case.inputs(ROWS)
    return model, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def loss_of(model, inputs: dict) -> Tensor:
    """Of the logits of the last tokens, which read the image through every layer."""
    return model(**inputs).logits[:, -3:].square().mean()


@functools.cache
def downhill(case) -> Tensor:
    """The direction of the dense model's gradient, of length 1."""
    model, inputs = in_double(case)
    loss_of(model, inputs).backward()
    gradient = projector(model).weight.grad
    return gradient / gradient.norm()


@pytest.fixture
def same_choices(monkeypatch):
    """What a method once chose of so many tokens it chooses again; rows are merged anew."""
    select_all, made = choose.select_all, {}

    def chosen_before(method, images, keeps, **options):
        found = select_all(method, images, keeps, **options)
        if any(chosen.features is not None for chosen in found):
            return found
        sizes = tuple(tokens.num_tokens for tokens in images)
        return made.setdefault((images[0].layer, images[0].tile, sizes, tuple(keeps)), found)

    monkeypatch.setattr(choose, "select_all", chosen_before)


@zoo.BOTH_FAMILIES
@zoo.METHODS
def test_the_gradient_of_the_projector_is_the_derivative_of_the_loss(case, name, same_choices):
    model, inputs = in_double(case)
    if (handle := zoo.patch_or_refusal(model, case, name, keep_ratio=0.4)) is None:
        return
    loss_of(model, inputs).backward()
    chosen, (weight, towards) = handle.last.kept, (projector(model).weight, downhill(case))

    @torch.no_grad()
    def at(step: float) -> float:
        weight.add_(towards, alpha=step)
        value = loss_of(model, inputs).item()
        weight.sub_(towards, alpha=step)
        assert all(map(torch.equal, handle.last.kept, chosen)), "the step moved a choice"
        return value

    measured = (at(STEP) - at(-STEP)) / (2 * STEP)
    computed = (weight.grad * towards).sum().item()
    assert computed == pytest.approx(measured, rel=0.02)


def test_pooled_tokens_share_the_gradient_of_their_mean():
    """By hand: every token of a cell gets the cell's gradient over its size."""
    model = zoo.CASES["llava-clip-llama"].model()
    inputs = zoo.CASES["llava-clip-llama"].inputs()
    output = model.base_model.get_image_features(inputs["pixel_values"])
    dense = output.pooler_output[0].detach()
    given: dict[str, Tensor] = {}

    def leaf(module, args, projected):
        given["features"] = projected.detach().requires_grad_(True)
        return given["features"]

    model.base_model.multi_modal_projector.register_forward_hook(leaf)
    handle = vlmprune.patch(model, "pool", keep_tokens=7)
    model(**inputs)
    (groups,) = handle.last.groups
    (kept,) = handle.last.kept
    emitted = model.base_model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    weights = torch.arange(1.0, 8.0)[:, None].expand(-1, dense.shape[1])
    (emitted[kept] * weights).sum().backward()
    expected = torch.zeros_like(dense)
    for row, members in enumerate(groups):
        expected[members] = weights[row] / len(members)
    torch.testing.assert_close(given["features"].grad[0], expected)


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "prumerge_plus"])
def test_rows_merged_of_the_encoder_s_teach_the_encoder(name):
    """With a projector that is linear, what enters the LLM is linear in the encoder's rows X: its
    sum is that of X times its gradient, if no row's part is left out."""
    model = zoo.CASES["llava-clip-llama"].model()
    core = model.base_model
    core.multi_modal_projector.act = torch.nn.Identity()
    for linear in (core.multi_modal_projector.linear_1, core.multi_modal_projector.linear_2):
        linear.bias.zero_()
    read: dict[str, Tensor] = {}

    def leaf(module, args, output):
        states = list(output.hidden_states)
        layer = model.config.vision_feature_layer
        read["rows"] = states[layer] = states[layer].detach().requires_grad_(True)
        output.hidden_states = tuple(states)

    core.vision_tower.register_forward_hook(leaf)
    vlmprune.patch(model, name, keep_tokens=7)
    entered: list[Tensor] = []
    first = core.language_model.layers[0]
    first.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    inputs = zoo.CASES["llava-clip-llama"].inputs(((7, "C", 3),))
    model(**inputs)
    visual = entered[0][0, 7:14]
    visual.sum().backward()
    rows = read["rows"]
    assert (rows.grad * rows).sum().item() == pytest.approx(visual.sum().item(), rel=1e-3)


def test_without_gradients_a_method_is_asked_once(monkeypatch):
    case, asked = zoo.CASES["llava-clip-llama"], []
    select = method_class("pool").select
    monkeypatch.setattr(
        method_class("pool"), "select", lambda *args: asked.append(1) or select(*args)
    )
    model = case.model().requires_grad_(True)
    vlmprune.patch(model, "pool", keep_ratio=0.4)
    with torch.no_grad():
        model(**case.inputs())
    assert len(asked) == 1
    model.generate(**case.inputs(), max_new_tokens=2, do_sample=False)
    assert len(asked) == 2
