"""Inner products of all tokens with each other, every pair multiplied once."""

from __future__ import annotations

from torch import Tensor

STORE_UP_TO = 8192
"""Tokens whose (N, N) products are kept in memory: 256 MiB. With more, methods compute rows."""
_LEAF = 256


def gram(rows: Tensor) -> Tensor:
    """Inner products (N, N) of rows (N, D).

    They are symmetric: the two halves of the tokens are multiplied with each other once, and each
    half with itself in the same way. That is half the work of `rows @ rows.T`.
    """
    products = rows.new_empty(len(rows), len(rows))
    _fill(products, rows)
    return products


def _fill(products: Tensor, rows: Tensor) -> None:
    if len(rows) <= _LEAF:
        products.copy_(rows @ rows.T)
        return
    half = len(rows) // 2
    _fill(products[:half, :half], rows[:half])
    _fill(products[half:, half:], rows[half:])
    across = rows[:half] @ rows[half:].T
    products[:half, half:] = across
    products[half:, :half] = across.T
