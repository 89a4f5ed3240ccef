"""Made-up compound words, for keys of needles and for lists of words: "amberfield", or "amber-field" as a key.

RULER draws from published word lists (wonderwords, and a larger one for long lists). These are written for the
project. No first part ends like another and no second part begins like another, so no word is inside another.
"""

from __future__ import annotations

import math
from random import Random

_FIRST = """
amber apple arrow autumn badger bamboo barley basil beacon birch bishop bramble bronze butter cabin candle canvas
canyon cedar cherry chimney cinder clover cobalt copper coral cotton crystal dagger desert dolphin dragon eagle ember
falcon feather fennel fern ginger glacier golden granite hammer harbor hazel helmet heron hollow honey indigo ivory
jasper juniper kettle lantern laurel lemon linen lobster lunar magnet maple marble meadow mirror mosaic moss nettle
nickel oak olive opal orchid otter oyster paper pebble pepper pillow plum pocket poplar puzzle quartz rabbit raven
ribbon rocket saddle saffron salmon scarlet shadow silver spruce sugar summer thistle thunder timber tulip turtle
velvet violet walnut willow winter zephyr
"""
_SECOND = """
acre alley arch bank barn basin bay bell bench berg board bowl bridge brook cape cart castle cave chest cliff coast
cove crest crown cup dale deck den dock door drift dune edge falls farm field flag flute forge fork fort gate glen
grove guild hall hatch haven hill hook house inlet island jar jetty key kiln knoll lake lane ledge lock loft lodge
mill mine mound nest notch pass path peak pier plaza point pond porch quay rail ranch reef ridge road roof rope sail
shelf ship shore shrine spire spring stair stone tavern tent tide tower trail vale vault view vine wagon wall ward
well wharf wheel yard
"""


def compounds(rng: Random, count: int, joint: str = "") -> list[str]:
    """`count` different words of two parts; of three, when there are not as many of two."""
    lists = [_FIRST.split(), _SECOND.split()]
    if count > math.prod(map(len, lists)):
        lists.insert(0, lists[0])
    total = math.prod(map(len, lists))
    return [joint.join(_parts(number, lists)) for number in rng.sample(range(total), count)]


def _parts(number: int, lists: list[list[str]]) -> list[str]:
    """The `number`-th choice of one part from each list."""
    parts = []
    for options in lists:
        number, which = divmod(number, len(options))
        parts.append(options[which])
    return parts
