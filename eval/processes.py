"""Several processes that share one evaluation, as torchrun and accelerate start them.

Every process loads the model and answers its share of the questions; the results are gathered, and
the first process alone writes. A process that fails takes the others with it, instead of leaving
them waiting.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from ..prune.errors import VlmpruneError

Value = TypeVar("Value")
Item = TypeVar("Item")


class ProcessError(VlmpruneError, RuntimeError):
    """Another process of the same run failed.

    Symptom: all processes of a `torchrun` stop, and name the one that failed.
    Cause: the error of that process, which the message holds.
    Type: the same command in one process, to see the whole error.
    Page: ERRORS.md#processerror
    """


@dataclass(frozen=True)
class Processes:
    """This process among `world` of them; by default the only one.

    A context manager, so that the processes part in order: `with Processes.started() as p: ...`.
    """

    rank: int = 0
    world: int = 1
    device: str | None = None
    """The accelerator that this process was given, or the CPU; None for the only process."""

    @classmethod
    def started(cls, *, cpu: bool = False) -> Processes:
        """Join the processes that torchrun or accelerate started; alone without them.

        Args:
            cpu: stay on the CPU where there are accelerators.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=cpu or not torch.accelerator.is_available())
        return cls(state.process_index, state.num_processes, str(state.device))

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.world > 1:
            from accelerate import PartialState

            state = PartialState()
            if kind is None:
                state.wait_for_everyone()
            state.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that this process works on, dealt in turn."""
        return items[self.rank :: self.world]

    def gather(self, run: Callable[[], Value]) -> list[Value]:
        """What `run` gave in every process, in order of rank, in all of them.

        Raises:
            Exception: what `run` raised, in this process or (if its class can travel) another.
            ProcessError: another process failed with something else.
        """
        if self.world == 1:
            return [run()]
        from accelerate.utils import gather_object

        error: BaseException | None = None
        own: list[tuple[bool, object]]
        try:
            own = [(True, run())]
        except Exception as raised:
            error = raised
            own = [(False, _portable(raised, self.rank))]
        found: list[tuple[bool, object]] = gather_object(own)
        if error is not None:
            raise error
        for good, value in found:
            if not good and isinstance(value, BaseException):
                raise value
        return [value for _, value in found]  # type: ignore[misc]

    def from_first(self, run: Callable[[], Value]) -> Value:
        """What `run` gives in the first process, in all of them."""
        if self.world == 1:
            return run()
        return self.gather(lambda: run() if self.first else None)[0]  # type: ignore[return-value]

    def dealt(self, shares: Sequence[Sequence[Item]]) -> list[Item]:
        """The items that `share` dealt, in their first order again."""
        total = sum(map(len, shares))
        return [shares[i % self.world][i // self.world] for i in range(total)]


def _portable(error: Exception, rank: int) -> Exception:
    """The error itself if it survives a pickle, as those of this package do."""
    import pickle

    try:
        return type(pickle.loads(pickle.dumps(error)))(*error.args)
    except Exception:
        return ProcessError(f"Process {rank} failed: {type(error).__name__}: {error}")
