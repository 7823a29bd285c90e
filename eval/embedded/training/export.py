"""Writes a checkpoint as a model folder: float16 weights, tokenizer, processor, chat template."""

from pathlib import Path

import torch

from .. import MODEL_DIR
from ..processing import build_processor
from ..vocabulary import BOS, EOS, PAD, WORD_ID
from .language import Model

__all__ = ["MODEL_DIR", "export"]


def export(checkpoint: Path, folder: Path) -> None:
    """The LLaVA of a language checkpoint, without the training-only head."""
    model = Model()
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model.load_state_dict(state["modules"]["model"])
    model.llava.model.language_model.config._attn_implementation = "sdpa"
    llava = model.llava.eval().to(torch.float16)
    llava.generation_config.update(
        bos_token_id=WORD_ID[BOS],
        eos_token_id=WORD_ID[EOS],
        pad_token_id=WORD_ID[PAD],
        max_new_tokens=6,
        do_sample=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    llava.save_pretrained(folder)
    build_processor().save_pretrained(folder)
