"""Layouts of an image, encoders and a decoder, in the sizes that tests of choosing use."""

from vlmprune.prune.contract import Decoder, Tower
from vlmprune.prune.tiling import Block, Tiling

DECODER = Decoder(num_layers=32, hidden_size=64, intermediate_size=128)
TOWERS = {
    "clip": Tower(num_layers=24, has_cls=True, text_twin=True),
    "siglip": Tower(num_layers=27, has_cls=False),
    "windowed": Tower(num_layers=32, has_cls=False, merge_unit=4, full_attention=(7, 15, 23, 31)),
    "merging": Tower(num_layers=32, has_cls=False, merge_unit=4),
    "one layer": Tower(num_layers=1, has_cls=True),
}
THUMBNAIL = Block((4,), (4,))
TILINGS = {
    "plain": Tiling.single(3, 5),
    "two": Tiling.single(1, 2),
    "line": Tiling.single(1, 7),
    "tall": Tiling.single(9, 1),
    "plain with newlines": Tiling((Block((4,), (3,), "rows"),)),
    "2 x 2": Tiling((THUMBNAIL, Block((4, 4), (4, 4)))),
    "2 x 2 with newlines": Tiling((THUMBNAIL, Block((4, 4), (4, 4), "rows"))),
    "without padding": Tiling((THUMBNAIL, Block((1, 4, 1), (4,), "rows"))),
    "with a lost tile": Tiling((THUMBNAIL, Block((3, 4), (4, 0, 2), "rows"))),
    "one crop": Tiling((THUMBNAIL, Block((2,), (3,), "rows"))),
    "video": Tiling((*[Block((2,), (3,))] * 3, Block((2,), (3,), "end"))),
    "thumbnail last": Tiling((Block((2,), (3,)),) * 4, thumbnail=3),
}
