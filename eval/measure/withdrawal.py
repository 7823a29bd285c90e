"""From which decoder layer on a model bears to lose its visual tokens: the search of VTW"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...adapters.patching import patch
from ...adapters.registry import family_of
from ...prune.methods.decoder.vtw import divergences, first_within, searched_layers


@torch.no_grad()
def withdrawal_layer(model: Any, samples: Iterable[Mapping[str, Any]], eta: float = 0.003) -> int:
    """The first layer at which to withdraw all visual tokens changes the next token's distribution
    by at most `eta` nats, as a mean over samples; for `vlmprune.patch(model, "vtw", layer=...)`.

    Published with 20 samples of the task, and with `eta` of 0.003 (LLaVA-1.5-7B), 0.0005 (13B) and
    0.0001 (LLaVA-1.6-7B). Each sample is run once uncut and once for every layer.

    Args:
        model: one that is not patched.
        samples: what the model's forward takes, one prompt with images each.

    Raises:
        MethodFieldError: no layer is that near to the uncut model; the nearest is named.
    """
    given = list(samples)
    layers = searched_layers(family_of(model).shape.decoder.num_layers)
    dense = torch.stack([_last(model, sample) for sample in given])
    withdrawn = []
    for layer in layers:
        with patch(model, "vtw", layer=layer):
            withdrawn.append(torch.stack([_last(model, sample) for sample in given]))
    return first_within(layers, divergences(dense, torch.stack(withdrawn, 1)), eta)


def _last(model: Any, sample: Mapping[str, Any]) -> Tensor:
    """Logits (V,) of the prompt's last token."""
    logits: Tensor = model(**sample).logits[0, -1]
    return logits.float()
