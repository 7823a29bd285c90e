"""`vlmprune models`: a table of the model families, read from their registry."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from ...adapters.family import Family
from ...adapters.registry import family_class, family_notes, model_names
from ...adapters.sequence.masks import STATES, layer_kind
from ...prune.errors import PluginError
from ..arguments.models import ModelsRequest
from ..console import stdout
from ..method_facts import first_line
from ..models.registry import known_family
from ..table import Table


def run(request: ModelsRequest) -> int:
    """The command. Returns the exit code."""
    models_table().print(stdout())
    return 0


def models_table() -> Table:
    """Every family: what it is, and what of it can be pruned where."""
    rows: list[tuple[str, ...]] = []
    for name in model_names():
        try:
            found = family_class(name)
            rows.append((name, first_line(inspect.getmodule(found).__doc__), *_facts(found)))
        except PluginError as error:
            rows.append((name, str(error), *[""] * (len(_HEADERS) - 2)))
    return Table(
        headers=_HEADERS,
        rows=rows,
        numbers_from=len(_HEADERS),
        notes="\n".join(family_notes()) or None,
        wrapping=(1, len(_HEADERS) - 1),
    )


_HEADERS = (
    "Model type",
    "What",
    "Since transformers",
    "Prunes",
    "In the encoder",
    "On the cache",
    "Positions",
    "Refused",
)


def _facts(family: type[Family]) -> tuple[str, ...]:
    """All columns behind the first two."""
    known = known_family(family.name)
    config: Any = known.tiny[0].config() if known is not None else None
    return (
        family.since,
        ", ".join(f"{modality.name}s" for modality in family.modalities),
        "yes" if _opens_encoder(family, config) else "no",
        "yes" if not _kinds(config) - {"full_attention", *STATES} else "no",
        "original" if family.mrope else "original, repacked",
        " ".join(_refused(family, config)),
    )


def _opens_encoder(family: type[Family], config: Any) -> bool:
    """Whether rows can leave between the blocks of the vision encoder, of which the projector then
    reads one alone."""
    layers = getattr(config, "vision_feature_layer", None)
    several = isinstance(layers, list | tuple) and len(layers) > 1
    return family.encoder is not Family.encoder and not several


def _kinds(config: Any) -> set[str]:
    """Kinds of the decoder's layers, where something is known of them."""
    if config is None:
        return set()
    text = config.get_text_config()
    return {layer_kind(text, layer) for layer in range(text.num_hidden_layers)}


def _refused(family: type[Family], config: Any) -> Iterator[str]:
    """Variants of the family, and what its decoder does not show."""
    if family.check is not Family.check:
        yield first_line(family.check.__doc__)
    if _kinds(config) & set(STATES):
        yield "Methods that read attention of layers that have none."
    if config is not None and getattr(config.get_text_config(), "num_experts_per_tok", None):
        yield "Methods that read neurons of experts."
