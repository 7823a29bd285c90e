"""What is timm's own: its maps, its pooling of features, blocks of other structure, wrappers; and
the same tower in both libraries."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import image_models, skips
from kit.image_models import OURS, TIMM
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)
from vlmprune.eval.embedded import load_model, objects, questions
from vlmprune.eval.embedded.classifying import load_classifying
from vlmprune.prune.contract import InEncoder
from vlmprune.prune.errors import UnsupportedFeatureError, UnsupportedModelError
from vlmprune.prune.registry import method_class, method_names

timm = pytest.importorskip("timm", reason=skips.why("timm"))

CASES = {tiny.name: tiny for tiny in (*OURS, *TIMM)}
INSIDE = [name for name in method_names() if issubclass(method_class(name), InEncoder)]


def as_timm(layers, weights: dict, norms: tuple[str, str], names: dict[str, str], **options):
    """A `VisionTransformer` with the weights of a tower of transformers.

    Args:
        layers: of the tower.
        weights: what is in front of the blocks and behind them, by timm's names.
        norms: names of the norms in a layer.
        names: that of the attention, and of its last projection.
    """
    found = dict(weights)
    for number, layer in enumerate(layers):
        attention = getattr(layer, names["attention"])
        parts = {
            "norm1": getattr(layer, norms[0]),
            "norm2": getattr(layer, norms[1]),
            "attn.proj": getattr(attention, names["out"]),
            "mlp.fc1": layer.mlp.fc1,
            "mlp.fc2": layer.mlp.fc2,
        }
        for word in ("weight", "bias"):
            mixed = [getattr(getattr(attention, f"{n}_proj"), word) for n in "qkv"]
            found[f"blocks.{number}.attn.qkv.{word}"] = torch.cat(mixed)
            for name, module in parts.items():
                found[f"blocks.{number}.{name}.{word}"] = getattr(module, word)
    vit = timm.models.VisionTransformer(global_pool="token", **options).eval()
    vit.load_state_dict(found)
    return vit


def norm(eps: float):
    return lambda width, **more: torch.nn.LayerNorm(width, eps=eps)


def embedded():
    """The trained CLIP tower that ships with the package, and the same in timm."""
    model, processor = load_model()
    tower = model.float().eval().model.vision_tower
    config, front = tower.config, tower.embeddings
    weights = {
        "cls_token": front.class_embedding.view(1, 1, -1),
        "pos_embed": front.position_embedding.weight[None],
        "patch_embed.proj.weight": front.patch_embedding.weight,
    }
    for name, module in (("norm_pre", tower.pre_layrnorm), ("norm", tower.post_layernorm)):
        weights |= {f"{name}.{word}": getattr(module, word) for word in ("weight", "bias")}
    vit = as_timm(
        tower.encoder.layers,
        weights,
        ("layer_norm1", "layer_norm2"),
        {"attention": "self_attn", "out": "out_proj"},
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        pre_norm=True,
        num_classes=0,
        norm_layer=norm(config.layer_norm_eps),
        act_layer=type(tower.encoder.layers[0].mlp.activation_fn),
    )
    pictures = [question.image for question in questions(4)]
    return tower, vit, processor.image_processor(pictures, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("name", INSIDE)
def test_the_shipped_tower_is_the_same_in_both_libraries(name):
    tower, vit, pixels = embedded()
    with torch.no_grad():
        with vlmprune.patch(tower, name, keep_ratio=0.25) as ours:
            expected = tower.post_layernorm(tower(pixels).last_hidden_state)
        with vlmprune.patch(vit, name, keep_ratio=0.25) as theirs:
            found = vit.forward_features(pixels)
    one, two = ours.last, theirs.last
    assert one.encoder == two.encoder and one.tokens_kept == two.tokens_kept
    for a, b in zip(one.kept, two.kept, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", INSIDE)
def test_the_shipped_classifier_names_the_same_in_both_libraries(name):
    """Its tower and its head in timm, on pictures of four classes."""
    (ours, processor, labels), (_, vit, _) = load_classifying(), embedded()
    vit.reset_classifier(len(labels))
    vit.head.load_state_dict(
        {"weight": ours.visual_projection.weight, "bias": torch.zeros(len(labels))}
    )
    pictures = [each.render() for each in objects.shown()[:4]]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad(), vlmprune.patch(ours, name, keep_ratio=0.25):
        expected = ours(pixels).image_embeds
    with torch.no_grad(), vlmprune.patch(vit, name, keep_ratio=0.25):
        found = vit(pixels)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("attention", image_models.ATTENTIONS)
@pytest.mark.parametrize("name", INSIDE)
def test_a_random_vit_is_the_same_in_both_libraries(name, attention):
    model, pixels = CASES["ViT classifier"].model(attention), image_models.pixels()
    tower, front = model.vit, model.vit.embeddings
    projection = front.patch_embeddings.projection
    weights = {
        "cls_token": front.cls_token,
        "pos_embed": front.position_embeddings,
        "patch_embed.proj.weight": projection.weight,
        "patch_embed.proj.bias": projection.bias,
        "norm.weight": tower.layernorm.weight,
        "norm.bias": tower.layernorm.bias,
        "head.weight": model.classifier.weight,
        "head.bias": model.classifier.bias,
    }
    vit = as_timm(
        tower.layers,
        weights,
        ("layernorm_before", "layernorm_after"),
        {"attention": "attention", "out": "o_proj"},
        img_size=image_models.SIDE,
        patch_size=image_models.PATCH,
        embed_dim=image_models.CHANNELS,
        depth=image_models.DEPTH,
        num_heads=image_models.HEADS,
        mlp_ratio=2,
        num_classes=7,
        norm_layer=norm(tower.config.layer_norm_eps),
    )
    for block in vit.blocks:
        block.attn.fused_attn = attention == "fused"
    with torch.no_grad():
        torch.testing.assert_close(vit(pixels), model(pixels).logits, atol=1e-5, rtol=1e-4)
        with vlmprune.patch(model, name, keep_ratio=0.25):
            expected = model(pixels).logits
        with vlmprune.patch(vit, name, keep_ratio=0.25):
            found = vit(pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_features_are_the_rows_that_are_left():
    model, pixels = CASES["timm mean"].model(), image_models.pixels()
    with torch.no_grad():
        whole = model(pixels)
        with vlmprune.patch(model, "tome", r=6) as handle:
            rows = model.forward_features(pixels)
            other = model.forward_features(image_models.pixels(2, 1))
            assert rows.shape == (2, 1 + 12, image_models.CHANNELS)
            assert torch.equal(model.forward_head(rows), model(pixels))
            assert not torch.equal(model.forward_head(other), model.forward_head(rows))
            with pytest.raises(UnsupportedFeatureError, match="as it is"):
                model.forward_head(rows.clone())
            assert model.pool(rows.clone(), pool_type="token").shape == (2, image_models.CHANNELS)
            with handle.disabled():
                assert torch.equal(model.forward_head(model.forward_features(pixels)), whole)


def test_maps_need_all_rows():
    model, pixels = CASES["timm vit"].model(), image_models.pixels()
    with torch.no_grad():
        dense, maps = model.forward_intermediates(pixels)
        with vlmprune.patch(model, "tome", keep_ratio=0.5) as handle:
            for call in (model.forward_intermediates, model.get_intermediate_layers):
                with pytest.raises(UnsupportedFeatureError, match="maps of all patches"):
                    call(pixels)
            with handle.disabled():
                assert torch.equal(model.forward_intermediates(pixels)[0], dense)
            with handle.budget(keep_ratio=1.0):
                assert torch.equal(model.forward_intermediates(pixels)[0], dense)
        with vlmprune.patch(model, "expedit", keep_tokens=9, layer=2):
            last, found = model.forward_intermediates(pixels, indices=[0, 1, 3])
            assert torch.equal(found[0], maps[0]) and torch.equal(found[1], maps[1])
            assert found[2].shape == maps[3].shape and not torch.equal(found[2], maps[3])
            assert torch.equal(last, model.forward_features(pixels))
            for asked in (None, 2, [2]):
                with pytest.raises(UnsupportedFeatureError, match="from block 2 on"):
                    model.forward_intermediates(pixels, indices=asked)


def make(name: str, **options):
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 24, "patch_size": 4}
    return timm.create_model(name, **{**sizes, "num_classes": 7, **options}).eval()


@pytest.mark.parametrize(
    "build, text",
    [
        (
            lambda: make(
                "vit_tiny_patch16_224",
                block_fn=timm.models.vision_transformer.ParallelThingsBlock,
            ),
            "its blocks are others",
        ),
        (
            lambda: make(
                "vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ResPostBlock
            ),
            "block 0 .ResPostBlock. does not add its MLP",
        ),
        (
            lambda: make(
                "vit_tiny_patch16_224",
                block_fn=timm.models.vision_transformer.ParallelScalingBlock,
            ),
            "its blocks are others",
        ),
        (
            lambda: make("eva02_tiny_patch14_224", use_post_norm=True, ref_feat_shape=(6, 6)),
            "block 0 .EvaBlockPostNorm. does not add",
        ),
        (
            lambda: make("vit_tiny_patch16_224", attn_layer="diff"),
            "attention of block 0 is of class DiffAttention",
        ),
        (lambda: make("vit_tiny_patch16_224", global_pool="prr"), "AttentionPoolPrr"),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1)),
            "SwinTransformer .* is not supported.*VisionTransformer",
        ),
    ],
    ids=["parallel", "post", "scaling", "eva post", "diff", "prr", "swin"],
)
def test_other_structures_are_refused(build, text):
    model = build()
    with pytest.raises(UnsupportedModelError, match=text):
        vlmprune.patch(model, "tome", r=4)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )


def test_what_a_call_may_not_bring():
    model, pixels = make("vit_tiny_patch16_224", patch_drop_rate=0.5), image_models.pixels()
    with vlmprune.patch(model, "tome", r=4), torch.no_grad():
        with pytest.raises(UnsupportedFeatureError, match="attn_mask="):
            model(pixels, attn_mask=torch.zeros(37, 37))
        with pytest.raises(UnsupportedFeatureError, match="by chance"):
            model.train()(pixels)


def test_pictures_of_another_size():
    model = make("vit_tiny_patch16_224", dynamic_img_size=True)
    with vlmprune.patch(model, "evit", keep_ratio=0.5) as handle, torch.no_grad():
        assert model.forward_features(torch.randn(2, 3, 16, 32)).shape[1] == 1 + 16
    assert handle.last.tokens_in == [32, 32]


@pytest.mark.parametrize("kind", [TimmWrapperModel, TimmWrapperForImageClassification])
def test_wrappers_of_transformers_are_patched_inside(kind):
    sizes = {"embed_dim": 48, "depth": 4, "num_heads": 4, "img_size": 24, "patch_size": 4}
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args={**sizes, "global_pool": "avg"}
    )
    config.num_labels = 7
    model, pixels = kind(config).eval(), image_models.pixels()
    with torch.no_grad():
        output = model(pixels)
        with vlmprune.patch(model, "tome", r=6) as handle:
            found = model(pixels)
            inner = model.timm_model(pixels)
        assert handle.last.tokens_kept == [12, 12]
        if kind is TimmWrapperModel:
            assert found.last_hidden_state.shape[1] == 1 + 12
            assert torch.equal(found.pooler_output, inner)
            assert torch.equal(model(pixels).last_hidden_state, output.last_hidden_state)
        else:
            assert torch.equal(found.logits, inner) and not torch.equal(inner, output.logits)
    vlmprune.patch(model, "tome", r=6)
    vlmprune.unpatch(model)
    assert "_vlmprune_handle" not in vars(model.timm_model)
