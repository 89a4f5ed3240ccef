"""Live caches that version 0.1.0 wrote before settings and states had their present names, in tests/fixtures/live.

Each is of a model with exact weights, which read 75 tokens in chunks of 60, 1 and 14.
"""

from pathlib import Path

import mlx.core as mx
import pytest
from conftest import tiny_model
from forging import forge, header_of
from mlx.utils import tree_map

from mlxkv.live import make_cache
from mlxkv.live.serialization import load_cache, save_cache

pytestmark = pytest.mark.filterwarnings("ignore::mlxkv.errors.WeakFingerprintWarning")
FILES = sorted((Path(__file__).parents[1] / "fixtures" / "live").glob("*.cache"))
KEPT = {
    "kivi": 75,
    "streaming-llm": 11,
    "h2o": 11,
    "smartkv": 75,
    "mp-kvm": 13,
    "mp-kvm-count": 13,
    "sketch-aggregate": 18,
}


def plain_model():
    """A tiny llama whose weights are multiples of 1/64, the same on every machine."""
    model = tiny_model("llama", num_hidden_layers=1)
    model.update(tree_map(lambda x: ((mx.arange(x.size) * 37 % 101 - 50) / 64).reshape(x.shape), model.parameters()))
    return model


def test_there_is_a_file_of_every_kind_of_state():
    assert {path.stem for path in FILES} == set(KEPT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_old_file_loads_goes_on_and_is_written_again_with_the_same_arrays(path, tmp_path):
    model = plain_model()
    caches = load_cache(path, model)
    assert (caches[0].offset, caches[0].kept) == (75, KEPT[path.stem])
    save_cache(tmp_path / "cache", model, caches)
    (old, old_arrays), (new, new_arrays) = (header_of(file.read_bytes()) for file in (path, tmp_path / "cache"))
    assert new_arrays == old_arrays
    assert [new[key] for key in ("arrays", "spec")] == [old[key] for key in ("arrays", "spec")]
    ((name, settings),), ((_, offset, state),) = new["methods"], new["layers"]
    assert name == old["method"]
    assert settings.items() >= old["settings"].items()
    assert [offset, [part for _, part in state["dict"]][: len(old["layers"][0][1]["list"])]] == [
        75,
        old["layers"][0][1]["list"],
    ]
    for name, kind in caches[0].state_types.items():
        assert isinstance(getattr(caches[0], name), kind | None)
    again = load_cache(tmp_path / "cache", model)
    for tokens in (mx.arange(20), mx.arange(1), mx.arange(70)):
        output = model(tokens[None], cache=caches)
        assert mx.isfinite(output).all()
        assert mx.array_equal(output, model(tokens[None], cache=again))
    assert caches[0].offset == 75 + 91


def test_old_files_have_the_old_names_of_settings():
    settings = {path.stem: header_of(path.read_bytes())[0]["settings"] for path in FILES}
    assert settings["kivi"]["residual"] == 4
    assert settings["streaming-llm"] == {"sinks": 2, "window": 9}
    assert (settings["mp-kvm"]["preserve"], settings["mp-kvm"]["window"]) == (2, 6)
    configs = {path.stem: load_cache(path, plain_model())[0].config for path in FILES}
    assert configs["kivi"].recent == 4
    assert (configs["mp-kvm"].sinks, configs["mp-kvm"].recent) == (2, 6)


@pytest.mark.parametrize(
    ("method", "settings"), [("int8", {"keys_by_channel": False}), ("int4", {"rotate": False, "sinks": 0})]
)
def test_a_file_without_the_newer_settings_is_read_as_it_was_packed(method, settings, tmp_path):
    model = plain_model()
    caches = make_cache(model, method, **settings)
    model(mx.arange(75)[None], cache=caches)
    save_cache(tmp_path / "cache", model, caches)
    header, body = header_of((tmp_path / "cache").read_bytes())
    for name in settings:
        del header["methods"][0][1][name]
    (tmp_path / "cache").write_bytes(forge(header, body))
    again = load_cache(tmp_path / "cache", model)
    assert again[0].config == caches[0].config
    assert mx.array_equal(model(mx.arange(3)[None], cache=again), model(mx.arange(3)[None], cache=caches))
