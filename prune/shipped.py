"""The methods of this package, and how often what they choose has changed.

A method stands in `VERSIONS` once golden data or a worked reference holds its choices; a change of
these raises its number, so that results of before are not taken for results of now. Whoever is not
in it (a new file, a copy, a method of another package) counts by its source, which may change any
day.
"""

import pkgutil
from functools import cache
from pathlib import Path

PACKAGE = f"{__package__}.methods"
"""Where they are, one file each."""

VERSIONS: dict[str, int] = {
    "catp": 1,
    "cdpruner": 1,
    "cls_topk": 1,
    "corematching": 1,
    "dart": 1,
    "divprune": 1,
    "elastic_cache": 1,
    "evit": 1,
    "expedit": 1,
    "fastv": 1,
    "fitprune": 1,
    "fopru": 1,
    "globalcom2": 1,
    "grid": 1,
    "grid_encoder": 1,
    "hiprune": 1,
    "hired": 1,
    "holov": 1,
    "ivc_prune": 1,
    "mctf": 1,
    "mustdrop": 1,
    "pact": 1,
    "pool": 1,
    "prumerge": 1,
    "prumerge_plus": 1,
    "pyramiddrop": 1,
    "random": 1,
    "random_decoder": 1,
    "random_encoder": 1,
    "scope": 1,
    "sparsevlm": 1,
    "sparsevlm_plus": 1,
    "spatten": 1,
    "spatten_llm": 1,
    "todre": 1,
    "token_select": 1,
    "tome": 1,
    "transprune": 1,
    "v2drop": 1,
    "visionzip": 1,
    "vispruner": 1,
    "visual_press": 1,
    "vscan": 1,
    "vtc_cls": 1,
    "vtw": 1,
    "zero_tprune": 1,
}

ELSEWHERE: dict[str, str] = {
    "downsample": "makes pictures smaller before the processor, so that no model is patched with "
    "it: compare it in `vlmprune sweep --methods downsample` or vlmprune.compare, or resize the "
    "pictures yourself."
}
"""Names of what is compared with methods and is none, and the end of a sentence that says so."""


@cache
def shipped() -> dict[str, str]:
    """Method name -> module of the methods in this package, found without importing them."""
    modules = pkgutil.walk_packages([str(Path(__file__).parent / "methods")], f"{PACKAGE}.")
    return {m.name.rpartition(".")[2]: m.name for m in modules if not m.ispkg}


def settled(module: str) -> str | None:
    """The method that a module of this package holds, where it has a version."""
    package, _, name = module.rpartition(".")
    return name if package.startswith(f"{PACKAGE}.") and name in VERSIONS else None
