import re
from base64 import b64decode
from types import ModuleType

import pytest

from benchmarks import pareto, report
from benchmarks.report import Experiment

MACHINE = {"os": "Linux-6.1", "processor": "AMD", "cores": 2, "mlx": "0.32", "metal": False, "commit": "abc+"}


def bars(result):
    from benchmarks import figures

    figure, panes = figures.panes(width=2, height=2)
    panes[0, 0].bar(range(3), result["summary"])
    return figure


def fake(name, phase=1, section=lambda result: f"Of {result['summary']}.", figure=bars, **result):
    """An experiment whose result is `result` over some that is full; `ran=False` for one without."""
    module = ModuleType(name, f"What is `{name}`, and why?\n\nMore.")
    module.section, module.figure = section, figure
    whole = {"benchmark": name, "date": "2026-01-02T03:04:05", "machine": MACHINE, "summary": [1, 2, 3], **result}
    return Experiment(name, phase, module, whole if result.get("ran", True) else None)


def rows(*points):
    return [
        {"model": "smollm2-135m", "variant": f"v{i}", "method": f"m{i}", "share_of_fp16": share, "kl_geometric": kl}
        for i, (share, kl) in enumerate(points)
    ]


SOME = [
    fake("live_methods", 1, section=lambda _: "Rows.", figure=lambda _: bars({"summary": [1, 2, 3]}),
         summary={"fidelity": rows((0.1, 0.5), (0.2, 0.1))}),
    fake("quick", 3, quick=True),
    fake("unlucky", 8, ran=False),
]  # fmt: skip


def test_the_same_results_make_the_same_bytes(tmp_path):
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        (folder / "results").mkdir(parents=True)
        report.draw(SOME, folder / "results")
        pictures = {path.name: path.read_bytes() for path in (folder / "results").iterdir()}
        made.append((pictures, report.page(report.written(SOME), folder)))
    assert made[0] == made[1]
    assert set(made[0][0]) == {"live_methods.png", "pareto.png", "quick.png"}


def test_the_committed_files_are_made_from_the_committed_results():
    made = report.documents(report.found())
    stale = [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run python -m benchmarks.report"


def test_the_page_needs_no_other_file(tmp_path):
    (tmp_path / "results").mkdir()
    report.draw(SOME, tmp_path / "results")
    page = report.page(report.written(SOME), tmp_path)
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [b64decode(source) for source in sources] == [
        (tmp_path / "results" / f"{name}.png").read_bytes() for name in ("pareto", "live_methods", "quick")
    ]
    assert page.count("src=") == 3
    assert not re.search(r"https?:|<script|<link|url\(", page)


def test_every_line_of_the_contents_leads_to_a_heading():
    experiments = [fake("a-b_c", figure=None, section=lambda _: "x"), fake("d", phase=8, ran=False)]
    page = report.page(report.written([Experiment(e.name, e.phase, e.module, None) for e in experiments]))
    links, anchors = re.findall(r'href="#([^"]+)"', page), re.findall(r'id="([^"]+)"', page)
    assert len(links) == 4
    assert set(links) <= set(anchors)
    assert "what-is-a-b_c-and-why" in links


def test_text_from_a_result_is_no_markup_of_the_page():
    module = fake("a", section=lambda _: "| a |\n|---|\n| <b>1</b> |")
    del module.module.figure
    page = report.page(report.written([module]))
    assert "&lt;b&gt;1&lt;/b&gt;" in page
    assert page.count('<div class="table"><table>') == page.count("</table></div>") == 1


def test_a_part_that_fails_names_its_benchmark():
    def broken(result):
        return result["summary"]["missing"]

    with pytest.raises(RuntimeError, match=r"section of poor failed: TypeError"):
        report.written([fake("poor", section=broken)])
    with pytest.raises(RuntimeError, match=r"figure of poor failed: TypeError"):
        report.draw([fake("poor", figure=broken)])


def test_what_has_not_run_and_what_ran_quickly_say_so():
    text = report.written(SOME)
    assert "2 of 3 experiments, 1 of them with quick settings" in text
    assert "Not run: `unlucky`." in text
    assert "Not run: `python -m benchmarks.run unlucky`" in text
    assert "[quick.json](results/quick/quick.json) · `python -m benchmarks.run quick --quick` · quick settings" in text
    assert "[live_methods.json](results/live_methods.json) · `python -m benchmarks.run live_methods` · full" in text


def test_only_results_from_a_mac_take_back_that_there_are_none():
    assert "Nothing in this report is from a Mac." in report.head(SOME)
    mac = fake("mac", machine={**MACHINE, "metal": True})
    assert "from a Mac" not in report.head([*SOME, mac])


def test_the_quick_page_has_its_own_figures(tmp_path):
    page = report.drawn_page(SOME, tmp_path)
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "live_methods.png",
        "pareto.png",
        "quick.png",
    ]
    assert page == report.page(report.written(SOME), tmp_path)


def test_another_models_result_stands_beside_the_first_with_its_command():
    module = fake("needle").module
    results = [fake("needle").result, fake("needle_gemma", summary=[4]).result]
    text = report.written(
        [Experiment("needle", 1, module, results[0]), Experiment("needle_gemma", 1, module, results[1], "gemma3-270m")]
    )
    assert "### What is `needle`, and why?\n" in text
    assert "### What is `needle`, and why? (Gemma 3 270M)\n" in text
    assert (
        "Of [4].\n\n> [needle_gemma.json](results/needle_gemma.json) · `python -m benchmarks.run needle --model gemma3-270m`"
        in text
    )
    assert "(results/needle_gemma.png)" in text


def test_marked_parts_are_replaced_and_nothing_else():
    text = "a\n<!-- one -->\nold\n<!-- /one -->\n<!-- two -->\n<!-- /two -->\nz\n<!-- one -->\n<!-- /one -->\n"
    expected = (
        "a\n<!-- one -->\n1\\g\n<!-- /one -->\n<!-- two -->\n2\n<!-- /two -->\nz\n<!-- one -->\n1\\g\n<!-- /one -->\n"
    )
    assert report.filled(text, {"one": "1\\g", "two": "2"}) == expected
    with pytest.raises(KeyError, match="two"):
        report.filled(text, {"one": ""})


def test_the_front_is_what_nothing_beats_in_both():
    points = rows((0.5, 0.01), (0.1, 0.5), (0.2, 0.6), (0.2, 0.1), (0.6, 0.01), (1.0, 0.0))
    everything = pareto.ways({"summary": {"fidelity": points}})
    assert [row["variant"] for row in everything] == ["v1", "v3", "v2", "v0", "v4"]
    assert [row["variant"] for row in pareto.front(everything)] == ["v1", "v3", "v0"]


def test_files_have_a_front_of_their_own():
    points = [*rows((0.5, 0.01)), {**rows((0.1, 0.001))[0], "variant": "kvtc-rd-30", "method": "kvtc-rd"}]
    said = pareto.section({"summary": {"fidelity": points}})
    assert said.endswith("Of 1 live caches: `v0` (0.50). Of 1 files: `kvtc-rd-30` (0.10).")
