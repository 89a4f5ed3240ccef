"""Running an evaluation: samples by seed and limit, going on after a stop, and what a table says."""

import json
import os
import resource
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mlxkv.config import Config
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.evaluate import journal as journals
from mlxkv.evaluate import runner, statistics
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, evaluations, option
from mlxkv.evaluate.journal import Journal
from mlxkv.evaluate.runner import draw_samples, run
from mlxkv.evaluate.variants import CachedContext, Variant


@dataclass(frozen=True)
class Options(Config):
    depth: int = option(1, "of it")


MEASURED = []  # by the evaluation that takes the place of all others, in order


class AnyEvaluation(Evaluation):
    """Ten samples in two groups."""

    options_class = Options
    scores = ("score",)

    def samples(self, tokenizer, seed):
        return [self.sample(seed, number) for number in range(10)]

    def sample(self, seed, number):
        def measure(model, tokenizer, variants):
            records = []
            for variant in variants:
                variant.build(model, [1])
                MEASURED.append((seed, number, variant.name))
                records.append({"variant": variant.name, "ratio": 2.0, "score": number + 10 * len(records)})
            return records

        return EvalSample({"number": number, "seed": seed}, measure, group="odd" if number % 2 else "even")


@pytest.fixture
def asked(monkeypatch):
    """What was measured, in order."""
    MEASURED.clear()
    monkeypatch.setitem(evaluations._things, "any", AnyEvaluation)
    monkeypatch.setattr(runner, "baseline", lambda: WHOLE)
    return MEASURED


def held(model, tokens, exact=None):
    return CachedContext([], {})


WHOLE = Variant("whole", {}, held)
OTHER = Variant("other", {"size": 3}, held)


def test_each_seed_draws_its_own_of_a_limit(asked):
    drawn = [unit.key for unit in draw_samples(AnyEvaluation(Options()), None, seeds=3, limit=2)]
    assert len({tuple(key["number"] for key in drawn if key["seed"] == seed) for seed in range(3)}) == 3


def test_samples_of_a_variant_of_other_settings_are_refused(asked, tmp_path):
    with Journal(tmp_path / "partial", {}) as journal:
        run("any", None, None, [OTHER], journal=journal)
    changed = Variant("other", {"size": 4}, held)
    with Journal(tmp_path / "partial", {}) as journal, pytest.raises(MismatchError, match="another variants"):
        run("any", None, None, [changed], journal=journal)


def test_facts_that_an_older_journal_does_not_have_are_another_run(tmp_path):
    with Journal(tmp_path / "partial", {"model": "m"}) as journal:
        journal.begin({})
    newer = Journal(tmp_path / "partial", {"model": "m", "files": {}})
    with newer as journal, pytest.raises(MismatchError, match="another files"):
        journal.begin({})


def test_every_sample_is_asked_of_the_whole_cache_first(asked):
    result = run("any", None, None, [OTHER])
    assert asked == [
        (0, number, name) for number in (*range(0, 10, 2), *range(1, 10, 2)) for name in ("whole", "other")
    ]
    assert result["samples"][1] == {
        "number": 0,
        "seed": 0,
        "group": "even",
        "variant": "other",
        "ratio": 2.0,
        "score": 10,
    }
    assert json.loads(json.dumps(result)) == result
    assert result["variants"] == {"whole": {}, "other": {"size": 3}}
    assert result["options"] == {"depth": 1}


def test_a_limit_counts_in_each_group_and_is_drawn_by_seed(asked):
    drawn = [unit.key for unit in draw_samples(AnyEvaluation(Options()), None, seeds=2, limit=2)]
    assert drawn == [unit.key for unit in draw_samples(AnyEvaluation(Options()), None, seeds=2, limit=2)]
    for seed in (0, 1):
        numbers = [key["number"] for key in drawn if key["seed"] == seed]
        assert [number % 2 for number in numbers] == [0, 0, 1, 1]
    assert [key["number"] for key in drawn] != [0, 2, 1, 3] * 2  # not just the first ones
    assert len(draw_samples(AnyEvaluation(Options()), None, limit=99)) == 10


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"limit": 0}])
def test_numbers_below_1_are_refused(asked, wrong):
    with pytest.raises(InputError, match="seeds and limit must be 1 or more"):
        run("any", None, None, [], **wrong)


