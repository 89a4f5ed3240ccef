import errno
import json
import os
import shutil

import numpy as np
import pytest
from synthetic import DUAL, LATENT, PLAIN, toy_artifacts, toy_dump

from mlxkv.codec import artifacts as artifacts_module
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.kvtc import KVTCConfig, KVTCStream
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages.plan import Group, Plan
from mlxkv.dump import KVDump, write_dump
from mlxkv.errors import ChecksumError, FormatError, InputError, MismatchError, VersionError
from mlxkv.io import folders

SPECS = {"dual": DUAL, "latent": LATENT}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return {name: toy_artifacts(tmp_path_factory.mktemp(name), spec) for name, spec in SPECS.items()}


@pytest.mark.parametrize("name", SPECS)
def test_artifacts_survive_their_folder(calibrated, tmp_path, name):
    before = calibrated[name]
    before.save(tmp_path)
    after = CalibrationArtifacts.from_dir(tmp_path)
    for stream in "kv":
        a, b = before.stream(stream), after.stream(stream)
        assert (a.mu.tobytes(), a.V.tobytes(), a.V.shape, a.plan) == (b.mu.tobytes(), b.V.tobytes(), b.V.shape, b.plan)
    assert (after.spec, after.fingerprint, after.nbytes) == (before.spec, before.fingerprint, before.nbytes)
    assert after.meta["compression_ratio"] == 4.0
    dump = toy_dump(before.spec)
    blob = CacheCodec(before).compress_dump(dump)
    assert np.array_equal(CacheCodec(after).decompress_dump(blob).k, CacheCodec(before).decompress_dump(blob).k)


def test_the_v_artifacts_of_a_single_stream_are_empty(calibrated, tmp_path):
    calibrated["latent"].save(tmp_path)
    assert json.loads((tmp_path / "v_plan.json").read_text()) == {"groups": []}
    assert np.load(tmp_path / "v_mu.npy").shape == (0,)
    assert np.load(tmp_path / "v_V.npy").shape == (0, 0)
    assert (tmp_path / "v_V.npy").stat().st_size < 200


@pytest.mark.parametrize("file_name", ["k_mu.npy", "k_V.npy", "k_plan.json", "v_mu.npy", "v_V.npy", "v_plan.json"])
def test_a_tampered_artifact_is_refused(calibrated, tmp_path, file_name):
    calibrated["dual"].save(tmp_path)
    data = bytearray((tmp_path / file_name).read_bytes())
    data[-3] ^= 1
    (tmp_path / file_name).write_bytes(data)
    with pytest.raises(ChecksumError, match=file_name):
        CalibrationArtifacts.from_dir(tmp_path)
    (tmp_path / file_name).unlink()
    with pytest.raises(InputError, match=file_name):
        CalibrationArtifacts.from_dir(tmp_path)


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"version": 2}, VersionError),
        ({"spec": PLAIN.to_json()}, ChecksumError),
        ({"spec": LATENT.to_json()}, MismatchError),
        ({"spec": 3}, FormatError),
        ({"spec": None}, FormatError),
        ({"fingerprint": "0"}, ChecksumError),
        ({"checksums": {}}, ChecksumError),
        ({"checksums": 3}, ChecksumError),
    ],
)
def test_a_tampered_meta_is_refused(calibrated, tmp_path, changes, error):
    calibrated["dual"].save(tmp_path)
    edit_meta(tmp_path, **changes)
    with pytest.raises(error):
        CalibrationArtifacts.from_dir(tmp_path)


def test_a_folder_without_artifacts_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"no meta\.json"):
        CalibrationArtifacts.from_dir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot make"):
        CalibrationArtifacts.save(toy_artifacts(tmp_path, seeds=(0,)), tmp_path / "file")


@pytest.fixture
def others(tmp_path_factory):
    return toy_artifacts(tmp_path_factory.mktemp("others"), ratio=5.0, seeds=(3, 4, 5))


