"""What the tests of RULER share: a tokenizer that counts words, and samples made with it."""

import re
import zlib

from mlxkv.evaluate.sources import Sources
from mlxkv.evaluate.tasks import ruler
from mlxkv.evaluate.tasks.ruler.samples import samples


class Words:
    """A tokenizer of words and punctuation marks, as numbers below 97, with a first token of its own."""

    eos_token_ids = frozenset()

    def encode(self, text, add_special_tokens=True):
        marks = re.findall(r"\w+|[^\w\s]", text)
        return [0] * add_special_tokens + [zlib.crc32(mark.encode()) % 97 for mark in marks]

    def decode(self, tokens, skip_special_tokens=False):
        return " ".join(map(str, tokens))


def sample(name, length=2000, *, seed=0, index=0, sources=None):
    return list(samples(ruler.TASKS[name], name, Words(), length, index + 1, seed, sources or Sources()))[index]