def test_two_variants_of_one_name_are_refused(asked):
    with pytest.raises(InputError, match="one name: whole, other, other"):
        run("any", None, None, [OTHER, OTHER])
    with pytest.raises(InputError, match="one name: whole, whole"):
        run("any", None, None, [WHOLE])  # such as a codec's folder of that name


def test_progress_counts_contexts_and_knows_their_number(asked):
    told = []
    run("any", None, None, [OTHER], progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 20) for done in range(21)]


def test_a_stopped_run_goes_on_where_it_was_and_ends_as_if_it_had_not_stopped(asked, tmp_path):
    path, told = tmp_path / "result.json.partial", []
    stop = Variant("other", {"size": 3}, held)
    plain = run("any", None, None, [OTHER], seeds=2)

    def interrupted(at):
        def progress(done, total):
            if done == at:
                raise KeyboardInterrupt

        with Journal(path, {"model": "m"}) as journal, pytest.raises(KeyboardInterrupt):
            run("any", None, None, [stop], seeds=2, journal=journal, progress=progress)

    interrupted(9)
    path.write_bytes(path.read_bytes() + b'{"sample": "cut o')
    interrupted(13)
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 1 + 6
    asked.clear()
    with Journal(path, {"model": "m"}) as journal:
        again = run("any", None, None, [stop], seeds=2, journal=journal, progress=lambda *two: told.append(two))
        journal.finish()
    assert again == plain
    assert len(asked) == 2 * (20 - 6)
    assert told[0] == (12, 40)
    assert told[-1] == (40, 40)
    assert not path.exists()


def test_a_finished_sample_is_on_disk_before_the_next_is_measured(asked, tmp_path, monkeypatch):
    path, seen = tmp_path / "partial", []
    monkeypatch.setattr(journals, "sync", lambda number: seen.append(path.read_bytes().count(b"\n")))
    with Journal(path, {}) as journal:
        run("any", None, None, [OTHER], journal=journal)
    assert seen == list(range(1, 12))


def test_one_run_at_a_time_writes_a_journal(asked, tmp_path):
    path = tmp_path / "partial"
    with Journal(path, {}) as journal:
        with pytest.raises(InputError, match=r"another run is writing .*partial: wait for it"), Journal(path, {}):
            pytest.fail("two runs have one journal")
        run("any", None, None, [OTHER], journal=journal)
    measured = len(asked)
    with Journal(path, {}) as journal:
        run("any", None, None, [OTHER], journal=journal)
        journal.finish()
    assert len(asked) == measured
    assert os.listdir(tmp_path) == []


def test_a_run_that_never_began_leaves_no_journal(tmp_path):
    with Journal(tmp_path / "partial", {}):
        pass
    assert os.listdir(tmp_path) == []


def test_a_journal_that_is_gone_is_no_error_at_the_end(asked, tmp_path):
    path = tmp_path / "partial"
    with Journal(path, {}) as journal:
        run("any", None, None, [OTHER], journal=journal)
        path.unlink()
        journal.finish()


@pytest.mark.parametrize("room", [0, 1, 700, 1500])
def test_a_disk_that_is_full_is_told_in_one_line_and_the_run_goes_on_from_there(asked, tmp_path, monkeypatch, room):
    path = tmp_path / "partial"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*partial: File too large"), Journal(path, {}) as journal:
            run("any", None, None, [OTHER], journal=journal)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finished = max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0
    asked.clear()
    with Journal(path, {}) as journal:
        found = run("any", None, None, [OTHER], journal=journal)
    assert len(asked) == 2 * (10 - finished)
    assert found == run("any", None, None, [OTHER])


@pytest.mark.parametrize("place", ["absent/partial", "folder", "pipe"])
def test_a_journal_that_cannot_be_written_is_an_input_error(tmp_path, place):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="cannot write"), Journal(tmp_path / place, {}):
        pytest.fail("it was opened")


