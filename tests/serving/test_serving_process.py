"""`mlxkv serve` as a process: a model by its name, signals, a restart, and mistakes on its command line."""

import re
import signal
import time

import pytest
from conftest import run
from servers import ended, started

from mlxkv.serving import server

TEXT = "def first(items):\n    return items[0]\n\n" * 12


@pytest.mark.slow
def test_a_server_ends_at_once_or_in_order_and_goes_on_where_it_was(tmp_path):
    store = tmp_path / "store"
    process, client, said = started(store, "--prompt-cache-size", "3")
    assert f"stored in {store}, up to 20 GB: --store-max bounds it, --no-store turns it off" in said
    assert "password" not in said
    answer, tokens, cached = client.complete(TEXT)
    assert cached == 0
    while (facts := client.get("/v1/mlxkv/store")["store"])["waiting"] or not facts["tokens_written"]:
        time.sleep(0.05)
    events = client.stream("/v1/completions", {"prompt": "x", "max_tokens": 10**6, "temperature": 1})
    next(events)
    code, said = ended(process, signal.SIGTERM, signal.SIGTERM, pause=0.8)
    assert code == 130
    assert "SIGTERM: stopping" in said
    assert "Traceback" not in said

    process, client, _ = started(store)
    assert client.complete(TEXT)[:2] == (answer, tokens)
    assert client.get("/v1/mlxkv/store")["from_disk"] > tokens - 64
    client.complete("And " + TEXT)
    code, said = ended(process, signal.SIGINT, signal.SIGINT)  # as a wrapper passes one on
    assert code == 0, said
    assert "miniature/qwen3 is loaded, prompts are stored as exact" in said
    assert "SIGINT: stopping" in said
    assert re.search(r"stored [\d,]+ tokens in [\d.]+ [kM]B \(exact\)", said)
    assert said.count(" - prompt of ") == 2
    assert "Traceback" not in said


@pytest.mark.parametrize(("words", "code", "said"), [
    (["--no-store", "--exact"], 2, "--no-store goes with none of"),
    (["--exact", "--quality", "40"], 2, "either --quality or --exact"),
    (["--quality", "101"], 2, "--quality is a number from 0 to 100"),
    (["--store-max", "much"], 2, "--store-max is a size"),
    (["--store-max", "1"], 2, "1 bytes"),
    (["--cache", "int9"], 2, "did you mean int8 or int4"),
    (["--no-store", "--model", "smollm2"], 2, "did you mean smollm2-135m"),
    (["--no-store", "--max-token", "x"], 2, "invalid int value"),
    (["--no-store", "--temperature", "1"], 2, "has a flag --temperature"),
    (["--no-store", "stray"], 2, "stray"),
])  # fmt: skip
def test_a_wrong_command_line_is_told_in_a_line(tmp_path, monkeypatch, capsys, words, code, said):
    monkeypatch.setenv("MLXKV_STORE", str(tmp_path / "store"))
    assert run("serve", "--port", "0", *words) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_flags_of_mlx_lm_and_ours_mix_in_any_order(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(server.Serving, "run", lambda self: given.append((self._flags, self._options)))
    words = ["--temp", "0.5", "--store", tmp_path, "--chat-template-args", '{"a": -1}', "--model", "m", "--pipeline"]
    assert run("serve", *words, "--store-max=1.5GB", "--min-p=.1", "--no-calibrate") == 0
    flags, options = given[0]
    assert flags == ["--model", "m", "--temp", "0.5", "--chat-template-args", '{"a": -1}', "--pipeline", "--min-p=.1"]
    assert options == server.Options(folder=tmp_path, limit=1_500_000_000, calibrate=False)
