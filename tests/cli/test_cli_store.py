"""What people see of the prompts that are kept, check and remove."""

import json
from io import StringIO

import pytest
from block_texts import insert, stops, text
from conftest import run

from mlxkv.cli import store as commands
from mlxkv.store.index import BlockStore

LISTING = ("ls", "du", "verify", "gc")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the store is by default."""
    monkeypatch.setenv("MLXKV_STORE", str(tmp_path / "prompts"))
    return tmp_path / "prompts"


@pytest.fixture
def stored(folder):
    """A conversation of model a, with a branch and a state, and one of model b: the chains of all three."""
    with BlockStore(folder) as store:
        first = insert(store, text(1, 2, (3, 200)), kind="system", model="a", state=300)
        branch = insert(store, text(1, 2, (4, 100)), kind="user", model="a")
        other = insert(store, text(5), model="b")
    return first, branch, other


def name(chain):
    return chain.name(len(chain)).hex()


def entry_ids(says):
    return [row["id"] for row in says("store", "ls")]


def damage(folder, chain, place):
    """Change one byte in the middle of a block's file."""
    digits = chain.name(place).hex()
    path = folder / "blocks" / digits[:2] / f"{digits}.mlxkv"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("command", [*LISTING, "rm"])
def test_looking_at_a_store_that_is_not_there_says_so_and_makes_none(command, folder, capsys):
    words = ["--all", "--yes"] if command == "rm" else []
    assert run("store", command, *words) == 0
    shown = capsys.readouterr()
    assert "nothing is stored in" in shown.err
    assert str(folder) in shown.err.replace("\n", "")
    assert run("store", command, *words, "--json") == 0
    json.loads(capsys.readouterr().out)
    assert not folder.exists()


@pytest.mark.parametrize("command", [*LISTING, "rm"])
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_was_named_has_to_be_one(command, there, tmp_path, capsys):
    path = tmp_path / "typo"
    if there:
        path.touch()
    assert run("store", command, *(["--all"] if command == "rm" else []), "--store", path) == 2
    assert ("is no folder" if there else "there is no folder") in capsys.readouterr().err
    assert path.exists() == there


@pytest.mark.parametrize("command", ["du", "gc", "verify"])
def test_what_is_told_for_machines_has_one_form_whether_anything_is_stored_or_not(command, folder, says):
    empty = says("store", command)
    with BlockStore(folder) as store:
        insert(store, text(1))
    assert {*says("store", command)} - {"folder"} == {*empty}


