"""Inner products of all tokens with each other, every pair multiplied once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

STORE_UP_TO = 8192
"""Tokens whose (N, N) products are kept in memory: 256 MiB. With more, methods compute rows."""
_LEAF = 256


def gram(rows: Tensor) -> Tensor:
    """Inner products (N, N) of rows (N, D).

    They are symmetric: the two halves of the tokens are multiplied with each other once, and each
    half with itself in the same way. That is half the work of `rows @ rows.T`.
    """
    return grams([rows])[0]


def grams(images: Sequence[Tensor]) -> Tensor:
    """Inner products (B, N, N) of the rows (N, D) of images of equal size, each as it is alone."""
    count = len(images[0])
    products = images[0].new_empty(len(images), count, count)
    for out, rows in zip(products, images, strict=True):
        _fill(out, rows)
    return products


def at_once(images: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Parts of images (N, D) of equal size, whose products fit in memory together."""
    most = max(1, STORE_UP_TO**2 // len(images[0]) ** 2)
    for start in range(0, len(images), most):
        yield images[start : start + most]


def rows_of(products: Tensor, tokens: Tensor) -> Tensor:
    """The rows (B, N) of products (B, N, N) that belong to one token of each image, (B, 1)."""
    index = tokens[:, :, None].expand(-1, 1, products.shape[2])
    return products.gather(1, index)[:, 0]


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