def test_a_journal_that_has_not_begun_takes_no_samples(tmp_path):
    with Journal(tmp_path / "partial", {}) as journal, pytest.raises(InputError, match="begin a run first"):
        journal.add("1", [])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seeds": 3}, "seeds"),
        ({"options": Options(2)}, "options"),
        ({"limit": 4}, "limit"),
        ({"facts": {"model": "n"}}, "model"),
    ],
)
def test_samples_of_another_run_are_refused_and_kept(asked, tmp_path, changed, named):
    path = tmp_path / "partial"
    with Journal(path, {"model": "m"}) as journal:
        run("any", None, None, [OTHER], journal=journal)
    before, facts = path.read_bytes(), changed.pop("facts", {"model": "m"})
    with Journal(path, facts) as journal, pytest.raises(MismatchError, match=rf"another {named}; remove it"):
        run("any", None, None, [OTHER], journal=journal, **changed)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"sample": 1, "records": []}',
        '{"sample": "a", "records": {}}',
        '{"sample": "a", "records": [1]}',
        "\x00",
        "[" * 100_000,
    ],
)
def test_a_damaged_file_of_samples_is_refused_by_line(asked, tmp_path, line):
    path = tmp_path / "partial"
    with Journal(path, {}) as journal:
        run("any", None, None, [OTHER], journal=journal)
    path.write_text("\n".join([*path.read_text().splitlines(), line, ""]))
    with Journal(path, {}) as journal, pytest.raises(FormatError, match="partial, line 12"):
        run("any", None, None, [OTHER], journal=journal)


