"""Artifacts in the user's data folder: found by model, kept beside each other, and skipped where they are damaged."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from forging import forge, header_of
from synthetic import toy_dump

from mlxkv import CacheCodec, CalibrationArtifacts
from mlxkv.codec import library
from mlxkv.errors import InputError, LibraryWarning, MismatchError, MlxkvError, WeakFingerprintWarning
from mlxkv.io import entries

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDEN = {name: CalibrationArtifacts.from_dir(FIXTURES / name / "artifacts") for name in ("golden", "golden_rd")}
DUMP = toy_dump(length=40)
TOY = DUMP.spec


def of(model, name="golden", **arrays):
    """Artifacts of a fixture, as if they were learnt from this model."""
    found = GOLDEN[name]
    k = replace(found.k, mu=found.k.mu + arrays["shift"]) if arrays else found.k
    return replace(found, k=k, meta={**found.meta, "model_fingerprint": model})


@pytest.fixture
def home():
    """An empty library, which does not exist yet."""
    return library.home()


def made(folder, seconds):
    """Set when an entry was added."""
    os.utime(folder / "meta.json", (seconds, seconds))
    return folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MLXKV_ARTIFACTS": "/a", "MLXKV_HOME": "/b"}, "/a"),
        ({"MLXKV_HOME": "/b"}, "/b/artifacts"),
        ({"XDG_DATA_HOME": "/c"} if sys.platform == "linux" else {}, ".*/mlxkv/artifacts"),
    ],
)
def test_the_library_is_where_the_user_says_or_among_the_data_of_the_user(variables, expected, monkeypatch):
    for name in ("MLXKV_ARTIFACTS", "MLXKV_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Path(expected) == library.home() or library.home().match("mlxkv/artifacts")


def test_where_there_is_no_library_nothing_is_found_and_none_is_made(home):
    assert library.find("f00d") is None
    assert library.items() == []
    assert not home.exists()


def test_what_is_added_is_found_by_its_model_alone(home):
    assert library.add(of("a.1")) == home / of("a.1").fingerprint
    assert library.find("a.1").fingerprint == GOLDEN["golden"].fingerprint
    assert library.find("b.1") is None
    assert library.find("a.1", "kvtc-rd") is None
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_of_several_the_newest_is_written_with_and_all_are_there_to_read_with(home):
    first, second = of("a.1"), of("a.1", shift=1)
    made(library.add(first), 1000)
    made(library.add(second), 2000)
    assert library.find("a.1").fingerprint == second.fingerprint
    assert [item.fingerprint for item in library.items()] == [second.fingerprint, first.fingerprint]
    library.add(first)  # calibrated again, to the same
    assert library.find("a.1").fingerprint == first.fingerprint
    assert len(library.items()) == 2


def test_an_item_says_what_its_meta_json_says(home):
    folder = made(library.add(of("a.1")), 1000)
    (item,) = library.items()
    assert item.nbytes == sum(path.stat().st_size for path in folder.iterdir())
    assert item[:3] == (GOLDEN["golden"].fingerprint, folder, 1000)
    assert item[4:] == ("", "kvtc", "golden", "a.1", None)


def test_a_listing_reads_no_array(home, monkeypatch):
    library.add(of("a.1"))
    read = []
    monkeypatch.setattr(entries, "read_bytes", lambda path, limit: read.append(path.name) or path.read_bytes())
    monkeypatch.setattr(CalibrationArtifacts, "from_dir", None)
    assert [item.method for item in library.items()] == ["kvtc"]
    assert read == ["meta.json"]


def test_full_fingerprints_come_before_weak_ones_which_are_used_with_a_note(home):
    weak, full = of("a", shift=1), of("a.1")
    library.add(full)
    library.add(weak)
    assert library.find("a.1").fingerprint == full.fingerprint
    with pytest.warns(WeakFingerprintWarning):
        assert library.find("a.2").fingerprint == weak.fingerprint


def test_artifacts_that_name_no_model_are_of_none(home):
    library.add(of(""))
    assert library.find("") is None


def without(name):
    return lambda folder: (folder / name).unlink()


def written(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def changed(key, value):
    def change(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, key: value}))

    return change


def fifo(folder):
    (folder / "meta.json").unlink()
    os.mkfifo(folder / "meta.json")


DAMAGE = {
    "no meta.json": without("meta.json"),
    "an empty meta.json": written("meta.json", b""),
    "a list": written("meta.json", b"[]"),
    "nested a million times": written("meta.json", b'{"a":' + b"[" * 10**6),
    "no UTF-8": written("meta.json", b"\xff\xfe\x00"),
    "a pipe": fifo,
    "no array": without("k_mu.npy"),
    "another array": written("k_mu.npy", b"\x93NUMPY" + bytes(100)),
    "another version": changed("version", 99),
    "an unknown method": changed("method", "pickle"),
    "another fingerprint": changed("fingerprint", "0" * 32),
    "no fingerprint": changed("fingerprint", None),
    "no spec": changed("spec", {}),
    "no checksums": changed("checksums", []),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_skipped_with_a_note_and_the_older_one_is_found(damage, home):
    older, newer = of("a.1"), of("a.1", shift=1)
    made(library.add(older), 1000)
    DAMAGE[damage](library.add(newer))
    with pytest.warns(LibraryWarning, match=rf"artifacts {newer.fingerprint[:8]} .* are skipped"):
        assert library.find("a.1").fingerprint == older.fingerprint
    assert len(library.items()) == 2


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_put_right_by_adding_it_again_and_can_be_removed(damage, home):
    DAMAGE[damage](library.add(of("a.1")))
    library.add(of("a.1"))
    assert library.find("a.1").fingerprint == GOLDEN["golden"].fingerprint
    DAMAGE[damage](home / GOLDEN["golden"].fingerprint)
    library.remove(GOLDEN["golden"].fingerprint[:8])
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    "value", [None, 3, [1], {"a": 1}, "x" * 10**6, True, "\x1b[31m\u202e"], ids=lambda value: repr(value)[:10]
)
@pytest.mark.parametrize("key", ["method", "model", "model_fingerprint", "calibration_tokens"])
def test_any_value_in_a_meta_json_can_be_listed(key, value, home):
    changed(key, value)(library.add(of("a.1")))
    (item,) = library.items()
    assert all(isinstance(text, str) and len(text) <= 200 for text in item[5:8])
    assert item.tokens is None or item.tokens == value


def test_adding_artifacts_again_that_tell_more_of_themselves_adds_what_they_tell(home):
    folder = library.add(of("a.1"))
    more = of("a.1")
    more.meta["klt"] = {"version": 1}
    assert library.add(more) == folder
    assert library.add(of("a.1")) == folder  # which tell less, and take nothing away
    assert library.find("a.1").meta["klt"] == {"version": 1}


def test_whatever_else_lies_in_the_folder_is_no_entry(home):
    library.add(of("a.1"))
    (home / ".DS_Store").write_bytes(b"x")
    (home / ("a" * 32)).write_bytes(b"a file")
    (home / ("b" * 32)).symlink_to(FIXTURES / "golden" / "artifacts")
    (home / "old").mkdir()
    assert [item.fingerprint for item in library.items()] == [GOLDEN["golden"].fingerprint]
    library.add(of("a.2", "golden_rd"))
    assert library.find("a.2").method_name == "kvtc-rd"


def test_what_killed_processes_left_is_swept_by_the_next_change(home):
    folder = library.add(of("a.1"))
    for name in ("0" * 32, folder.name):
        shutil.copytree(folder, home / f".{name}.{'f' * 16}.tmp")
    library.add(of("a.2", "golden_rd"))
    assert sorted(path.name for path in home.iterdir()) == sorted(item.fingerprint for item in library.items())


def test_a_library_that_cannot_be_written_still_gives_what_it_has(home, monkeypatch):
    folder = library.add(of("a.1"))

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "rename", "utime"):
        monkeypatch.setattr(os, name, refused)
    assert library.find("a.1") is not None
    assert library.add(of("a.1")) == folder
    with pytest.raises(InputError, match=r"Read-only.*MLXKV_ARTIFACTS"):
        library.add(of("a.1", shift=1))
    with pytest.raises(InputError, match=r"cannot remove.*Read-only"):
        library.remove(folder.name)


@pytest.mark.parametrize("place", ["below", "itself"])
def test_a_library_that_cannot_be_made_is_said_with_the_way_out(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MLXKV_ARTIFACTS", str(tmp_path / "file" / ("deep" if place == "below" else "")))
    with pytest.raises(InputError, match="MLXKV_ARTIFACTS"):
        library.add(of("a.1"))
    with pytest.warns(LibraryWarning, match="cannot read"):
        assert library.find("a.1") is None


MANY = """
from test_library import of
from mlxkv.codec import library
from mlxkv.io import entries
for n in range(6):
    library.add(of("a.1", shift=n))
    assert library.find("a.1") is not None
