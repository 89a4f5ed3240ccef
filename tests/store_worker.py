"""A process that uses a store with others, for tests: `python store_worker.py FOLDER SEED SECONDS LIMIT`."""

import select
import sys
import time
from pathlib import Path

import numpy as np
from block_texts import ROOT, cut, data, insert, text

from mlxkv.errors import FormatError
from mlxkv.io.container import Reader
from mlxkv.store.chain import Chain
from mlxkv.store.index import BlockStore


def work(folder, seed, seconds, limit):
    """Put, find, read, set aside and remove texts that others work on as well; fail where anything read is wrong."""
    random, until = np.random.default_rng(seed), time.monotonic() + seconds
    with BlockStore(Path(folder), limit) as store:
        print("ready", flush=True)
        while time.monotonic() < until and not select.select([sys.stdin], [], [], 0)[0]:  # it is closed to end this
            words = [1, *(int(word) for word in random.integers(2, 6, random.integers(1, 5)))]
            tokens = text(*words, length=512 * len(words) - int(random.integers(300)))
            match random.integers(8):
                case 0:
                    store.remove(name=Chain(ROOT, tokens).name(len(tokens)))
                case 1:
                    store.sweep()
                case 2:
                    chain = Chain(ROOT, tokens)
                    (block, *_) = cut(chain, cuts=(300,), rows_from=int(random.integers(300)))
                    with store.growing() as growth:
                        growth.put(block, data(block))
                case _:
                    insert(store, tokens, int(random.integers(1, 200_000)), state=int(random.integers(2)) * 5000)
            read(store, Chain(ROOT, tokens))
        assert {reason for _, reason in store.verify().damaged} <= {"No such file or directory"}  # others are killed


def read(store, chain):
    """Read a text back: files may have gone meanwhile, but none is wrong."""
    for block in store.longest(chain, len(chain)):
        try:
            with store.open_block(block.name) as file:
                reader = Reader(file)
                reader.verify()
        except FileNotFoundError:
            break
        except FormatError as error:
            sys.exit(f"{block}: {error}")
        store.touch(block.name)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
