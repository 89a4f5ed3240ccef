"""Names of before the first release: each still works, and warns exactly once, with the new name, where it is used."""

import importlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
from synthetic import rd_artifacts, toy_artifacts, toy_dump

import mlxkv
from mlxkv import _deprecated, lm
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import write_dump
from mlxkv.errors import InputError
from mlxkv.live.methods.mp_kvm import MPKVMConfig

pytestmark = pytest.mark.slow

# `mlxkv.__all__` as it was.
PUBLIC = [
    "CacheSpec", "CalibrationArtifacts", "KVDump", "KVTCCacheCodec", "MlxkvError", "Rope", "Settings", "Slot",
    "__version__", "attach", "calibrate", "detach", "load_cache", "make_cache", "method_preset", "model_preset",
    "read_dump", "save_cache", "write_dump",
]  # fmt: skip
# Public names as README and CHANGELOG had them, where they are now.
IN_MLXKV = {"KVTCCacheCodec": "mlxkv.CacheCodec", "Settings": "mlxkv.KVTCConfig"}
# Modules that have moved as they were, with names that they had.
MOVED = {
    "mlxkv.codec.entropy": ("mlxkv.codec.stages.entropy", "encode decode estimate histograms learn_tables Section"),
    "mlxkv.codec.payload": ("mlxkv.codec.stages.payload", "encode_block decode_block payload_size"),
    "mlxkv.codec.pca": ("mlxkv.codec.stages.pca", "principal_components"),
    "mlxkv.codec.rows": ("mlxkv.codec.stages.rows", "to_rows from_rows"),
    "mlxkv.live_files": ("mlxkv.live.serialization", "save_cache load_cache"),
    "mlxkv.lossless": ("mlxkv.io.lossless", "CODINGS MAX_EXPANSION encode decode is_plausible"),
    "mlxkv.metrics": (
        "mlxkv.evaluate.metrics",
        "relative_error layer_mse kl_divergence top1_agreement cosine perplexity",
    ),
    "mlxkv.miniatures": ("mlxkv.bundled.miniatures", "names model_path"),
    "mlxkv.quant_fidelity": ("mlxkv.integrations.quant_fidelity", "LiveMethod InChunks"),
    "mlxkv.resources": ("mlxkv.bundled.resources", "resource_dir"),
    "mlxkv.sketches": ("mlxkv.live.sketches", "Sketch CountMin CountSketch Race"),
    "mlxkv.smollm2": ("mlxkv.bundled.smollm2", "NAME INSTALL cache_home find_gguf model_path convert"),
    "mlxkv.targets": ("mlxkv.evaluate.targets", "compress_to_bytes quality_for_kl"),
}
# Modules whose names have changed or gone to several modules.
CHANGED = {
    "mlxkv.cache": {
        "CacheSpec": "mlxkv.CacheSpec",
        "KVDump": "mlxkv.KVDump",
        "MODES": "mlxkv.spec.MODES",
        "Rope": "mlxkv.Rope",
        "STREAMS": "mlxkv.spec.STREAMS",
        "Slot": "mlxkv.Slot",
        "Stream": "mlxkv.spec.Stream",
        "is_whole": "mlxkv.spec.is_int",
    },
    "mlxkv.clustering": {
        "Clusters": "mlxkv.live.clustering.Clusters",
        "OnlineClustering": "mlxkv.live.clustering.OnlineClustering",
        "Rules": "mlxkv.live.clustering.ClusteringConfig",
        "energy_loss": "mlxkv.live.clustering_error.misplaced_attention",
        "inserted": "mlxkv.live.clustering.insert",
        "pooled": "mlxkv.live.clustering.merge_by_owner",
        "shown": "mlxkv.live.clustering.visible_counts",
    },
    "mlxkv.codec.basis": {
        "Basis": "mlxkv.codec.stages.basis.Basis",
        "learn": "mlxkv.codec.stages.basis.learn_basis",
    },
    "mlxkv.codec.codec": {"KVTCCacheCodec": "mlxkv.CacheCodec"},
    "mlxkv.codec.kvtc": {
        "Coder": "mlxkv.codec.methods.kvtc.KVTCCoder",
        "Settings": "mlxkv.KVTCConfig",
        "StreamArtifacts": "mlxkv.codec.methods.kvtc.KVTCStream",
        "group_errors": "mlxkv.codec.methods.kvtc.group_errors",
        "train_stream": "mlxkv.codec.methods.kvtc.train_stream",
    },
    "mlxkv.codec.kvtc_rd": {
        "Coder": "mlxkv.codec.methods.kvtc_rd.KVTCRDCoder",
        "Settings": "mlxkv.KVTCRDConfig",
        "StreamArtifacts": "mlxkv.codec.methods.kvtc_rd.KVTCRDStream",
        "step_of": "mlxkv.codec.methods.kvtc_rd.step_size",
    },
    "mlxkv.codec.kvtc_weighted": {
        "Coder": "mlxkv.codec.methods.kvtc_weighted.KVTCWeightedCoder",
        "Settings": "mlxkv.codec.methods.kvtc_weighted.KVTCWeightedConfig",
        "StreamArtifacts": "mlxkv.codec.methods.kvtc_weighted.KVTCWeightedStream",
    },
    "mlxkv.codec.plan": {
        "CODED": "mlxkv.codec.stages.plan.CODED_TYPES",
        "Group": "mlxkv.codec.stages.plan.Group",
        "Plan": "mlxkv.codec.stages.plan.Plan",
        "SIZES": "mlxkv.codec.stages.plan.GROUP_SIZES",
        "allocate": "mlxkv.codec.stages.plan.allocate_bits",
        "cost": "mlxkv.codec.stages.plan.cost",
    },
    "mlxkv.codec.quantize": {
        "coded": "mlxkv.codec.stages.quantize.quantization_round_trip",
        "fit": "mlxkv.codec.stages.quantize.fit",
    },
    "mlxkv.codec.raw": {
        "ENDS": "mlxkv.codec.unquantized.CACHE_SECTIONS",
        "SINKS": "mlxkv.codec.unquantized.SINK_SECTIONS",
        "described": "mlxkv.codec.unquantized.read_description",
        "encode": "mlxkv.codec.unquantized.encode_array",
        "read": "mlxkv.codec.unquantized.read_array",
        "read_extra": "mlxkv.codec.unquantized.read_plain_array",
        "widened": "mlxkv.codec.unquantized.to_numpy",
    },
    "mlxkv.codec.weighting": {
        "gains": "mlxkv.codec.stages.weighting.attention_gains",
        "head_weights": "mlxkv.codec.stages.weighting.head_weights",
        "inverse": "mlxkv.codec.stages.weighting.invert_weights",
        "learn": "mlxkv.codec.stages.weighting.learn_weights",
        "learn_attention": "mlxkv.codec.stages.weighting.learn_attention_predictor",
        "weighted": "mlxkv.codec.stages.weighting.apply_weights",
    },
    "mlxkv.container": {
        "END": "mlxkv.io.container.END_MAGIC",
        "MAGIC": "mlxkv.io.container.MAGIC",
        "Reader": "mlxkv.io.container.Reader",
        "Section": "mlxkv.io.container.Section",
        "digest": "mlxkv.io.container.digest",
        "encode_section": "mlxkv.io.container.encode_section",
        "rest_of": "mlxkv.io.container.encode_tail",
        "write": "mlxkv.io.container.write",
    },
    "mlxkv.files": {
        "DUMP_VERSION": "mlxkv.dump.DUMP_VERSION",
        "atomic_write": "mlxkv.io.atomic.atomic_write",
        "finish_replacing": "mlxkv.io.growing.finish_interrupted_append",
        "open_input": "mlxkv.io.inputs.open_input",
        "parse_json": "mlxkv.io.inputs.parse_json",
        "read_dump": "mlxkv.read_dump",
        "read_npy": "mlxkv.io.npz.read_npy",
        "read_npz": "mlxkv.io.npz.read_npz",
        "replace_rest": "mlxkv.io.growing.replace_tail",
        "write_dump": "mlxkv.write_dump",
    },
    "mlxkv.lm": {"LIVE_TYPES": "mlxkv.lm.CACHE_DTYPES", "take": "mlxkv.lm.extract_cache"},
    "mlxkv.models": {"keys_and_values": "mlxkv.models.kv_slots"},
    "mlxkv.presets": {"live_settings": "mlxkv.live.seam.live_config", "names": "mlxkv.presets.preset_names"},
    "mlxkv.spec": {"fingerprint": "mlxkv.identity.fingerprint"},
}
METHODS = {
    "full": "Full", "h2o": "H2O", "int4": "Int4", "int8": "Int8", "kivi": "KIVI", "mp_kvm": "MPKVM", "random": "Random",
    "sketch_aggregate": "SketchAggregate", "sketch_topk": "SketchTopK", "sliding_window": "SlidingWindow",
    "smartkv": "SmartKV", "streaming_llm": "StreamingLLM",
}  # fmt: skip
CHANGED |= {
    f"mlxkv.methods.{file}": {
        "Cache": f"mlxkv.live.methods.{file}.{name}Cache",
        "Settings": f"mlxkv.live.methods.{file}.{name}Config",
    }
    for file, name in METHODS.items()
}
EVALUATIONS = {
    "attention": "Attention", "fidelity": "Fidelity", "latency": "Latency", "longbench": "LongBench", "memory": "Memory",
    "needle": "Needle", "perplexity": "Perplexity", "ruler": "Ruler", "text": "Text",
}  # fmt: skip
CHANGED |= {
    f"mlxkv.evaluate.{file}": {"Options": f"mlxkv.evaluate.tasks.{file}.{name}Options"}
    for file, name in EVALUATIONS.items()
}
RENAMED = [(module, old, new) for module, names in CHANGED.items() for old, new in names.items()]


