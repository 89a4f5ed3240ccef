"""Made-up texts in blocks for tests of the store: containers of random bytes whose headers say what they are."""

import io
import os
from contextlib import suppress
from itertools import pairwise

import numpy as np

from mlxkv.io import container
from mlxkv.io.container import encode_section
from mlxkv.store.chain import SLOT, Block, Chain, root_name
from mlxkv.store.index import BlockStore

LIMIT = 16 * 2**20
ROOT = root_name("f00d.cafe", "{}", "38")


def text(*words, length=0):
    """Tokens that begin alike where the words do: each word stands for as many tokens as it is told, or 512."""
    tokens = []
    for word in words:
        word, count = word if isinstance(word, tuple) else (word, SLOT)
        tokens += np.random.default_rng(word).integers(0, 2**31 - 1, count).tolist()
    return tokens[: length or None]


def cut(chain, start=0, stop=None, cuts=(), rows_from=0, model="a/toy"):
    """The blocks of a text: to each multiple of 512, and to `cuts` and `stop`."""
    stop = len(chain) if stop is None else stop
    ends = sorted({p for p in (*range(0, stop, SLOT), *cuts, stop) if start < p <= stop})
    return [
        Block(chain.name(q), chain.name(p), chain.slot(q), p, q, min(rows_from, q), 0, "exact", "", model)
        for p, q in pairwise([start, *ends])
    ]


def data(block, size=2000, seed=0):
    """A container of about so many bytes for a block."""
    random, out = np.random.default_rng([seed, block.stop, *block.name]), io.BytesIO()
    container.write(out, {"kind": "part", "meta": {"store": block.meta}}, [encode_section("noise", random.bytes(size))])
    return out.getvalue()


def insert(store, tokens, size=2000, kind="assistant", state=0, seed=0, **how):
    """Put what is not there yet of a text, as far as it fits; return its chain."""
    chain = Chain(ROOT, tokens)
    known = store.longest(chain, len(chain))
    with store.growing(kind) as growth:
        blocks = cut(chain, known[-1].stop if known else 0, **how)
        for block in blocks:
            if not growth.put(block, data(block, size, seed)):
                return chain
        if not blocks:
            growth.end_at(chain.name(len(chain)))
        if state:
            growth.state(chain.name(len(chain)), data(known[-1] if not blocks else blocks[-1], state))
    return chain


def stops(store, chain, most=None, **how):
    """Where the blocks of a text's longest stored beginning end."""
    return [block.stop for block in store.longest(chain, len(chain) if most is None else most, **how)]


def disk_bytes(folder):
    """What a folder takes of the disk, as `du` counts."""
    taken = 0
    for at, _, files in os.walk(folder):
        for name in [".", *files]:
            with suppress(FileNotFoundError):  # another process may have removed it
                taken += os.lstat(os.path.join(at, name)).st_blocks * 512
    return taken


def one_block(path, chain, stop=512):
    """Where the file of a block is."""
    return path / "blocks" / chain.name(stop).hex()[:2] / f"{chain.name(stop).hex()}.mlxkv"


def filled(path, texts=4, state=500):
    """Make a store of some texts and close it; return their chains."""
    with BlockStore(path, LIMIT) as store:
        return [insert(store, text(1, 10 + number, length=900), state=state) for number in range(texts)]


def works(path, chains, expected=None):
    """Check that a store finds whole texts or less, nothing wrong, and takes new ones; return how many it found."""
    with BlockStore(path) as store:
        found = 0
        for chain in chains:
            blocks = store.longest(chain, len(chain))
            assert [block.stop for block in blocks] == [512, 900][: len(blocks)]
            found += len(blocks) == 2
        for _ in range(2):  # one that finds damage stores nothing
            new = insert(store, text(77, 78))
        assert stops(store, new) == [512, 1024]
        assert store.statistics().taken >= disk_bytes(path)
        store.sweep()
        store.verify()
        assert store.verify().damaged == []
        assert store.sweep() == (0, 0, 0)
        assert disk_bytes(path) <= store.statistics().taken <= LIMIT
    assert expected is None or found == expected
    return found
