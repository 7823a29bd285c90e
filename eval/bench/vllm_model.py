"""A model of random weights as a folder from which vLLM makes it: sizes, words, a processor.

There are no weights in it: with `--load-format dummy` vLLM draws its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedTokenizerFast

from ..models.registry import eval_family

_IMAGE, _UNKNOWN, _END = "<image>", "<unk>", "</s>"
_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + _IMAGE + " {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def write_model(config: Any, folder: Path) -> None:
    """Everything but weights.

    Raises:
        UnsupportedModelError: a family whose processor is not made here.
    """
    family = eval_family(config.model_type, "No processor can be made")
    words = _words(config.get_text_config().vocab_size, config.image_token_id)
    processor = family.processor(config, words)
    processor.chat_template = _CHAT
    processor.save_pretrained(folder)
    config.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__]
    config.save_pretrained(folder)


def _words(count: int, image: int) -> PreTrainedTokenizerFast:
    """A word for each number; any other word is unknown, and one token as well."""
    words = {0: _UNKNOWN, 1: _END, image: _IMAGE}
    numbers = {words.get(number, f"w{number}"): number for number in range(count)}
    tokens = Tokenizer(models.WordLevel(numbers, unk_token=_UNKNOWN))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        unk_token=_UNKNOWN,
        eos_token=_END,
        pad_token=_END,
        extra_special_tokens={"image_token": _IMAGE},
        chat_template=_CHAT,
    )
