"""What is asked of `vlmprune classify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ClassifyRequest:
    """A grid of methods x budgets on one classifier and one folder of pictures.

    Attributes:
        model: `embedded`, a name of timm, a folder of timm's or transformers', or a name on the
            Hub.
        data: `embedded`, or a folder with a folder of pictures for each class.
        methods, budgets: words as on the command line.
        limit: so many pictures, spread evenly over the classes; None: all.
        seed: of torch and of every method that has one.
        device: None: CUDA where there is one.
        dtype: of weights and pictures: `float32`, `bfloat16` or `float16`.
        output_path: the folder of the results.
        log_samples: whether the answer to every picture is kept as well.
        rerun: measure again what the folder of results has.
        imports: files and modules of methods of one's own, as typed.
    """

    model: str
    data: str
    methods: Sequence[str]
    budgets: Sequence[str]
    limit: int | None = None
    batch_size: int = 32
    seed: int = 0
    device: str | None = None
    dtype: str = "float32"
    output_path: Path
    log_samples: bool = False
    rerun: bool = False
    imports: Sequence[str] = ()

    @property
    def positions(self) -> None:
        """Of an LLM, which is not there."""
        return None

    @property
    def samples(self) -> Path | None:
        """The folder of all answers."""
        return self.output_path / "samples" if self.log_samples else None