@pytest.mark.parametrize("change", [lambda record: record.pop("score"), lambda record: record.update(variant="x")])
def test_samples_that_no_run_can_have_written_are_refused(asked, tmp_path, change):
    path = tmp_path / "partial"
    with Journal(path, {}) as journal:
        run("any", None, None, [OTHER], journal=journal)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[3]["records"][1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Journal(path, {}) as journal, pytest.raises(FormatError, match="damaged: remove it"):
        run("any", None, None, [OTHER], journal=journal)


def test_every_file_without_an_underscore_is_an_evaluation():
    assert evaluations.names() == sorted(
        ["fidelity", "perplexity", "needle", "ruler", "longbench", "attention", "text", "memory", "latency"]
    )
    for name, found in evaluations.items():
        assert found.scores
        assert found.options_class
        assert callable(found.samples)
        assert found.__module__ == f"mlxkv.evaluate.tasks.{name}"
    with pytest.raises(InputError, match="no evaluation 'runner'; did you mean ruler"):
        evaluations.get("runner")


def test_options_of_another_evaluation_are_refused():
    with pytest.raises(InputError, match="expected Options, not"):
        AnyEvaluation(Config())


def test_fields_are_checked_with_what_was_given():
    @dataclass(frozen=True)
    class Deep(Config):
        depth: object = option(2, "of it", least=2)
        depths: object = option((1,), "of all", least=1)

    with pytest.raises(InputError, match=r"depth must be 2 or more, not 1"):
        Deep(depth=1)
    for wrong in ((), (3, 0)):
        with pytest.raises(InputError, match="depths must be 1 or more, not"):
            Deep(depths=wrong)


WRONG_VALUES = [True, "8", 2.5, None, b"8", [1], float("nan"), (True,), ("a", 3), (None,), object()]


@pytest.mark.parametrize("name", evaluations.names())
def test_an_option_of_another_type_is_refused_by_every_evaluation(name):
    kind = evaluations.get(name).options_class
    for field in fields(kind):
        given = {f.name: Path(".") for f in fields(kind) if f.default is MISSING}
        plain = field.default if isinstance(field.default, int | tuple) else None
        for wrong in WRONG_VALUES:
            if wrong is None and field.default is None:
                continue
            with pytest.raises(InputError, match=field.name):
                kind(**(given | {field.name: wrong}))
        assert getattr(kind(**(given | ({field.name: plain} if plain else {}))), field.name) in (plain, None, Path("."))


def record(variant, score, group="", seed=0):
    return {"variant": variant, "group": group, "score": score, "seed": seed}


def test_a_row_has_the_mean_the_deviation_of_seeds_and_the_change_from_the_first():
    scores = {"whole": [1, 1, 1, 1], "other": [0, 0.5, 0.5, 1]}
    records = [record(v, s, seed=i // 2) for v, values in scores.items() for i, s in enumerate(values)]
    whole_row, other = statistics.summarise(records, ("score",))
    assert (whole_row["score"], whole_row["score_deviation"]) == (1, 0)
    assert "score_p" not in whole_row
    assert other["score"] == 0.5
    assert other["score_deviation"] == pytest.approx(0.5 / 2**0.5)  # of 0.25 and 0.75
    assert other["score_change"] == -0.5
    assert other["score_interval"][0] < -0.5 < other["score_interval"][1] <= 0
    assert other["score_p"] is None  # of so few samples none could be below 0.05


@pytest.mark.parametrize("count", [1, 3, 5, 6, 8, 40])
def test_a_p_is_given_only_where_it_could_show_something(count):
    records = [record(variant, score) for variant, score in (("whole", 1), ("other", 0.5)) for _ in range(count)]
    _, other = statistics.summarise(records, ("score",))
    assert other["samples"] == count
    if count < 6:
        assert other["score_p"] is None
    else:
        assert other["score_p"] == pytest.approx(statistics.smallest_p(count) if count <= 16 else 1e-4, rel=0.01)


def test_groups_count_alike_in_the_row_of_all_and_have_rows_of_their_own():
    records = [record("whole", s, g) for s, g in ((1, "a"), (1, "a"), (1, "a"), (0, "b"))]
    rows = statistics.summarise(records, ("score",))
    assert [(row.get("group"), row["score"], row["samples"]) for row in rows] == [
        (None, 0.5, 4),
        ("a", 1, 3),
        ("b", 0, 1),
    ]


def test_p_counts_the_flips_that_go_as_far():
    assert statistics.sign_flip_test(np.array([-1.0, -2, -3, -4])) == 2 / 16
    assert statistics.sign_flip_test(np.array([1.0, 1, 1, -1])) == 10 / 16  # sums of +-2 or +-4
    assert statistics.sign_flip_test(np.zeros(3)) == 1


@pytest.mark.parametrize("n", [6, 14])
def test_p_is_scipys(n):
    differences = np.random.default_rng(0).normal(0.4, 1, n)
    test = stats.permutation_test(
        (differences, np.zeros(n)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=2**n
    )
    assert statistics.sign_flip_test(differences) == pytest.approx(test.pvalue)


def test_p_of_many_samples_is_near_that_of_all_flips(monkeypatch):
    differences = np.random.default_rng(1).normal(0.5, 1, 14)
    exact = statistics.sign_flip_test(differences)
    monkeypatch.setattr(statistics, "MAX_EXACT_SAMPLES", 5)
    assert statistics.sign_flip_test(differences) == pytest.approx(exact, abs=0.02)


def test_the_interval_is_near_scipys():
    values = np.random.default_rng(2).normal(0, 1, 40)
    expected = stats.bootstrap((values,), np.mean, method="percentile", random_state=0).confidence_interval
    assert statistics.bootstrap_interval(values) == pytest.approx(list(expected), abs=0.03)


def test_groups_count_alike_in_changes_and_deviations_too():
    scores = {"whole": (1,) * 8, "other": (1, 1, 1, 0, 0, 0, 0, 0)}
    records = [record(v, s, "aaab"[i % 4], i // 4) for v, row in scores.items() for i, s in enumerate(row)]
    other = statistics.summarise(records, ("score",))[1]
    assert other["score_change"] == pytest.approx(other["score"] - 1) == -0.75
    assert other["score_deviation"] == pytest.approx(0.5 / 2**0.5)  # of 0.5 and 0


def test_p_of_drawn_flips_is_never_0():
    assert statistics.sign_flip_test(np.ones(40)) == 1 / statistics.RESAMPLES
