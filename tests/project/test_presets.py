import dataclasses
import sys
import tomllib
import warnings

import pytest

from mlxkv import _deprecated, presets
from mlxkv.bundled.resources import resource_dir
from mlxkv.codec.methods import codec_methods
from mlxkv.errors import InputError, MismatchError, PresetError
from mlxkv.live import live_config, live_methods
from mlxkv.models import available, kv_slots
from mlxkv.spec import CacheSpec, Rope


def spec(model_type="lfm2", **rope):
    return CacheSpec(model_type, (kv_slots(8, 64, Rope(**{"dims": 64, "base": 1e6, **rope})),))


def class_of(preset):
    return (live_methods.find(preset.method) or codec_methods.get(preset.method)).config_class


def used(name):
    """Everybody who is given a method preset finds the method, then reads the settings by its class."""
    preset = presets.method_preset(name)
    with pytest.raises(PresetError, match="not a live method"):
        live_config(name)
    return preset.config(class_of(preset))


@pytest.fixture
def preset_folder(tmp_path, monkeypatch):
    for kind in ("models", "methods"):
        (tmp_path / kind).mkdir()
    monkeypatch.setattr(presets, "resource_dir", lambda name: tmp_path)
    return tmp_path


def test_the_named_families_are_there():
    assert {"lfm2", "qwen3", "glm", "smollm2", "llama", "gpt2"} <= set(presets.preset_names("models"))


@pytest.mark.parametrize("name", presets.preset_names("models"))
def test_every_model_preset_loads_and_names_existing_adapters(name):
    assert set(presets.model_preset(name).model_types) <= set(available())


@pytest.mark.parametrize("name", presets.preset_names("methods"))
def test_method_settings_survive_a_round_trip(name):
    preset = presets.method_preset(name)
    config_class = class_of(preset)
    config = preset.config(config_class)
    raw = tomllib.loads((resource_dir("presets") / "methods" / f"{name}.toml").read_text())
    assert config_class(**dataclasses.asdict(config)) == config
    assert config_class.from_dict(config.to_dict()) == config
    assert config.to_dict().items() >= raw["settings"].items()
    assert preset.settings == config  # by its old name


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(PresetError, match=r"no preset 'lfm3'.*did you mean lfm2.*gpt2.*qwen3"):
        presets.model_preset("lfm3")


def test_unknown_keys_fail(preset_folder):
    (preset_folder / "models/a.toml").write_text(
        'description=""\nexample=""\nmodel_types=[]\nmode="dual_stream"\nbits=3'
    )
    (preset_folder / "methods/b.toml").write_text(
        'description=""\nmethod="kvtc"\n[settings]\ncompression_ratio=4.0\nratio=3'
    )
    (preset_folder / "models/c.toml").write_text(
        'description=""\nexample=""\nmodel_types=[]\nmode="dual_stream"\n[rope]\nbse=3'
    )
    (preset_folder / "methods/d.toml").write_text('description=""\nmethod="kvtc"\nratio=3')
    (preset_folder / "methods/e.toml").write_text('description=""\nmethod="kivi"\n[settings]\nresidue=3')
    for load, name, key in (
        (presets.model_preset, "a", "bits"),
        (used, "b", "ratio"),
        (presets.model_preset, "c", "bse"),
        (presets.method_preset, "d", "ratio"),
        (live_config, "e", "residue"),
    ):
        with pytest.raises(PresetError, match=key):
            load(name)


def test_bad_values_and_bad_toml_fail(preset_folder):
    (preset_folder / "methods/a.toml").write_text('description=""\nmethod="kvtc"\n[settings]\ncompression_ratio=-1.0')
    (preset_folder / "methods/b.toml").write_text("description=")
    (preset_folder / "methods/c.toml").write_text('description=""\nmethod="nothing"')
    (preset_folder / "methods/d.toml").write_text('description=""\nmethod="plan"')
    (preset_folder / "methods/e.toml").write_text('description=""\nmethod="kivi"\n[settings]\nresidual=-1')
    for load, name, reason in (
        (used, "a", "preset 'a': compression_ratio must be .*not -1.0"),
        (presets.method_preset, "b", "not valid TOML"),
        (live_config, "c", "preset 'c' is of method 'nothing', which is not a live method"),
        (live_config, "d", "preset 'd' is of method 'plan', which is not a live method"),
        (live_config, "e", "preset 'e': recent must be 0 or more"),
    ):
        with pytest.raises(PresetError, match=reason):
            load(name)
    for name in ("c", "d"):
        with pytest.raises(InputError, match="no codec method"):
            codec_methods.get(presets.method_preset(name).method)


