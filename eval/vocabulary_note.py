"""Words that a model does not know, where its tokenizer has whole words alone: the embedded one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_MOST_SHOWN = 10


def unknown_words(processor: Any, texts: Iterable[str]) -> list[str]:
    """Words and signs that the tokenizer turns into its unknown token, in their order; none where
    it spells what it does not know."""
    tokenizer = getattr(processor, "tokenizer", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if tokenizer is None or unknown is None:
        return []
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text))
    return [w for w in words if unknown in tokenizer(w, add_special_tokens=False)["input_ids"]]


def vocabulary_note(processor: Any, texts: Iterable[str]) -> str | None:
    """What to say about unknown words; None without any."""
    words = unknown_words(processor, texts)
    if not words:
        return None
    more = f" and {len(words) - _MOST_SHOWN} more" if len(words) > _MOST_SHOWN else ""
    size = len(processor.tokenizer) - len(set(processor.tokenizer.all_special_ids))
    return (
        f"the model does not know {', '.join(map(repr, words[:_MOST_SHOWN]))}{more}, and reads "
        f"{processor.tokenizer.unk_token} there: it knows {size} words (`vlmprune where words` "
        f"lists those of the embedded model)."
    )
