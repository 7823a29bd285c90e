"""The tiny LLaVA: its shapes and how its weights start."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ..scenes import GRID, PATCH, PATCHES, SIDE, compose, render
from ..vocabulary import BOS, EOS, IMAGE, PAD, WORD_ID, WORDS

VISION_WIDTH, VISION_LAYERS = 128, 6
TEXT_WIDTH, TEXT_LAYERS = 192, 6
FEATURE_LAYER = -2
LOCAL_LAYERS = 3  # ViT layers in which some heads start by looking at their own place


def build(words: int = len(WORDS)) -> LlavaForConditionalGeneration:
    """The model with the initialisation of transformers, for a vocabulary of so many words."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=3 * VISION_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_WIDTH // 32,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=VISION_WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=words,
        hidden_size=TEXT_WIDTH,
        intermediate_size=512,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_WIDTH // 32,
        num_key_value_heads=TEXT_WIDTH // 32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=WORD_ID[BOS],
        eos_token_id=WORD_ID[EOS],
        pad_token_id=WORD_ID[PAD],
        rms_norm_eps=1e-5,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORD_ID[IMAGE],
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=PATCHES,
    )
    return LlavaForConditionalGeneration(config)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [B, height, width, 3] -> float [B, 3, height, width] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def vision_body(tower: nn.Module) -> Any:
    """The module that holds embeddings and encoder, wherever transformers has it."""
    return getattr(tower, "vision_model", tower)


def features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """Hidden states [B, 1 + 196, width] at `FEATURE_LAYER`, without running the layers above."""
    body = vision_body(tower)
    hidden = body.pre_layrnorm(body.embeddings(pixels))
    for layer in body.encoder.layers[: VISION_LAYERS + 1 + FEATURE_LAYER]:
        hidden = layer(hidden, attention_mask=None)
        if isinstance(hidden, tuple):
            hidden = hidden[0]
    return hidden


def _rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


def _place_code() -> Tensor:
    """Sines and cosines of row and column, [196, width]."""
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    frequency = torch.logspace(0, -1.2, VISION_WIDTH // 4)
    parts = []
    for axis in (rows, columns):
        phase = axis.reshape(-1, 1) * frequency
        parts += [phase.sin(), phase.cos()]
    return torch.cat(parts, dim=1)


def _whitening(rng: np.random.Generator) -> Tensor:
    """A patch embedding whose outputs are white on training scenes, [width, 3 * 8 * 8]."""
    pixels = np.stack([render(compose(rng, dense=True)).pixels for _ in range(200)])
    images = normalize(torch.from_numpy(pixels))
    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * PATCH * PATCH)
    values, vectors = torch.linalg.eigh(torch.cov((patches - patches.mean(0)).T))
    leading = vectors.flip(1)[:, :VISION_WIDTH] / (values.flip(0)[:VISION_WIDTH] + 1e-2).sqrt()
    return _rotation(VISION_WIDTH) @ leading.T * 0.7


@torch.no_grad()
def init_vision(tower: nn.Module, rng: np.random.Generator) -> None:
    """Whitened patches, 2-D positions, and some heads that attend to their own neighbourhood."""
    body = vision_body(tower)
    embeddings = body.embeddings
    embeddings.patch_embedding.weight.copy_(_whitening(rng).view(-1, 3, PATCH, PATCH))
    place = _place_code() @ _rotation(VISION_WIDTH).T
    embeddings.position_embedding.weight[1:] = place * 0.7
    embeddings.position_embedding.weight[0].normal_(0, 0.5)
    embeddings.class_embedding.normal_(0, 0.5)
    basis = torch.linalg.svd(place - place.mean(0), full_matrices=False)[2][:32]
    for index, layer in enumerate(body.encoder.layers):
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.fc1):
            nn.init.xavier_uniform_(linear.weight, gain=0.8)
            nn.init.zeros_(linear.bias)
        for linear in (attention.out_proj, layer.mlp.fc2):
            nn.init.xavier_uniform_(linear.weight, gain=0.4)
            nn.init.zeros_(linear.bias)
        if index < LOCAL_LAYERS:
            size = VISION_WIDTH // attention.num_heads
            for head in range(attention.num_heads // 2 + 1):
                weight = _rotation(32)[:size] @ basis * 1.1
                rows = slice(head * size, (head + 1) * size)
                attention.q_proj.weight[rows] = weight
                attention.k_proj.weight[rows] = weight


@torch.no_grad()
def init_language(model: LlavaForConditionalGeneration, readout: Tensor) -> None:
    """Unit-gain layers, and a projector whose first rows are the vision stage's read-outs."""
    language, projector = model.model.language_model, model.model.multi_modal_projector
    for name, parameter in language.named_parameters():
        if parameter.ndim == 2 and "layers" in name:
            residual = "o_proj" in name or "down_proj" in name
            depth_scale = (2 * TEXT_LAYERS) ** -0.5 if residual else 1.0
            parameter.normal_(0, parameter.shape[1] ** -0.5 * depth_scale)
    language.embed_tokens.weight.normal_(0, 0.5)
    model.lm_head.weight.normal_(0, 0.03)
    nn.init.xavier_uniform_(projector.linear_1.weight)
    nn.init.xavier_uniform_(projector.linear_2.weight, gain=0.6)
    projector.linear_1.weight[: len(readout)] = readout