"""


def test_two_processes_that_add_the_same_both_come_through(home):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, FIXTURES.parent)))}
    others = [subprocess.Popen([sys.executable, "-c", MANY], env=environment) for _ in range(2)]
    assert [process.wait() for process in others] == [0, 0]
    assert {item.fingerprint for item in library.items()} == {of("a.1", shift=n).fingerprint for n in range(6)}
    assert len(list(home.iterdir())) == 6


def test_a_model_without_artifacts_is_written_with_direct_and_with_what_is_asked_for():
    found = library.for_model(TOY, "a.1", "toy")
    assert (found.method_name, found.meta["model"], found.meta["model_fingerprint"]) == ("direct", "toy", "a.1")
    assert library.for_model(TOY, "a.1", method="exact").method_name == "exact"
    with pytest.raises(
        InputError, match=r"no artifacts of toy for kvtc-rd; mlxkv calibrate --model toy --method kvtc-rd"
    ):
        library.for_model(TOY, "a.1", "toy", "kvtc-rd")
    with pytest.raises(InputError, match="did you mean kvtc"):
        library.for_model(TOY, "a.1", "toy", "kvtd")
    assert library.items() == []


def test_a_model_with_artifacts_is_written_with_them_unless_another_method_is_asked_for(home):
    library.add(of("a.1", "golden_rd"))
    spec = GOLDEN["golden_rd"].spec
    chosen = {name: library.for_model(spec, "a.1", "toy", name).method_name for name in (None, "kvtc-rd", "exact")}
    assert chosen == {None: "kvtc-rd", "kvtc-rd": "kvtc-rd", "exact": "exact"}
    with pytest.raises(InputError, match="there are no artifacts of toy for kvtc;"):
        library.for_model(spec, "a.1", "toy", "kvtc")


def test_artifacts_that_describe_the_model_otherwise_are_not_written_with(home):
    library.add(of("a.1"))
    with pytest.warns(LibraryWarning, match="describe the layers, heads or rotation"):
        assert library.for_model(TOY, "a.1", "toy").method_name == "direct"


@pytest.mark.parametrize("method", ["direct", "exact"])
def test_a_file_without_calibration_needs_no_library(method, tmp_path):
    codec = CacheCodec(library.for_model(TOY, "f00d.cafe", "a/toy", method))
    (tmp_path / "a.mlxkv").write_bytes(codec.compress_dump(DUMP))
    found = library.for_file(tmp_path / "a.mlxkv")
    assert found.fingerprint == codec.artifacts.fingerprint
    assert CacheCodec(found).decompress_dump(tmp_path / "a.mlxkv").tokens.tolist() == DUMP.tokens.tolist()


def test_a_file_is_read_with_the_artifacts_it_names_whatever_was_calibrated_since(home):
    for name in GOLDEN:
        library.add(GOLDEN[name])
    library.add(of("f00d", shift=1))
    for name, artifacts in GOLDEN.items():
        (file,) = (FIXTURES / name).glob("*.mlxkv")
        assert library.for_file(file).fingerprint == artifacts.fingerprint


def test_a_file_whose_artifacts_are_not_here_says_which_model_it_is_of_and_what_to_do(home, tmp_path):
    (file,) = (FIXTURES / "golden_rd").glob("*.mlxkv")
    message = rf"artifacts {GOLDEN['golden_rd'].fingerprint[:8]} of .*, which are not in {home}"
    with pytest.raises(MismatchError, match=message) as error:
        library.for_file(file)
    assert "mlxkv artifacts export bc86cdbd --out FOLDER" in error.value.hint
    DAMAGE["no array"](library.add(GOLDEN["golden_rd"]))
    with pytest.raises(InputError, match=r"cannot read .*k_mu.npy"):
        library.for_file(file)


@pytest.mark.parametrize("name", ["../golden/artifacts", "/etc", "", None, 3, "0" * 31, ["a"]])
def test_a_file_may_name_anything_and_leads_to_the_library_alone(name, tmp_path):
    (file,) = (FIXTURES / "golden_rd").glob("*.mlxkv")
    header, body = header_of(file.read_bytes())
    (tmp_path / "a.mlxkv").write_bytes(forge({**header, "artifacts": name}, body))
    with pytest.raises(MismatchError, match="was made with artifacts"):
        library.for_file(tmp_path / "a.mlxkv")


def test_an_exported_folder_is_imported_as_it_was(home, tmp_path, monkeypatch):
    library.add(of("a.1", "golden_rd"))
    item = library.export("bc86", tmp_path / "out")
    monkeypatch.setenv("MLXKV_ARTIFACTS", str(tmp_path / "elsewhere"))
    assert library.find("a.1") is None
    assert library.import_folder(tmp_path / "out") == tmp_path / "elsewhere" / item.fingerprint
    assert library.items()[0][3:] == item[3:]
    assert library.find("a.1").fingerprint == item.fingerprint
    with pytest.raises(InputError, match="holds artifacts"):
        library.export("bc86", tmp_path / "out")


@pytest.mark.parametrize("damage", DAMAGE)
def test_nothing_damaged_is_imported(damage, home, tmp_path):
    shutil.copytree(FIXTURES / "golden_rd" / "artifacts", tmp_path / "in")
    DAMAGE[damage](tmp_path / "in")
    with pytest.raises(MlxkvError):
        library.import_folder(tmp_path / "in")
    assert library.items() == []


def test_an_id_is_as_long_as_it_has_to_be(home):
    library.add(of("a.1"))
    name = GOLDEN["golden"].fingerprint
    twin = name[:20] + ("0" if name[20] != "0" else "1") + name[21:]
    shutil.copytree(home / name, home / twin)
    items = library.items()
    assert {library.short_id(item, items) for item in items} == {name[:21], twin[:21]}
    assert library.resolve(name[:21]).fingerprint == name
    with pytest.raises(InputError, match=rf"2 artifacts: .*{name[:21]}"):
        library.resolve(name[:20])
    for beginning in ("", "g", name + "0", "../" + name):
        with pytest.raises(InputError, match="there are no artifacts"):
            library.resolve(beginning)