@pytest.fixture(autouse=True)
def nothing_used_yet(monkeypatch):
    monkeypatch.setattr(_deprecated, "_warned", set())
    old = [f"mlxkv.{name}" for name in _deprecated.MODULES]
    for name in old:
        monkeypatch.delitem(sys.modules, name, raising=False)
        package, _, child = name.rpartition(".")
        monkeypatch.delattr(sys.modules.get(package), child, raising=False)
    yield
    for name in old:
        sys.modules.pop(name, None)


def resolved(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def used(use):
    """What a use returns, and the warnings of using it twice."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        first, second = use(), use()
    assert first is second
    assert all(warning.category is DeprecationWarning for warning in found)
    return first, found


def test_tables_name_every_module_that_has_moved():
    names = {f"mlxkv.{name}" for name in _deprecated.MODULES} - {"mlxkv.methods"}
    assert names == set(MOVED) | set(CHANGED) - {"mlxkv.lm", "mlxkv.models", "mlxkv.presets", "mlxkv.spec"}


def test_every_public_name_is_there():
    for name in PUBLIC:
        value, found = used(lambda name=name: getattr(mlxkv, name))
        assert value is not None
        expected = [f"mlxkv.{name} is called {IN_MLXKV[name]} now"] if name in IN_MLXKV else []
        assert [str(warning.message) for warning in found] == expected
        assert all(warning.filename == __file__ for warning in found), "where the name is used"


@pytest.mark.parametrize("old", MOVED)
def test_a_module_that_has_moved_warns_when_it_is_imported(old):
    new, names = MOVED[old]
    module, found = used(lambda: importlib.import_module(old))
    assert [str(warning.message) for warning in found] == [f"{old} is called {new} now"]
    for name in names.split():
        value, found = used(lambda name=name: getattr(module, name))
        assert value is resolved(f"{new}.{name}")
        assert not found


@pytest.mark.parametrize(("module", "old", "new"), RENAMED, ids=[f"{module}.{old}" for module, old, _ in RENAMED])
def test_a_name_that_has_changed_warns_when_it_is_used(module, old, new):
    value, found = used(lambda: getattr(importlib.import_module(module), old))
    assert [str(warning.message) for warning in found] == [f"{module}.{old} is called {new} now"]
    assert found[0].filename == __file__, "where the name is used"
    if old in ("KVTCCacheCodec", "Settings"):
        assert issubclass(value, resolved(new))  # takes old arguments as well
    else:
        assert value is resolved(new)


@pytest.mark.parametrize("module", ["mlxkv", "mlxkv.files", "mlxkv.metrics", "mlxkv.lm", "mlxkv.models"])
def test_other_names_are_errors_as_they_were(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(AttributeError, match="nonsense"):
            _ = importlib.import_module(module).nonsense


@pytest.mark.parametrize("name", ["mlxkv.nonsense", "mlxkv.codec.nonsense", "mlxkv.methods.nonsense"])
def test_other_modules_are_missing_as_they_were(name):
    with pytest.raises(ModuleNotFoundError, match="nonsense"):
        importlib.import_module(name)


STATEMENTS = {
    "from mlxkv import KVTCCacheCodec": "mlxkv.CacheCodec",
    "from mlxkv import Settings": "mlxkv.KVTCConfig",
    "import mlxkv.metrics": "mlxkv.evaluate.metrics",
    "from mlxkv import lossless": "mlxkv.io.lossless",
    "from mlxkv.sketches import CountMin, Race": "mlxkv.live.sketches",
    "from mlxkv.clustering import OnlineClustering": "mlxkv.live.clustering.OnlineClustering",
    "from mlxkv.files import atomic_write": "mlxkv.io.atomic.atomic_write",
    "from mlxkv.cache import KVDump": "mlxkv.KVDump",
    "from mlxkv.codec.codec import KVTCCacheCodec": "mlxkv.CacheCodec",
    "from mlxkv.codec.raw import encode": "mlxkv.codec.unquantized.encode_array",
    "from mlxkv.methods.h2o import Settings": "mlxkv.live.methods.h2o.H2OConfig",
    "from mlxkv.lm import take": "mlxkv.lm.extract_cache",
    "mlxkv.method_preset('h2o-96').settings": "MethodPreset.config",
}


def python(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_in_a_fresh_python_each_statement_warns_once_at_its_own_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("\n".join(["import mlxkv", *STATEMENTS, *STATEMENTS, "print('done')"]))
    done = python(script)
    assert done.stdout == "done\n", done.stderr
    lines = [line for line in done.stderr.splitlines() if "DeprecationWarning" in line]
    assert len(lines) == len(STATEMENTS), done.stderr
    for number, (line, new) in enumerate(zip(lines, STATEMENTS.values()), start=2):
        assert line.startswith(f"{script}:{number}: "), line
        assert f" is called {new}" in line


@pytest.mark.parametrize("statement", ["from mlxkv import Settings", "import mlxkv.metrics"])
def test_where_warnings_are_errors_an_old_name_is_one(statement):
    done = python("-W", "error", "-c", f"import mlxkv\n{statement}")
    assert done.returncode == 1
    assert f"is called {STATEMENTS[statement]} now" in done.stderr


def test_new_names_never_warn():
    code = "import mlxkv\nfor name in mlxkv.__all__: getattr(mlxkv, name)\nimport mlxkv.lm, mlxkv.models, mlxkv.sensitivity"
    done = python("-W", "error::DeprecationWarning:mlxkv", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def told(use):
    """What a use returns, and what it is told."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        return use(), [str(warning.message) for warning in found]


def test_settings_take_their_old_arguments(tmp_path):
    made, said = told(lambda: mlxkv.Settings(8, 20, None, 100, s=2, seed=1))
    assert made == KVTCConfig(8, rank=20, samples_per_file=100, sinks=2, seed=1)
    assert type(made) is KVTCConfig
    assert said == ["mlxkv.Settings is called mlxkv.KVTCConfig now", "the argument s of Settings is called sinks now"]
    write_dump(tmp_path / "a.npz", toy_dump())
    assert calibrate([tmp_path / "a.npz"], made).meta["s"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert mlxkv.Settings(8, None, None, None, 3) == mlxkv.Settings(8, sinks=3) == KVTCConfig(8, sinks=3)
        rd = importlib.import_module("mlxkv.codec.kvtc_rd").Settings(5000, None, 1)
        assert rd == KVTCRDConfig(basis_bytes=5000, sinks=1)
        live = importlib.import_module("mlxkv.methods.mp_kvm").Settings(window=48, preserve=2)
        assert live == MPKVMConfig(recent=48, sinks=2)
        with pytest.raises(InputError, match="sinks must be 0 or more"):
            mlxkv.Settings(8, s=-1)
        with pytest.raises(TypeError, match="nonsense"):
            mlxkv.Settings(8, nonsense=1)


def test_the_codec_takes_its_old_arguments_and_has_its_old_attributes(tmp_path):
    artifacts, dump = toy_artifacts(tmp_path), toy_dump(seed=9)
    old, said = told(lambda: mlxkv.KVTCCacheCodec(artifacts, w=16, s=2))
    sizes, more = told(lambda: (old.w, old.s))
    assert sizes == (16, 2)
    assert said + more == [
        "mlxkv.KVTCCacheCodec is called mlxkv.CacheCodec now",
        "the argument w of KVTCCacheCodec is called recent now",
        "the argument s of KVTCCacheCodec is called sinks now",
        "KVTCCacheCodec.w is called CacheCodec.recent now",
        "KVTCCacheCodec.s is called CacheCodec.sinks now",
    ]
    new = CacheCodec(artifacts, recent=16, sinks=2)
    assert isinstance(old, CacheCodec)
    assert old.compress_dump(dump) == new.compress_dump(dump)
    assert np.array_equal(
        old.decompress_dump(new.compress_dump(dump)).k, new.decompress_dump(old.compress_dump(dump)).k
    )
    with pytest.raises(TypeError, match="'w'"):
        CacheCodec(artifacts, w=16)


def test_the_quality_of_a_codec_changes_by_its_old_name(tmp_path):
    artifacts = rd_artifacts(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codec = mlxkv.KVTCCacheCodec(artifacts, 16)
    with pytest.warns(DeprecationWarning, match="at is called CacheCodec.with_quality") as found:
        changed = codec.at(50).at(60)
    assert len(found) == 1
    assert (changed.quality, codec.quality, type(changed)) == (60, 35, type(codec))


def test_files_are_written_and_read_by_old_names(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = importlib.import_module("mlxkv.files")
        files.write_dump(tmp_path / "a.npz", toy_dump())
        assert files.read_dump(tmp_path / "a.npz").length == 300
        assert set(files.read_npz(tmp_path / "a.npz")) >= {"k", "v", "tokens"}
        assert {"atomic_write", "read_dump", "KVDump"} <= set(files.__all__)
        with files.atomic_write(tmp_path / "b") as file:
            file.write(b"b")
    assert lm.extract_cache is lm.take