def test_a_row_of_the_table_of_entries_is_one_line_at_80_columns(stored, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("store", "ls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(stored) + 1


def test_entries_are_listed_with_what_they_share_the_last_one_used_first(stored, says, capsys):
    rows = says("store", "ls")
    assert [row["id"] for row in rows] == [name(chain) for chain in reversed(stored)]
    assert [(row["model"], row["kind"], row["tokens"]) for row in rows] == [
        ("b", "assistant", 512),
        ("a", "user", 1124),
        ("a", "system", 1224),
    ]
    other, branch, first = rows
    assert other["shared_bytes"] == 0
    assert branch["shared_bytes"] == first["shared_bytes"] > first["own_bytes"] > branch["own_bytes"] > 2000
    assert run("store", "ls") == 0
    table = capsys.readouterr().out
    assert all(name(chain)[:8] in table for chain in stored)


def test_only_the_newest_of_many_entries_are_in_the_table(folder, monkeypatch, capsys, says):
    monkeypatch.setattr(commands, "_ROWS", 3)
    with BlockStore(folder) as store:
        chains = [insert(store, text((word, 70)), size=10) for word in range(5)]
    assert run("store", "ls") == 0
    shown = capsys.readouterr()
    assert [name(chain)[:8] in shown.out for chain in chains] == [False, False, True, True, True]
    assert "2 that were used before" in shown.err
    assert len(says("store", "ls")) == 5


def test_usage_is_told_by_model_and_sums_up(stored, folder, says, capsys):
    facts = says("store", "du")
    models = {row["model"]: row for row in facts.pop("models")}
    assert {model: (row["coding"], row["blocks"], row["tokens"]) for model, row in models.items()} == {
        "a": ("exact", 4, 1324),
        "b": ("exact", 1, 512),
    }
    state = sum(path.stat().st_size for path in folder.glob("states/*/*"))
    assert state > 0
    assert sum(row["bytes"] for row in models.values()) + state == facts["stored_bytes"] == facts["ever_written_bytes"]
    assert (facts["entries"], facts["blocks"], facts["quarantined"]) == (3, 5, 0)
    assert facts["stored_bytes"] + facts["index_bytes"] < facts["taken_bytes"] < facts["limit_bytes"] == 20 * 10**9
    assert run("store", "du") == 0
    assert "exact" in capsys.readouterr().out


def test_a_folder_can_be_named_in_place_of_the_default_one(stored, folder, tmp_path, says, monkeypatch):
    elsewhere = folder.rename(tmp_path / "elsewhere")
    assert entry_ids(says) == []
    assert len(says("store", "ls", "--store", elsewhere)) == 3
    monkeypatch.delenv("MLXKV_STORE")
    monkeypatch.setenv("MLXKV_HOME", str(tmp_path))
    elsewhere.rename(tmp_path / "store")
    assert len(entry_ids(says)) == 3


def test_a_sound_store_is_verified(stored, says):
    facts = says("store", "verify")
    assert (facts["blocks"], facts["states"], facts["damaged"]) == (5, 1, [])
    assert facts["file_bytes"] == says("store", "du")["stored_bytes"]


def test_damage_goes_into_quarantine_with_exit_code_3_and_all_else_stays(stored, folder, says, capsys):
    first, branch, _ = stored
    damage(folder, first, 1224)
    assert run("store", "verify", "--json") == 3
    (bad,) = json.loads(capsys.readouterr().out)["damaged"]
    assert bad["id"] == name(first)
    assert bad["reason"]
    assert says("store", "verify")["damaged"] == []
    facts = says("store", "du")
    assert facts["quarantined"] == 1
    assert facts["quarantine_bytes"] > 2000
    with BlockStore(folder) as store:
        assert stops(store, first)[-1] == 1024
        assert stops(store, branch)[-1] == 1124
    damage(folder, branch, 512)
    assert run("store", "verify") == 3
    assert branch.name(512).hex()[:8] in capsys.readouterr().err


def test_a_sweep_removes_what_no_entry_knows(stored, folder, says):
    lost = folder / "blocks" / "00" / f"{'00' * 16}.mlxkv"
    lost.parent.mkdir(exist_ok=True)
    lost.write_bytes(bytes(5000))
    facts = says("store", "gc")
    assert (facts["unknown_files"], facts["unknown_bytes"], facts["removed_bytes"]) == (1, 5000, 0)
    assert not lost.exists()
    assert len(entry_ids(says)) == 3


def test_a_smaller_bound_removes_what_was_used_longest_ago(folder, says):
    with BlockStore(folder) as store:
        old, new = (insert(store, text(*words), size=2**20) for words in ((1, 2, 5), (3, 4)))
    facts = says("store", "gc", "--store-max", "5MB")
    assert facts["removed_bytes"] > 2**20
    assert facts["taken_bytes"] <= facts["limit_bytes"] == 5_000_000
    with BlockStore(folder) as store:
        assert store.limit == 5_000_000
        assert (stops(store, old), stops(store, new)) == ([512, 1024], [512, 1024]), "the end of the older one goes"


@pytest.mark.parametrize("size", ["5", "0GB", "many"])
def test_a_bound_of_no_use_is_refused(size, stored, says, capsys):
    assert run("store", "gc", "--store-max", size) == 2
    assert len(entry_ids(says)) == 3


def test_entries_are_removed_by_the_first_digits_of_their_ids(stored, folder, says):
    first, branch, other = stored
    facts = says("store", "rm", name(first)[:8], name(other).upper()[:9], "--yes")
    assert facts["removed"] == 2
    assert facts["freed_bytes"] > 4000
    assert entry_ids(says) == [name(branch)]
    with BlockStore(folder) as store:
        assert stops(store, first)[-1] == 1024, "what the branch shares stays"


def test_a_model_in_a_folder_goes_by_the_folders_name(folder, says, capsys):
    with BlockStore(folder) as store:
        for path in ("/models/one", "/models/two"):
            insert(store, text((len(path) + ord(path[-1]), 70)), size=10, model=path)
    assert {row["model"] for row in says("store", "ls")} == {"/models/one", "/models/two"}
    assert run("store", "ls") == 0
    assert "models" not in capsys.readouterr().out
    assert says("store", "rm", "--model", "one", "--yes")["removed"] == 1
    assert says("store", "rm", "--model", "/models/two", "--yes")["removed"] == 1
    assert run("store", "ls") == 0
    assert "no prompt is stored" in capsys.readouterr().err


def test_all_of_a_model_or_everything_is_removed(stored, folder, says):
    _, _, other = stored
    assert says("store", "rm", "--model", "a", "--yes")["removed"] == 2
    assert entry_ids(says) == [name(other)]
    assert says("store", "rm", "--all", "--yes")["removed"] == 1
    assert says("store", "du")["stored_bytes"] == 0
    assert not [*folder.glob("blocks/*/*")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "say what to remove"),
        (["--all", "--model", "a"], "say what to remove"),
        (["abcd", "--all"], "say what to remove"),
        (["zz"], "no entry begins with 'zz'"),
        ([""], "no entry begins"),
        (["--model", "c"], "nothing of 'c' is stored"),
        (["--all"], "nothing was removed"),
    ],
    ids=str,
)
def test_a_removal_that_is_not_clear_removes_nothing(words, told, stored, says, capsys):
    code = run("store", "rm", *words, *(["--yes"] if words != ["--all"] else []))
    assert (code, told in " ".join(capsys.readouterr().err.split())) == (2, True)
    assert len(entry_ids(says)) == 3


