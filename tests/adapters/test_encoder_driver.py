"""The driver of a vision encoder needs no LLM: it reads the attention of a plain CLIP encoder."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from vlmprune.adapters.places.encoder import EncoderDriver
from vlmprune.adapters.tap import Names
from vlmprune.prune.contract import ClsAttention, ReceivedAttention


@pytest.fixture(params=["sdpa", "eager"])
def encoder(request):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
        attn_implementation=request.param,
    )
    return CLIPVisionModel(config).eval()


def layers_of(encoder):
    return getattr(encoder, "vision_model", encoder).encoder.layers


def test_a_plain_encoder_is_read_and_left_as_it_was(encoder):
    layers = layers_of(encoder)
    pixels = torch.randn(2, 3, 12, 12)
    attention = encoder.config._attn_implementation
    with torch.no_grad():
        expected = encoder(pixels).last_hidden_state
        encoder.set_attn_implementation("eager")
        maps = encoder(pixels, output_attentions=True).attentions
    encoder.set_attn_implementation(attention)
    before = [dict(module.__dict__) for module in encoder.modules()]
    names = Names(encoder)
    driver = EncoderDriver([layer.self_attn for layer in layers], [], names)
    undos = [driver.install(), driver.tap(1)]
    tapped = {1: [ClsAttention(1), ReceivedAttention(1)]}
    with torch.no_grad(), driver.read(tapped, frozenset()) as recording:
        assert driver.reading
        found = encoder(pixels).last_hidden_state
    for undo in undos:
        undo()
    names.release()
    assert torch.equal(found, expected)
    rows = maps[1].mean(1)
    torch.testing.assert_close(recording.values(ClsAttention(1)), rows[:, 0])
    torch.testing.assert_close(recording.values(ReceivedAttention(1)), rows.sum(1))
    for module, was in zip(encoder.modules(), before, strict=True):
        assert module.__dict__.keys() == was.keys()
        assert module.__dict__.get("config") is was.get("config")


def test_layers_that_nobody_reads_do_not_run(encoder):
    layers = layers_of(encoder)
    attention = [layer.self_attn for layer in layers]
    names = Names(encoder)
    driver = EncoderDriver(attention, layers[1:], names)
    undo = driver.install()
    assert driver.unread({}, layers[1:]) == set(layers[1:])
    assert driver.unread({1: [ClsAttention(1)]}, layers[1:]) == {layers[2]}
    ran: list[int] = []
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    pixels = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        with driver.read({}, frozenset(layers[1:])):
            encoder(pixels)
        assert ran == [0]
        encoder(pixels)
        assert ran == [0, 0, 1, 2]
    undo()
    assert all("forward" not in layer.__dict__ for layer in layers)
