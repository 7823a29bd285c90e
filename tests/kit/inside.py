"""Rows of pictures inside a vision encoder: drawn, given, reduced, and what always holds then."""

import torch
from torch import Tensor
from vlmprune.adapters.signals.draw import Sizes
from vlmprune.adapters.signals.table import SOURCES
from vlmprune.prune.contract import BlockCut, EncoderRows, InEncoder, Reduction, Tower
from vlmprune.prune.reductions import reduce

TOWERS = {
    "clip": Tower(num_layers=24, has_cls=True, prefix=1, blocks_read=23),
    "deit": Tower(num_layers=12, has_cls=True, prefix=1),
    "distilled": Tower(num_layers=12, has_cls=True, prefix=2),
    "siglip": Tower(num_layers=27, has_cls=False),
    "windowed": Tower(
        num_layers=32, has_cls=False, merge_unit=4, full_attention=(7, 15, 23, 31), rotary=True
    ),
    "tiny": Tower(num_layers=2, has_cls=True, prefix=1, blocks_read=1),
}
PLAIN = [name for name, tower in TOWERS.items() if tower.full_attention is None]


def drawn(
    method: InEncoder,
    tower: Tower,
    count: int,
    *,
    batch: int = 2,
    cut: BlockCut | None = None,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
    sized: bool = False,
) -> EncoderRows:
    """Random rows, as the method sees them at a cut: its first unless given."""
    generator = torch.Generator().manual_seed(seed)
    cut = cut or method.blocks(tower)[0]
    signals = {}
    for need in method.reads(cut, tower):
        draw = SOURCES[type(need)].draw
        pictures = [draw(need, count, Sizes(), generator) for _ in range(batch)]
        signals[need] = torch.stack(pictures)
    sizes = torch.ones(batch, count)
    if sized:
        sizes = torch.randint(1, 9, (batch, count), generator=generator).float()
    return EncoderRows(
        cut=cut,
        tower=tower,
        grid=grid,
        numbers=torch.arange(count).expand(batch, -1),
        sizes=sizes,
        signals=signals,
    )


def given(
    method: InEncoder,
    tower: Tower,
    *signals: Tensor,
    sizes: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> EncoderRows:
    """One picture's signals (N, ...) at the method's first cut, in the order of its `reads`."""
    cut = method.blocks(tower)[0]
    count = len(signals[0])
    return EncoderRows(
        cut=cut,
        tower=tower,
        grid=grid,
        numbers=torch.arange(count)[None],
        sizes=torch.ones(1, count) if sizes is None else sizes[None],
        signals={
            need: value[None] for need, value in zip(method.reads(cut, tower), signals, strict=True)
        },
    )


def one(rows: EncoderRows, at: int) -> EncoderRows:
    """A single picture of them."""
    return EncoderRows(
        cut=rows.cut,
        tower=rows.tower,
        grid=rows.grid,
        numbers=rows.numbers[at : at + 1],
        sizes=rows.sizes[at : at + 1],
        signals={need: value[at : at + 1] for need, value in rows.signals.items()},
    )


def same(first: Reduction, second: Reduction) -> bool:
    """Whether two choices are the same, index for index."""
    if not torch.equal(first.source, second.source):
        return False
    if first.owner is None or second.owner is None:
        return first.owner is second.owner
    return torch.equal(first.owner, second.owner)


def checked(method: InEncoder, rows: EncoderRows, keep: int) -> Reduction:
    """What the method makes of rows, as the adapters ask it, and what holds for every method:
    the counts, the same for each picture alone, and every row in one new row at most."""
    made = reduce(method, rows, keep, debug=True)
    assert made.source.shape == (len(rows.numbers), keep)
    for at in range(len(rows.numbers)):
        alone = reduce(method, one(rows, at), keep)
        picture = Reduction(
            source=made.source[at : at + 1],
            owner=None if made.owner is None else made.owner[at : at + 1],
        )
        assert same(alone, picture)
    return made


def assert_partition(made: Reduction, rows: EncoderRows) -> None:
    """Every row goes into one new row, each new row has its source among its members, and no patch
    is lost."""
    owner = made.owners(rows.count)
    assert bool((owner >= 0).all())
    for row, source in zip(owner, made.source, strict=True):
        assert row.unique().tolist() == list(range(made.count))
        has = source >= 0
        assert row[source[has]].tolist() == torch.arange(made.count)[has].tolist()
    torch.testing.assert_close(made.sizes(rows.sizes).sum(1), rows.sizes.sum(1), rtol=0, atol=0)
