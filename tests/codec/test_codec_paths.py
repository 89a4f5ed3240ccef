"""The codec writes the same bytes and reads the same arrays whether its kernels or their references ran."""

from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from synthetic import DUAL, LATENT, toy_artifacts, toy_dump

from mlxkv.codec.session import CacheCodec
from mlxkv.errors import InputError
from mlxkv.io.container import Reader
from mlxkv.kernels import metal

SPECS = {"dual": DUAL, "latent": LATENT}


@pytest.fixture(scope="module", params=SPECS)
def artifacts(request, tmp_path_factory):
    return toy_artifacts(tmp_path_factory.mktemp(request.param), SPECS[request.param])


@pytest.fixture
def launched(monkeypatch):
    """Names of the bodies that ran."""
    names, call = set(), metal.Kernel.__call__
    monkeypatch.setattr(metal.Kernel, "__call__", lambda self, **kw: (names.add(self.name), call(self, **kw))[1])
    return names


@pytest.mark.parametrize("lossless", ["deflate", "rans"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_bytes_and_arrays_do_not_depend_on_the_path(kernel_path, artifacts, launched, dtype, lossless):
    dump = toy_dump(artifacts.spec, length=170, batch=2, seed=5, dtype=np.float32)
    codec = CacheCodec(artifacts, recent=30, lossless=lossless)
    layers = [[mx.array(layer).astype(dtype) for layer in side] for side in (dump.k, dump.v)]
    with patch.object(metal, "available", lambda: False):
        blob = codec.compress(*layers)
        arrays = codec.decompress(blob)
    assert not launched
    assert codec.compress(*layers) == blob
    for side, expected in zip(codec.decompress(blob), arrays):
        np.testing.assert_array_equal(np.stack(side), np.stack(expected))
    expected = {"rows", "groups_pack", "groups_unpack"}
    assert launched == expected | ({"rans_encode", "rans_decode"} if lossless == "rans" else set())


@pytest.mark.parametrize("lossless", ["raw", "deflate", "rans"])
def test_every_lossless_coding_returns_the_same_arrays_and_stands_in_the_header(artifacts, lossless):
    dump = toy_dump(artifacts.spec, length=600, seed=5)
    blob = CacheCodec(artifacts, lossless=lossless).compress_dump(dump)
    with Reader(blob) as reader:
        codings = {name: section.coding for name, section in reader.sections.items()}
    assert {codings["k.0"], codings["k.window"]} == {lossless}
    assert codings["tokens"] == "raw"
    plain = CacheCodec(artifacts)
    for name in "kv":
        found = plain.decompress_dump(blob).stream(name)
        np.testing.assert_array_equal(found, plain.decompress_dump(plain.compress_dump(dump)).stream(name))


def test_an_unknown_lossless_coding_is_refused(artifacts):
    with pytest.raises(InputError, match="no lossless coding 'zip'; there are deflate, rans, raw"):
        CacheCodec(artifacts, lossless="zip")
