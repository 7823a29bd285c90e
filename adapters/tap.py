"""Reading a few attention rows beside fused attention.

An attention module is given a shallow copy of its configuration that names a *tap*: a function
registered with transformers that first shows query and key (after rotary embedding) to whoever
listens, then calls the implementation that the model uses. Outputs are bit-identical, the model
keeps its sdpa, flash or eager kernels, and no L x L map is stored.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Listener = Callable[..., None]
"""Called as `listener(query, key, attention_mask, scaling, **kwargs)`, (B, H, L, D_head) each;
`value` is among the keywords where transformers computes the attention."""

Exchange = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor, Tensor, Any]]
Around = Callable[..., tuple[Tensor, Tensor | None]]
"""Called as `around(attention, query, key, value, mask, **kwargs)` instead of
`attention(query, key, value, mask, **kwargs)`: an output (B, Q, H, D_head) and perhaps a map."""

_PREFIX = "vlmprune_"
_lock = threading.Lock()
_uses: Counter[str] = Counter()


class Names:
    """Names that the taps of one patch have with transformers: registered with the first tap, until
    `release()`. A thread that read a name may look it up when the tap is gone."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._releases: dict[str, Callable[[], object]] = {}

    def of(self, attention: str) -> str:
        """The name of taps before an implementation of attention."""
        # "flash" must stay inside the name: transformers recognises flash attention by substring.
        name = _PREFIX + str(attention).removeprefix(_PREFIX)
        if name not in self._releases:
            with _lock:
                _uses[name] += 1
                ALL_ATTENTION_FUNCTIONS.register(name, _tapped_attention)
            # A model that is thrown away while patched must not leave the name behind either.
            self._releases[name] = weakref.finalize(self._owner, _release, name)
        return name

    def release(self) -> None:
        while self._releases:
            self._releases.popitem()[1]()


class Tap:
    """One attention module that shows its queries and keys to `listeners` until `remove()`.

    `instead` may exchange what the attention computes with: (query, key, value, mask), or None;
    `around` may compute otherwise with that.
    """

    def __init__(
        self,
        module: Any,
        names: Names,
        listeners: list[Listener],
        instead: Exchange | None = None,
        around: Around | None = None,
    ) -> None:
        self._module = module
        self._config = module.config
        config = copy.copy(self._config)
        config._attn_implementation_internal = names.of(self._config._attn_implementation)
        config._vlmprune_tap = (self._config, listeners, instead, around)
        module.config = config

    def remove(self) -> None:
        self._module.config = self._config


def _release(name: str) -> None:
    with _lock:
        _uses[name] -= 1
        if not _uses[name]:
            del _uses[name]
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)


def _tapped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    # Another thread may have removed a tap that this call only passed by.
    none = (module.config, (), None, None)
    config, listeners, instead, around = getattr(module.config, "_vlmprune_tap", none)
    for listener in listeners:
        listener(query, key, attention_mask, value=value, **kwargs)
    width = value.shape[-1]
    if instead is not None:
        query, key, value, attention_mask = instead(query, key, value, attention_mask)
    attention = functools.partial(_untapped, module, config)
    if around is not None:
        attention = functools.partial(around, attention)
    output, weights = attention(query, key, value, attention_mask, **kwargs)
    if value.shape[-1] != width:  # a kernel was given more columns
        output = output[..., :width]
    return output, weights


def _untapped(
    module: Any,
    config: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As it would have been computed."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    if "flash" in config._attn_implementation:  # which loads its kernels by the module's own word
        module = _Untapped(module, config)
    return attention(module, query, key, value, attention_mask, **kwargs)


class _Untapped:
    """An attention module with the configuration that it had before its tap."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