def test_digits_that_several_entries_begin_with_are_not_enough(folder, says, capsys):
    with BlockStore(folder) as store:
        for word in range(20):
            insert(store, text((word, 70)), size=10)
    digits = [row["id"][0] for row in says("store", "ls")]
    twice = next(digit for digit in digits if digits.count(digit) > 1)
    assert run("store", "rm", twice, "--yes") == 2
    assert f"{digits.count(twice)} entries begin with" in capsys.readouterr().err
    assert len(entry_ids(says)) == 20


@pytest.mark.parametrize(("answer", "left"), [("n\n", 3), ("y\n", 1)])
def test_somebody_at_a_terminal_is_asked(answer, left, stored, says, monkeypatch, capsys):
    typed = StringIO(answer)
    typed.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", typed)
    assert run("store", "rm", "--model", "a") == (0 if answer == "y\n" else 2)
    assert "removes 2 of its entries" in " ".join(capsys.readouterr().err.split())
    assert len(entry_ids(says)) == left


@pytest.mark.parametrize("command", LISTING)
def test_a_folder_of_something_else_is_refused(command, tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("Dear")
    for path in (tmp_path / "letters", tmp_path / "letters" / "dear.txt"):
        assert run("store", command, "--store", path) == 2
        assert str(path) in capsys.readouterr().err.replace("\n", "")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["dear.txt"]


def test_everything_can_be_asked_while_the_store_is_in_use(folder, says):
    with BlockStore(folder) as store:
        chain = insert(store, text(1, 2))
        assert [len(says("store", "ls")), says("store", "verify")["blocks"]] == [1, 2]
        says("store", "gc")
        insert(store, text(1, 2, 3))
        says("store", "rm", "--all", "--yes")
        assert stops(store, chain) == []
        insert(store, text(1, 2))
        assert stops(store, chain)[-1] == 1024
