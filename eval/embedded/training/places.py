"""Stage C: the shipped decoder goes on with the seven kinds and learns `where`, one word more.

It starts from the shipped weights alone, in float32. The vision stage's read-outs and the head that
says which token is an object's first are not among them, so that teaching aid is left out; where to
look is taught again while `where` is learned.
"""

from pathlib import Path

import torch

from .. import load_model
from ..asking import PACK_WITH_PLACES
from ..vocabulary import WORD_ID, WORDS_OF_PLACES
from .language import Course, Model

SEED, STEPS = 6, 600


@torch.no_grad()
def start(_: Path) -> Model:
    """The shipped model with a row more in the embedding and in the head.

    The new word is drawn as far from the others as they are from each other; the head's row is that
    of `what`, another word that is never said.
    """
    torch.manual_seed(SEED)
    shipped = load_model()[0]
    words, head = shipped.get_input_embeddings().weight, shipped.get_output_embeddings().weight
    drawn = words.mean(0) + words.std(0) * torch.randn(words.shape[1])
    state = shipped.state_dict()
    rows = {"embed_tokens.weight": (words, drawn), "lm_head.weight": (head, head[WORD_ID["what"]])}
    for name in state:
        for end, (matrix, row) in rows.items():
            if name.endswith(end):
                state[name] = torch.cat([matrix, row[None]])
    model = Model(len(WORDS_OF_PLACES))
    model.llava.load_state_dict(state)
    return model


COURSE = Course(
    start=start,
    seed=SEED,
    kinds=PACK_WITH_PLACES,
    rate=4e-4,
    decay=0.7,
    first_weight=0.0,
    look_until=STEPS // 2,
)
