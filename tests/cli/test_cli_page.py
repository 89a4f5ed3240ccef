"""The page of `mlxkv eval --html`: one file that needs no other, with every variant, and safe to show."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from conftest import run

from mlxkv.cli._figures import _ticks, scale_of
from mlxkv.cli._page import page
from mlxkv.cli.eval import help_of
from mlxkv.evaluate import evaluations
from mlxkv.evaluate.statistics import summarise

HOSTILE = [
    "whole",
    "</svg><script>alert(1)</script>",
    '" onload="x&amp;\x00\x1b[31m\ud800',
    "/a/" + "long/" * 40 + "artifacts",
]
MACHINE = {"os": "Linux-6", "processor": "<cpu>", "cores": 2, "device": "Device(cpu, 0)", "metal": False, "python": "3.11",
           "mlxkv": "0.1", "mlx": "1", "mlx-lm": "2", "numpy": "3", "commit": None}  # fmt: skip


def record(name, variants=("whole", "int8", "h2o-96"), samples=8, ratios=(0.5, 1.9, 4.0, 22.0), scored=None, **facts):
    """What a run of an evaluation could have written."""
    scores = evaluations.get(name).scores if scored is None else scored
    made = []
    for i in range(samples):
        for v, variant in enumerate(variants):
            key = {name: values[i % len(values)] for name, values in facts.items()}
            numbers = dict.fromkeys(scores, v * (1 + i % 3) * 10.0 ** (-v))
            made.append(
                {
                    **key,
                    "variant": variant,
                    "tokens": 64,
                    "predicted_tokens": i,
                    **({"ratio": ratios[v]} if ratios else {}),
                    **numbers,
                }
            )
    return {
        "model": "<b>model & \"all\"", "fingerprint": "f00d", "quantization": "float16", "evaluation": name, "options": {"text_file": "<i>&"},
        "variants": {variant: {"cache": variant} for variant in variants}, "seeds": 1, "limit": None,
        "summary": summarise(made, scores), "samples": made, "machine": MACHINE,
    }  # fmt: skip


def made(record, scores=None, words="mlxkv eval x"):
    kind = evaluations.get(record["evaluation"])
    return page(record, scores or kind.scores, help_of(kind), words)


def tree(text):
    """The page as XML, which is stricter than HTML: tags are closed, and names are escaped."""
    return ElementTree.fromstring(text.removeprefix("<!doctype html>\n"))


def figures(text):
    return [element for element in tree(text).iter() if element.tag.endswith("svg") and element.get("role") == "img"]


def addresses(text):
    """Whatever a browser would load or run."""
    found = []

    class Loads(HTMLParser):
        def handle_starttag(self, tag, attributes):
            loads = {"src", "href", "data", "action", "srcset", "xlink:href"}
            found.extend(tag for key, _ in attributes if key in loads or key.startswith("on"))
            found.extend(tag for _ in [0] if tag in ("script", "link", "iframe", "object", "embed", "base", "form"))

    Loads().feed(text)
    return found + re.findall(r"@import|url\(", text)


@pytest.mark.parametrize("name", evaluations.names())
def test_every_evaluation_has_a_page_with_all_its_scores_and_variants(name):
    text = made(record(name))
    drawn = figures(text)
    assert len(drawn) >= 2 * len(evaluations.get(name).scores)
    for figure in drawn:
        said = " ".join(figure.itertext()) + figure.get("aria-label")
        assert all(variant in said for variant in ("whole", "int8", "h2o-96"))
    labels = [element.text for element in drawn[0] if element.tag.endswith("text")]
    assert {"int8", "h2o-96"} < set(labels)
    assert any(label.startswith("whole: ") for label in labels)
    for score in evaluations.get(name).scores:
        assert score.replace("_", " ") in text
    assert not addresses(text)


def test_names_and_texts_are_shown_and_never_run():
    samples = record("text", HOSTILE, start=[0, 1, 2, 3, 4, 5, 6, 7])
    for i, one in enumerate(samples["samples"]):
        one["continuation"] = f"<script>{one['variant']}\x07{i}"
    text = made(samples, words="mlxkv eval '<script>'")
    tree(text)
    assert not addresses(text)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\ud800-\udfff]", text)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"samples": 1}, 4),  # no strips of a single sample
        ({"ratios": None}, 4),  # no bytes, so nothing against them
        ({"length": [256, 512]}, 9),  # a grid by length
        ({"length": [256, 512], "depth": [0.1, 0.1, 0.9, 0.9]}, 11),  # a grid for each variant
        ({"group": ["vt", "fwe"]}, 9),
        ({"variants": ("whole",)}, 8),
    ],
    ids=str,
)
def test_figures_are_those_that_the_samples_allow(changed, expected):
    assert len(figures(made(record("fidelity", **changed)))) == expected


def test_a_dot_tells_its_sample_and_a_mean_its_interval():
    text = made(record("fidelity", length=[256, 512], seed=[0, 1, 2]))
    assert "int8: 0.1 (length 256, seed 0)" in text
    assert re.search(r"int8: 0\.1875 \(0\.1\d* to 0\.2\d*\), 52.6 % of float16's bytes", text.replace("&#x27;", "'"))


def test_an_axis_is_logarithmic_only_where_numbers_are_far_apart_and_not_below_0():
    assert scale_of([0.0, 1e-5, 1.0], 0, 100).log
    assert not scale_of([-1.0, 1e-5, 1.0], 0, 100).log
    assert not scale_of([0.5, 1.0], 0, 100).log
    for values in ([0.0], [5.0, 5.0], [float("nan")], [1e-9, 1e9], [-3.0, 2.0]):
        scale = scale_of(values, 0, 100)
        assert all(0 <= scale(value) <= 100 for value in values if value == value)
        assert all(scale.low <= tick <= scale.high for tick in scale.ticks())
        assert len(scale.ticks()) <= 7


def test_ticks_tell_apart_what_is_close():
    texts = [text for _, text in _ticks(scale_of([0.99981, 0.99999], 0, 100), "top1_agreement")]
    assert len(set(texts)) == len(texts) >= 3
    assert _ticks(scale_of([1e6, 2e6], 0, 100), "cache_bytes")[0][1].endswith("MB")


def test_what_is_run_again_gives_the_same_numbers(model_dir, tmp_path, monkeypatch, says):
    monkeypatch.chdir(tmp_path)
    words = [
        "eval",
        "needle",
        "--model",
        model_dir,
        "--lengths",
        "100,120",
        "--depths",
        "0.5",
        "--cache",
        "int8",
        "--method",
        "direct",
    ]
    first = says(*words, "--recent", 16, "--html", "page.html", "--out", "x.json")
    text = (tmp_path / "page.html").read_text()
    (command,) = [element.text for element in tree(text).iter() if element.tag == "code"]
    assert (
        command
        == f"mlxkv eval needle --model {model_dir} --cache int8 --method direct --recent 16 --out x.json --html page.html --lengths 100,120 --depths 0.5"
    )
    assert says(*command.split()[1:])["samples"] == first["samples"]


def test_a_page_that_cannot_be_written_is_found_first(tmp_path, capsys):
    words = ["eval", "needle", "--model", "any", "--cache", "int8", "--out", tmp_path / "a"]
    for path in (tmp_path, tmp_path / "no" / "x", tmp_path / "a"):
        assert run(*words, "--html", path) == 2
        assert "cannot write" in capsys.readouterr().err
