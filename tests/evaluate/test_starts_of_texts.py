"""Wherever a text is cut, what a model reads begins with the tokens that its tokenizer puts before every text."""

from types import SimpleNamespace

import pytest

from benchmarks import texts as benchmark_texts
from mlxkv.evaluate import texts
from mlxkv.evaluate.sources import Sources
from mlxkv.evaluate.tasks import longbench, needle
from mlxkv.evaluate.variants import split_tokens
from mlxkv.lm import text_start

BOS, EOS = 7, 8


def tokenizer(before=(), after=(), blank=False):
    """A tokenizer of letters, as mlx-lm wraps one."""

    def encode(text, add_special_tokens=True):
        letters = [ord(letter) + 100 for letter in (f" {text}" if blank and text else text)]
        return [*before, *letters, *after] if add_special_tokens else letters

    return SimpleNamespace(encode=encode, eos_token_ids={EOS})


def essay(cutter):
    def cut(tokenizer, folder):
        path = folder / "essay.txt"
        path.write_text("".join(chr(97 + i * i % 26) for i in range(3000)))
        return cutter(tokenizer, path)

    return cut


CUTS = {
    "excerpts": essay(lambda t, path: [*texts.draw_excerpts(t, path, 100, 4, 0).values()]),
    "excerpts of one token": essay(lambda t, path: [*texts.draw_excerpts(t, path, 1, 4, 0).values()]),
    "repeated tokens": essay(lambda t, path: [texts.repeated_tokens(t, path, 100, seed) for seed in range(3)]),
    "haystacks": essay(
        lambda t, path: [needle.build_haystack(t, Sources(essays=path), 200, depth, "12345") for depth in (0, 0.5, 1)]
    ),
    "truncated prompts": essay(lambda t, path: [longbench.truncate_middle(*split_tokens(t, path.read_text(), "?"), 80)[0]]),
    "calibration": lambda t, folder: benchmark_texts.calibration(t, 100, 5),
    "held out": lambda t, folder: benchmark_texts.same_kind(t, 100, 5),
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_every_piece_of_text_begins_as_a_text_does(cut, tmp_path):
    pieces = cut(tokenizer(before=[BOS]), tmp_path)
    assert all(piece[0] == BOS and piece.count(BOS) == 1 for piece in pieces)
    for with_bos, without in zip(pieces, cut(tokenizer(), tmp_path)):
        assert len(with_bos) == len(without)
        assert BOS not in without


@pytest.mark.parametrize("after", [(), (EOS,)])
@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("before", [(), (BOS,), (BOS, BOS + 2)])
def test_the_start_of_texts_is_found_out_from_the_tokenizer(before, blank, after):
    assert text_start(tokenizer(before, after, blank)) == list(before)


def test_smollm2_puts_nothing_before_a_text(smollm2):
    assert text_start(smollm2[1]) == []