@pytest.mark.parametrize(
    "method",
    ['"a.b"', '""', '"../x"', '"calibrate"', '"__init__"', '"kvtc.METHOD"', '"os"', '"mlxkv.live.base"', "3", "[]"],
)
def test_only_a_registered_method_is_one_and_its_name_imports_nothing(preset_folder, method):
    (preset_folder / "methods/a.toml").write_text(f'description=""\nmethod={method}\n[settings]\ncompression_ratio=4.0')
    live_methods.names()
    codec_methods.names()
    before = set(sys.modules)
    with pytest.raises(PresetError, match=r"preset 'a'.*method"):
        live_config("a")
    if method.startswith('"'):
        assert codec_methods.find(presets.method_preset("a").method) is None
    assert set(sys.modules) == before


def test_old_names_of_settings_are_the_keys_of_toml_files_and_do_not_warn(preset_folder):
    (preset_folder / "methods/a.toml").write_text('description=""\nmethod="mp-kvm"\n[settings]\nwindow=7\npreserve=3')
    (preset_folder / "methods/b.toml").write_text('description=""\nmethod="kivi"\n[settings]\nresidual=9')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (live_config("a").recent, live_config("a").sinks) == (7, 3)
        assert live_config("b").recent == 9
        for name in presets.preset_names("methods"):
            live_config(name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("description", "3"),
        ("example", "[]"),
        ("model_types", '"llama"'),
        ("model_types", "[3]"),
        ("model_types", "3"),
        ("mode", "[]"),
        ("rope", '""'),
    ],
)
def test_a_wrong_kind_of_value_in_a_model_preset_is_named(preset_folder, key, value):
    data = {"description": '""', "example": '""', "model_types": "[]", "mode": '"dual_stream"', key: value}
    (preset_folder / "models/a.toml").write_text("\n".join(f"{key}={value}" for key, value in data.items()))
    with pytest.raises(PresetError, match=key):
        presets.model_preset("a")


def test_a_method_presets_description_is_text(preset_folder):
    (preset_folder / "methods/a.toml").write_text('description=3\nmethod="kvtc"\n[settings]\ncompression_ratio=4.0')
    with pytest.raises(PresetError, match=r"preset 'a': description"):
        presets.method_preset("a")


@pytest.mark.parametrize("kind", ["models", "methods"])
def test_a_preset_that_is_not_utf8_is_refused(preset_folder, kind):
    (preset_folder / kind / "a.toml").write_bytes('description="é"'.encode("latin-1"))
    with pytest.raises(PresetError, match="UTF-8"):
        {"models": presets.model_preset, "methods": presets.method_preset}[kind]("a")


def test_a_model_preset_refuses_another_family():
    lfm2 = presets.model_preset("lfm2")
    lfm2.check(spec())
    with pytest.raises(MismatchError, match="the model is llama"):
        lfm2.check(spec("llama"))
    with pytest.raises(MismatchError, match=r"expected \{'base': 1000000.0\}, the cache has \{'base': 10000.0\}"):
        lfm2.check(spec(base=1e4))
    with pytest.raises(MismatchError, match="traditional"):
        lfm2.check(spec(traditional=True))


def test_a_missing_resource_folder_names_both_places():
    with pytest.raises(InputError, match=r"mlxkv/nothing.*nor .*nothing exists"):
        resource_dir("nothing")


def test_old_names_still_work(monkeypatch):
    monkeypatch.setattr(_deprecated, "_warned", set())
    for name, expected in (("names", presets.preset_names), ("live_settings", live_config)):
        with pytest.warns(DeprecationWarning, match=f"presets.{name} is called"):
            assert getattr(presets, name) is expected
