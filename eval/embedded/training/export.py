"""Writes a checkpoint as a model folder: float16 weights, tokenizer, processor, chat template."""

from pathlib import Path

import torch

from ..processing import build_processor
from ..vocabulary import BOS, EOS, PAD, WORD_ID, WORDS_OF_PLACES
from .language import Model


def export(checkpoint: Path, folder: Path) -> None:
    """The LLaVA of a language checkpoint, without the training-only head."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["modules"]["model"]
    words = WORDS_OF_PLACES[: len(state["llava.lm_head.weight"])]
    model = Model(len(words))
    model.load_state_dict(state)
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
    build_processor(words).save_pretrained(folder)
