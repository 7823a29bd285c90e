"""Values alone, of attention whose queries, keys and values come out of one module."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from vlmprune.adapters.encoders.mixed import values_alone
from vlmprune.eval.classify.counting import counting


class Adapted(nn.Linear):
    """Not the map that its weights say."""

    def forward(self, rows):
        return super().forward(rows) + 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "products"), [(nn.Linear, 1), (Adapted, 3)])
def test_values_alone_are_those_of_the_whole_module(kind, products, bias):
    torch.manual_seed(0)
    qkv, rows = kind(8, 24, bias=bias), torch.randn(2, 5, 8)
    with counting() as counter:
        values = values_alone(SimpleNamespace(qkv=qkv, num_heads=2), rows)
    assert counter.get_total_flops() == products * 2 * rows.numel() * 8
    by_hand = qkv(rows).view(2, 5, 3, 2, 4)[:, :, 2].transpose(1, 2)
    assert_close(values, by_hand)
