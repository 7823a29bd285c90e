"""Where cuts are: places in the order of depth, and no place that is a special number."""

import pytest
from vlmprune.prune.contract import Cut, Place
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.registry import default_methods


def test_places_are_in_the_order_in_which_a_prompt_passes_them():
    assert sorted([Place.CACHE, Place.DECODER, Place.BEFORE_LLM, Place.ENCODER]) == list(Place)
    assert Place.BEFORE_LLM < Place.DECODER < Place.CACHE


def test_cuts_are_in_the_order_in_which_tokens_pass_them():
    first, second, third = Cut(Place.BEFORE_LLM), Cut(Place.DECODER, 2), Cut(Place.DECODER, 9)
    assert first.depth < second.depth < third.depth


@pytest.mark.parametrize("layer", [0, 3])
def test_a_number_alone_is_no_cut(layer):
    with pytest.raises(MethodFieldError, match=rf"Cut\(Place.DECODER, {layer}\)"):
        Cut(layer)


def test_a_cut_reads_as_it_is_written():
    assert repr(Cut(Place.DECODER, 2)).startswith("Cut(place=Place.DECODER, layer=2")


def test_every_method_acts_first_where_its_class_says():
    for method in default_methods()[0].values():
        assert method.places[0] is method.place
        assert list(method.places) == sorted(method.places)
