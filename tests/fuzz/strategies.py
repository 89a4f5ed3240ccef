"""Hypothesis strategies of recipes: which format, which of its examples, and the edits to make."""

from hypothesis import strategies as st

from fuzz.mutations import HUGE, ODD

PLACE = st.integers(0, 2**20)
NUMBER = st.one_of(st.integers(0, 300), st.sampled_from([2**16, 2**31, 2**32 - 1]))
VALUE = st.one_of(
    st.sampled_from([*ODD, *HUGE]),
    st.integers(-(2**70), 2**70),
    st.integers(-5, 70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 9), max_size=6),
)
JSON_EDIT = st.fixed_dictionaries(
    {
        "at": PLACE,
        "do": st.sampled_from(["set", "set", "set", "delete", "bump", "copy", "repeat", "nest", "add"]),
        "value": VALUE,
    }
)
BYTES_EDIT = st.fixed_dictionaries(
    {
        "at": PLACE,
        "do": st.sampled_from(["flip", "insert", "cut", "truncate", "word", "zero", "255"]),
        "value": NUMBER,
    }
)
ARRAY_EDIT = st.fixed_dictionaries(
    {
        "at": PLACE,
        "do": st.sampled_from(
            ["shape", "type", "cast", "fill", "fill", "slice", "axis", "scalar", "order", "header", "cut"]
        ),
        "value": NUMBER,
    }
)


def recipes(name, variants, json=True, data=True, arrays=False):
    """Recipes of a format: one to three edits of its JSON, of parts of its bytes, or of its arrays."""
    kinds = [
        st.fixed_dictionaries({"kind": st.just(kind), "part": PLACE, "edit": edit})
        for kind, edit, used in (("json", JSON_EDIT, json), ("bytes", BYTES_EDIT, data), ("array", ARRAY_EDIT, arrays))
        if used
    ]
    return st.fixed_dictionaries(
        {
            "format": st.just(name),
            "variant": st.sampled_from(variants),
            "edits": st.lists(st.one_of(kinds), min_size=1, max_size=3),
        }
    )
