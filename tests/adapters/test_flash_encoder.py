"""Methods inside the vision encoder beside flash attention, whose kernels take no numbers to add to
logits: they are one more column of keys. Kernels are imitated, as in `test_flash`."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import zoo
from kit.flash_kernels import flash_kernels


@pytest.fixture
def kernels():
    with flash_kernels():
        yield


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("name", [name for name in zoo.IN_ENCODER if name != "expedit"])
def test_it_answers_as_beside_sdpa(kernels, case, name):
    found = []
    for attention in ("flash_attention_2", "sdpa"):
        model, inputs = case.model(), case.inputs(zoo.BATCH)
        model.set_attn_implementation(attention)
        handle = vlmprune.patch(model, name, keep_ratio=0.4)
        with torch.no_grad():
            found.append((model(**inputs).logits, handle.last.kept))
    real = case.inputs(zoo.BATCH)["attention_mask"].bool()
    torch.testing.assert_close(found[0][0][real], found[1][0][real], atol=1e-4, rtol=1e-4)
    assert all(map(torch.equal, found[0][1], found[1][1]))
