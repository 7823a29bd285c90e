"""The wrappers of lmms-eval that our model stands in for, and what tasks say to them by name.

Tasks may hold prompts and generation settings for single models, found by the name of the wrapper.
Ours must be those of the family's own wrapper, although our model is called otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from ..models.registry import known_family
from .manifest import NAME


def wrapper_of(model: Any) -> str:
    """The name of the wrapper that tasks know this model by; our own where there is none."""
    family = known_family(model.config.model_type)
    return NAME if family is None else family.wrapper


def address(requests: Sequence[Any], wrapper: str) -> None:
    """Make requests what their tasks would have made them for `wrapper`.

    The tasks were loaded under another model's name; each is found through its requests, whose
    second argument is a method of it.
    """
    renamed: dict[int, Any] = {}
    for request in {id(request): request for request in requests}.values():
        task: Any = getattr(request.arguments[1], "__self__", None)
        name = getattr(task, "model_name", wrapper)
        if name != wrapper and (_named(task.config, wrapper) or _named(task.config, name)):
            task.model_name = wrapper
            task._prepare_model_specific_config()
            renamed[id(task)] = task
        if id(task) in renamed:
            request.arguments = _arguments(request.arguments, task)


def _arguments(arguments: tuple[Any, ...], task: Any) -> tuple[Any, ...]:
    """Those of a request, for the model that the task now knows."""
    context, messages, generation, doc_id, name, split = arguments
    generation = {**generation, **(task.model_specific_generation_kwargs or {}), **_typed(task)}
    if not task.config.num_fewshot:  # the context is only logged; messages are made when asked for
        context = f"{task.config.description or ''}{task.doc_to_text(task.dataset[split][doc_id])}"
    return context, messages, generation, doc_id, name, split


def _named(config: Any, name: str) -> bool:
    return any(
        name in (mapping or {})
        for mapping in (
            config.lmms_eval_specific_kwargs,
            config.model_specific_target_kwargs,
            config.model_specific_generation_kwargs,
        )
    )


def _typed(task: Any) -> dict[str, Any]:
    """`--gen_kwargs` of the command line, which win over everything."""
    from lmms_eval.utils import simple_parse_args_string

    text = getattr(getattr(task, "args", None), "gen_kwargs", None)
    found = simple_parse_args_string(text) if isinstance(text, str) else {}
    return found if isinstance(found, dict) else {}


def takes_one_argument(function: Any) -> bool:
    """Whether an aggregation sees the results alone (with more, it writes files)."""
    try:
        return len(inspect.signature(function).parameters) == 1
    except (TypeError, ValueError):
        return False
