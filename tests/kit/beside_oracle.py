"""A patched model beside `oracle.Truth`: kept tokens and what is reported of them, logits, tokens,
caches."""

from __future__ import annotations

import torch
from kit import zoo
from kit.decoder_kinds import stored_lengths
from kit.oracle import Truth
from kit.reported import TOLERANCE
from vlmprune.adapters.cache_names import CACHE
from vlmprune.prune.contract import Place
from vlmprune.prune.tiling import Tiling

STEPS = 4


def positions_of(case: zoo.Case, handle) -> str:
    assert handle.last.positions in ("original", "repacked")
    if case.fixed_positions:
        assert handle.last.positions == "original"
    return handle.last.positions


def cut_images(call) -> set[str]:
    """Which images the cuts are for, one by one or pooled; and whether they may remove all."""
    cuts = call.method.cuts(zoo.CLIP)
    return {cut.images for cut in cuts} | ({"adaptive"} if any(c.adaptive for c in cuts) else set())


def budget_of(budget: dict, tokens: int) -> int:
    """How many of an image's tokens a budget keeps."""
    if "keep_tokens" in budget:
        return min(tokens, budget["keep_tokens"])
    return max(1, round(budget["keep_ratio"] * tokens))


def check_kept(case: zoo.Case, rows, handle, expected) -> list[torch.Tensor]:
    """The kept tokens are well formed, and the rows that enter as many as the budget says."""
    last, tilings = handle.last, case.tilings(rows)
    roles = set().union(*(cut_images(call) for call in handle.methods))
    assert list(last.tilings) == tilings
    assert list(last.tokens_in) == [tiling.num_tokens for tiling in tilings]
    assert len(last.kept) == len(tilings)
    wanted = [expected(tiling.num_tokens) for tiling in tilings]
    if "context" in roles:  # counts of pooled images are exact together
        assert _per_sample(last, last.tokens_kept) == _per_sample(last, wanted)
    else:
        allowed = [(count, 0) if "adaptive" in roles else (count,) for count in wanted]
        assert all(n in counts for n, counts in zip(last.tokens_kept, allowed, strict=True))
    everything = zip(last.kept, last.tokens_kept, last.order, last.groups, tilings, strict=True)
    for kept, count, order, groups, tiling in everything:
        assert kept.dtype == torch.int64
        assert torch.equal(kept, kept.unique())
        assert not len(kept) or (kept[0] >= 0 and kept[-1] < tiling.num_tokens)
        if order is None:
            assert len(kept) == count
        else:
            assert order.dtype == torch.int64 and len(order) == count
            assert torch.equal(order[order >= 0].sort().values, kept)
        if groups is not None:
            inside = all(call.method.place is Place.DECODER for call in handle.methods)
            check_groups(groups, order if order is not None else kept, tiling, newlines=inside)
    return last.kept


def _per_sample(last, counts: list[int]) -> dict[int, int]:
    sums: dict[int, int] = {}
    for sample, count in zip(last.image_sample, counts, strict=True):
        sums[sample] = sums.get(sample, 0) + count
    return sums


def check_groups(
    groups: list[torch.Tensor], rows: torch.Tensor, tiling: Tiling, *, newlines: bool
) -> None:
    """A list of members for each row, its own token among them."""
    assert len(groups) == len(rows)
    patches = tiling.patches(torch.device("cpu"))
    if newlines:  # inside the LLM they are tokens like any other
        patches = torch.arange(tiling.num_tokens)
    for members, row in zip(groups, rows.tolist(), strict=True):
        assert len(members) == len(members.unique())
        assert torch.isin(members, patches).all(), "a newline was merged"
        assert row < 0 or not len(members) or row in members.tolist()


def check_against(truth: Truth, model, inputs, handle=None) -> None:
    """Greedy tokens, logits of every step, and the length of the cache."""
    check_generated(truth, generated(model, inputs), inputs, handle)


def generated(model, inputs):
    """What the model goes on with, in `STEPS` greedy steps."""
    return model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def check_stored(truth: Truth, cache, new: int = 0) -> None:
    """Every layer with a KV cache stores what enters it of the longest row, and `new` tokens."""
    lengths = [truth.stored_lengths(b) for b in range(len(truth.rows))]
    stores = [hasattr(layer, "self_attn") for layer in truth.decoder.layers]
    of_layers = zip(zip(*lengths, strict=True), stores, strict=True)
    assert stored_lengths(cache) == [(max(column) + new) * has for column, has in of_layers]


def check_generated(truth: Truth, out, inputs, handle=None) -> None:
    """`check_against` of what was generated on the inputs already."""
    tokens = out.sequences[:, -STEPS:]
    assert torch.equal(out.sequences[:, :-STEPS], inputs["input_ids"])
    # Along the tokens that were found: if all logits agree, so does every choice.
    steps = [truth.next_logits(b, row[:-1]) for b, row in enumerate(tokens.tolist())]
    logits = torch.stack(steps, 1)
    torch.testing.assert_close(torch.stack(out.logits), logits, **TOLERANCE)
    assert torch.equal(logits.argmax(-1).T, tokens)
    check_stored(truth, out[CACHE], STEPS - 1)
    assert out[CACHE].get_seq_length() == inputs["input_ids"].shape[1] + STEPS - 1
    if handle is not None:
        text = [int((~zoo.is_visual(row.ids)).sum()) for row in truth.rows]
        lengths = [truth.layer_lengths(b) for b in range(len(truth.rows))]
        visual = [[n - t for n in row] for row, t in zip(lengths, text, strict=True)]
        assert [list(row) for row in handle.last.tokens_per_layer] == visual
        assert list(handle.last.text_tokens) == text
