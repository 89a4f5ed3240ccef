"""What is learnt from prompts while nobody asks: of which texts, for whom, and when not."""

import time
from typing import ClassVar

import pytest
from servers import serving
from talking import talker_folder

from mlxkv.serving import generation
from mlxkv.store import learning

TEXTS = [
    "A sailor told a long story about the sea and its storms. " * 3,
    "Bread is made of flour, water, salt and time. " * 4,
]


class Pupil:
    """What stands for `Learning`, and writes down what it is given."""

    made: ClassVar[list] = []

    def __init__(self, model, **given):
        self.model, self.given, self.steps, self.closed = model, given, 0, 0
        self.made.append(self)

    def step(self):
        self.steps += 1
        return False

    def statistics(self):
        return {"state": "waiting", "of": id(self)}

    def close(self):
        self.closed += 1


@pytest.fixture
def pupils(monkeypatch):
    monkeypatch.setattr(learning, "Learning", Pupil)
    monkeypatch.setattr(generation, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(Pupil, "made", [])
    return Pupil.made


def test_a_model_learns_from_its_own_stored_prompts_the_newest_first(pupils, tmp_path):
    folder = talker_folder(tmp_path / "model")
    with serving(folder, folder=tmp_path / "store", quality=50.0) as client:
        for text in TEXTS:
            client.complete(text, 2)
        (pupil,) = pupils
        deadline = time.monotonic() + 20
        while len(read := list(pupil.given["prompts"]())) < 2 or not pupil.steps:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        read = [pupil.given["tokenizer"].decode(tokens) for tokens in read]
        assert [text[:40] for text in read] == [text[:40] for text in TEXTS[::-1]]
        assert all(len(text) > 100 for text in read)
        assert pupil.given["quality"] == 50.0
        assert pupil.given["fingerprint"].count(".") == 1
        assert client.get("/v1/mlxkv/store")["learning"] == pupil.statistics()
        pupil.given["ready"](None)
        other = talker_folder(tmp_path / "other", seed=3)
        client.complete("x", 1, model=str(other))
        assert pupil.closed == 1
        assert len(pupils) == 2
        assert list(pupils[1].given["prompts"]()) == []
    assert pupils[1].closed == 1


@pytest.mark.parametrize("options", [{"calibrate": False}, {"exact": True}, {"store": False}])
def test_nothing_is_learnt_where_nothing_would_use_it(pupils, tmp_path, options):
    folder = {} if "store" in options else {"folder": tmp_path / "store"}
    with serving(talker_folder(tmp_path / "model"), **folder, **options) as client:
        assert client.complete("x", 1)
        assert client.get("/v1/mlxkv/store")["learning"] is None
    assert pupils == []
