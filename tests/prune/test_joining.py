"""Rows of selections put together and rearranged: each brings its token, features and members."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from vlmprune.prune.contract import Selection
from vlmprune.prune.joining import joined, rearranged, renumbered

TOKENS = 12


def drawn(seed: int, arranged: bool) -> Selection:
    """Five rows of six tokens, of which two enter as something else, merged from three tokens."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(6, generator=generator)[:5]
    return Selection(
        kept=order.sort().values,
        order=order if arranged else None,
        features=torch.randn(2, 3, generator=generator),
        rows=torch.tensor([4, 1]),
        groups=torch.stack([torch.tensor([1, 4, 4]), torch.randperm(6, generator=generator)[:3]]),
    )


def described(chosen: Selection) -> list[tuple]:
    """Of each row its token, what enters for it, and the tokens that it was merged from."""
    features = dict(zip(chosen.rows.tolist(), chosen.features.tolist(), strict=True))
    assert (chosen.groups[0].diff() >= 0).all()
    return [
        (token, features.get(row), sorted(chosen.groups[1][chosen.groups[0] == row].tolist()))
        for row, token in enumerate(chosen.arranged.tolist())
    ]


@given(st.integers(0, 999), st.booleans(), st.permutations(range(5)))
def test_rearranged_rows_are_the_same_rows(seed, arranged, arrangement):
    chosen = drawn(seed, arranged)
    rows = described(chosen)
    found = rearranged(chosen, torch.tensor(arrangement))
    assert described(found) == [rows[i] for i in arrangement]
    assert torch.equal(found.kept, chosen.kept)


@given(st.integers(0, 999), st.booleans())
def test_joined_parts_are_their_rows(seed, arranged):
    """Part after part where any has an order of its own, else by the numbers of their tokens."""
    numbers = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed)).view(2, 6)
    parts = [
        renumbered(drawn(seed + i, arranged and i == 1), of_part, TOKENS)
        for i, of_part in enumerate(numbers.sort().values)
    ]
    rows = [row for part in parts for row in described(part)]
    found = joined(parts)
    assert described(found) == (rows if arranged else sorted(rows, key=lambda row: row[0]))
    assert torch.equal(found.kept, torch.cat([part.kept for part in parts]).sort().values)
