import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_sampler

from mlxkv.cli._sampling import Sampling
from mlxkv.errors import InputError


class _Tokenizer:
    vocab_size = 50
    eos_token_ids = frozenset({3})

    def encode(self, text):
        return [7]


@pytest.fixture(autouse=True)
def _without_compiling():
    """MLX would call a C++ compiler for each filter of mlx-lm's."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def _drawn(sampler):
    logits = mx.random.normal((1, 50), key=mx.random.key(1))
    return [sampler(logits - mx.logsumexp(logits)).item() for _ in range(20)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temp": 0.8},
        {"temp": 0.8, "top_p": 0.4},
        {"temp": 0.8, "min_p": 0.2},
        {"temp": 0.8, "top_k": 3},
        {"temp": 2.0, "xtc_probability": 0.7, "xtc_threshold": 0.05},
    ],
)
def test_the_same_seed_draws_what_mlx_lm_draws(options):
    drawn = _drawn(Sampling(**options, seed=5).make(_Tokenizer()))
    mx.random.seed(5)
    assert drawn == _drawn(make_sampler(**options, xtc_special_tokens=[7, 3]))
    assert options == {} or drawn != _drawn(Sampling(**options, seed=6).make(_Tokenizer()))


@pytest.mark.parametrize("top_k", [50, 51, 2**31 - 1])
def test_more_tokens_than_there_are_is_all_of_them(top_k):
    assert _drawn(Sampling(0.8, top_k=top_k, seed=5).make(_Tokenizer())) == _drawn(
        Sampling(0.8, seed=5).make(_Tokenizer())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temp": 0.001}, "neither 0 nor"),
        ({"top_p": 0.9}, "--top-p needs a --temp"),
        ({"top_k": 5}, "--top-k needs a --temp"),
        ({"min_p": 0.1}, "--min-p needs a --temp"),
        ({"xtc_probability": 0.1}, "--xtc-probability needs a --temp"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options).check()
