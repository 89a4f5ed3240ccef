"""A `kvtc-rd` file and its artifacts that every later mlxkv must read. Integers exactly; what they stand for to rounding.

After a deliberate change of format: MLXKV_REGENERATE_GOLDEN=1 pytest tests/codec/test_golden_rd.py
"""

import os
from pathlib import Path

import numpy as np
import pytest
from synthetic import PLAIN, rd_artifacts, toy_dump

from mlxkv.codec import writing
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages import entropy
from mlxkv.io.container import Reader
from mlxkv.spec import STREAMS

FOLDER = Path(__file__).parents[1] / "fixtures" / "golden_rd"
LENGTH, SINKS, RECENT, BLOCK, QUALITY = 40, 2, 5, 16, 37.5
FINGERPRINT = "bc86cdbde3e70f44c3bb3e14ade22cdc"


@pytest.fixture(scope="module", autouse=True)
def regenerated(tmp_path_factory):
    if os.environ.get("MLXKV_REGENERATE_GOLDEN") != "1":
        return
    artifacts, dump = (
        rd_artifacts(tmp_path_factory.mktemp("golden"), basis_bytes=74_500),
        toy_dump(PLAIN, length=LENGTH, seed=9),
    )
    artifacts.save(FOLDER / "artifacts", overwrite=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "BLOCK_ROWS", BLOCK)
        blob = CacheCodec(artifacts, recent=RECENT, sinks=SINKS, quality=QUALITY).compress_dump(dump)
    (FOLDER / "cache.mlxkv").write_bytes(blob)
    back = CacheCodec(artifacts).decompress_dump(blob)
    with Reader(blob) as reader:
        np.savez(FOLDER / "expected.npz", k=back.k, v=back.v, tokens=dump.tokens, **integers(reader, artifacts))


def integers(reader, artifacts):
    return {
        f"{name}.{index}": entropy.decode(
            [
                entropy.Section(
                    reader.read(f"{name}.{index}"),
                    artifacts.stream(name).tables,
                    tokens,
                    artifacts.stream(name).basis.rank,
                )
            ]
        )[0]
        for index, tokens in (("0", 16), ("1", 16), ("2", 1), ("window.0", RECENT))
        for name in STREAMS
    }


@pytest.fixture
def expected():
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def artifacts():
    return CalibrationArtifacts.from_dir(FOLDER / "artifacts")


def test_the_old_artifacts_have_the_fingerprint_that_files_name(artifacts):
    assert artifacts.fingerprint == FINGERPRINT
    assert 8 < artifacts.k.basis.rank < artifacts.k.width
    assert artifacts.k.basis._byte_count > artifacts.k.basis.rank * artifacts.k.width, (
        "some of its integers have two bytes"
    )


def test_the_old_file_decodes_to_the_same_integers_and_the_same_cache(artifacts, expected):
    with Reader(FOLDER / "cache.mlxkv") as reader:
        for name, found in integers(reader, artifacts).items():
            assert np.array_equal(found, expected[name]), name
        assert (reader.header["quality"], reader.header["window_quality"]) == (QUALITY, QUALITY + 30)
        assert reader.header["layout"] == {"batch": 1, "length": LENGTH, "s": SINKS, "w": RECENT, "block": BLOCK}
    dump = CacheCodec(artifacts).decompress_dump(FOLDER / "cache.mlxkv")
    assert np.array_equal(dump.tokens, expected["tokens"])
    for name in STREAMS:
        np.testing.assert_allclose(dump.stream(name).astype(float), expected[name], rtol=2e-3, atol=2e-3)


def test_the_fixtures_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 150_000