def test_artifacts_are_replaced_only_when_asked(calibrated, others, tmp_path):
    folder, old = tmp_path / "artifacts", calibrated["dual"]
    old.save(folder)
    with pytest.raises(InputError, match=r"without which files made with them cannot be read.*--overwrite"):
        others.save(folder)
    assert CalibrationArtifacts.from_dir(folder).fingerprint == old.fingerprint
    folder.chmod(0o750)
    (folder / ".k_mu.npy.123.tmp").touch()  # an older version left that
    others.save(folder, overwrite=True)
    assert CalibrationArtifacts.from_dir(folder).fingerprint == others.fingerprint
    assert (os.listdir(tmp_path), folder.stat().st_mode & 0o777) == (["artifacts"], 0o750)
    assert sorted(path[:2] for path in os.listdir(folder)) == ["k_", "k_", "k_", "me", "v_", "v_", "v_"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_anything_else_is_left_as_it_is(calibrated, tmp_path, overwrite):
    for name in ("notes.txt", "k_mu", ".git"):
        folder = tmp_path / f"with {name}"
        calibrated["dual"].save(folder)
        (folder / name).touch()
        before = sorted(os.listdir(folder))
        with pytest.raises(InputError, match=f"it holds '{name}', something else"):
            calibrated["dual"].save(folder, overwrite=overwrite)
        assert sorted(os.listdir(folder)) == before


def test_artifacts_go_where_a_link_leads_and_into_an_empty_folder(calibrated, others, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    calibrated["dual"].save(tmp_path / "link")
    others.save(tmp_path / "link", overwrite=True)
    assert CalibrationArtifacts.from_dir(tmp_path / "real").fingerprint == others.fingerprint
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_the_current_folder_is_not_replaced(calibrated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="current folder"):
        calibrated["dual"].save(".")


def test_artifacts_are_not_replaced_where_that_cannot_be_done_at_once(calibrated, tmp_path, monkeypatch):
    calibrated["dual"].save(tmp_path / "a")

    def refuse(*_):
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(folders, "exchange", refuse)
    with pytest.raises(InputError, match="cannot replace a folder at once"):
        calibrated["dual"].save(tmp_path / "a", overwrite=True)
    assert os.listdir(tmp_path) == ["a"]


def test_artifacts_that_appear_while_others_are_written_are_not_replaced(calibrated, others, tmp_path, monkeypatch):
    really = folders.sweep
    monkeypatch.setattr(folders, "sweep", lambda path: [monkeypatch.undo(), others.save(path), really(path)])
    with pytest.raises(InputError, match="cannot write"):
        calibrated["dual"].save(tmp_path / "a")
    assert CalibrationArtifacts.from_dir(tmp_path / "a").fingerprint == others.fingerprint
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("times", [1, 2])  # the second folder may get the number that the old one had
@pytest.mark.parametrize("steps", range(8))
def test_artifacts_replaced_while_they_are_read_are_read_as_the_old_or_the_new(
    calibrated, others, tmp_path, monkeypatch, steps, times
):
    folder, done = tmp_path / "a", []
    calibrated["dual"].save(folder)
    really = artifacts_module.read_bytes

    def replaced_meanwhile(path, *limit):
        for _ in range(times if len(done) == steps else 0):
            others.save(folder, overwrite=True)
        done.append(path)
        return really(path, *limit)

    monkeypatch.setattr(artifacts_module, "read_bytes", replaced_meanwhile)
    found = CalibrationArtifacts.from_dir(folder).fingerprint
    assert found == (calibrated["dual"] if steps > 6 else others).fingerprint


def test_a_file_of_another_calibration_is_refused(calibrated, tmp_path):
    calibrated["dual"].save(tmp_path / "a")
    toy_artifacts(tmp_path, ratio=5.0).save(tmp_path / "b")
    for name in ("k_V.npy", "meta.json"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        shutil.copy(tmp_path / "b" / name, tmp_path / name / name)
        with pytest.raises(ChecksumError):
            CalibrationArtifacts.from_dir(tmp_path / name)


def test_artifacts_check_their_shapes():
    mu, V, plan = np.zeros(8, np.float32), np.zeros((8, 1), np.float16), Plan((Group(1, "int4"),))
    KVTCStream(mu, V, plan)
    wrong = [
        (mu[:7], V, plan),
        (mu, V[:, :0], plan),
        (mu, V, Plan()),
        (mu.astype(np.float64), V, plan),
        (mu, V.astype(np.float32), plan),
    ]
    wrong += [(mu, V[:, :0], Plan()), (mu, V, Plan((Group(1, "none"),))), (mu[:, None], V, plan), (mu, V[:, 0], plan)]
    for arguments in wrong:
        with pytest.raises(FormatError):
            KVTCStream(*arguments)


def test_dumps_of_two_models_are_refused(tmp_path):
    for index, other in enumerate([toy_dump(fingerprint="beef"), toy_dump(PLAIN)]):
        write_dump(tmp_path / "a.npz", toy_dump())
        write_dump(tmp_path / f"b{index}.npz", other)
        with pytest.raises(MismatchError, match=f"b{index}"):
            calibrate([tmp_path / "a.npz", tmp_path / f"b{index}.npz"], KVTCConfig(compression_ratio=4))


def test_calibration_is_deterministic_and_stays_within_budget(tmp_path):
    first, again = toy_artifacts(tmp_path), toy_artifacts(tmp_path)
    assert first.fingerprint == again.fingerprint
    for name in "kv":
        part = first.stream(name)
        assert part.plan.bits <= 16 * 48 / 4
        assert np.abs(part.V.astype(np.float64).T @ part.V - np.eye(part.plan.rank)).max() < 2e-3


def test_a_bit_budget_and_a_rank_bound_the_plan(tmp_path):
    assert toy_artifacts(tmp_path, max_bit_budget=100).k.plan.bits <= 100
    assert toy_artifacts(tmp_path, rank=3).k.plan.rank <= 3


def test_sinks_are_left_out_of_calibration(tmp_path):
    wild, tame = toy_dump(), toy_dump()
    wild.k[..., :4, :] = 1000.0
    write_dump(tmp_path / "wild.npz", wild)
    write_dump(tmp_path / "tame.npz", tame)
    found = [
        calibrate([tmp_path / name], KVTCConfig(compression_ratio=4)).fingerprint for name in ("wild.npz", "tame.npz")
    ]
    assert found[0] == found[1]
    assert calibrate([tmp_path / "wild.npz"], KVTCConfig(compression_ratio=4, sinks=3)).fingerprint != found[0]


def test_samples_are_spread_over_a_file(tmp_path):
    write_dump(tmp_path / "a.npz", toy_dump())
    found = calibrate([tmp_path / "a.npz"], KVTCConfig(compression_ratio=4, samples_per_file=50))
    assert found.meta["calibration_tokens"] == 50


@pytest.mark.parametrize(
    "settings",
    [
        {"compression_ratio": 0},
        {"compression_ratio": -1.0},
        {"compression_ratio": float("nan")},
        {"compression_ratio": 4, "rank": 0},
        {"compression_ratio": 4, "max_bit_budget": -5},
        {"compression_ratio": 4, "samples_per_file": 0},
        {"compression_ratio": 4, "sinks": -1},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InputError):
        KVTCConfig(**settings)


@pytest.mark.parametrize("settings", [{"compression_ratio": 1e6}, {"compression_ratio": 4, "sinks": 299}])
def test_calibration_that_leaves_nothing_is_refused(tmp_path, settings):
    write_dump(tmp_path / "a.npz", toy_dump())
    with pytest.raises(InputError):
        calibrate([tmp_path / "a.npz"], KVTCConfig(**settings))
    with pytest.raises(InputError, match="at least one"):
        calibrate([], KVTCConfig(**settings))


def test_a_cache_with_values_that_are_not_finite_is_refused_by_calibration(tmp_path):
    dump = toy_dump()
    dump.v[1, 0, 0, 50, 2] = np.nan
    write_dump(tmp_path / "nan.npz", KVDump(dump.k, dump.v, DUAL, dump.tokens))
    with pytest.raises(InputError, match="NaN"):
        calibrate([tmp_path / "nan.npz"], KVTCConfig(compression_ratio=4))
