"""mlxkv generate: prompts, templates, sampling, Ctrl-C, and caches that are saved and gone on from."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest
from conftest import run, save_model, tiny_config, tiny_model
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

from mlxkv import Session, lm, make_cache, save_cache
from mlxkv.cli._sampling import Sampling
from mlxkv.cli.generate import _Run
from mlxkv.codec import library
from mlxkv.codec.calibrate import uncalibrated
from mlxkv.conversion import noted_tokens
from mlxkv.evaluate.variants import cache_sizes
from mlxkv.models import cache_spec

TEXT = "The quick brown fox jumps over the lazy dog. Once upon a time in a land far away, nothing happened. "
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
MORE = ["--prompt", " And", "--max-tokens", 8]


@pytest.fixture(scope="module")
def talker(model_dir, tmp_path_factory):
    """The tiny model with a chat template."""
    folder = shutil.copytree(model_dir, tmp_path_factory.mktemp("talker") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def piped(monkeypatch):
    """Give the command a text on its standard input."""

    def pipe(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return pipe


@pytest.fixture
def uncompiled():
    """MLX would call a C++ compiler for each filter of mlx-lm's samplers."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ([], f"user: {TEXT}\nA:"),
        (["--system-prompt", "Be brief."], f"system: Be brief.\nuser: {TEXT}\nA:"),
        (["--ignore-chat-template"], TEXT),
    ],
)
def test_a_model_with_a_chat_template_gets_a_message_unless_told_otherwise(options, prompt, talker, says):
    model, tokenizer = lm.load(str(talker))
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=6)
    record = says("generate", "--model", talker, "--prompt", TEXT, "--max-tokens", 6, *options)
    assert (record["text"], record["prompt_tokens"]) == (expected, len(prompt))


@pytest.mark.parametrize("way", ["file", "-", "piped", "file of -"])
def test_the_prompt_comes_from_a_file_or_the_standard_input(way, model_dir, tmp_path, piped, says):
    text = TEXT + "Ägypten\n"
    words = ["generate", "--model", model_dir, "--max-tokens", 6]
    expected = says(*words, "--prompt", text)
    (tmp_path / "a.txt").write_text(text)
    piped("nothing" if way == "file" else text)
    options = {
        "file": ["--prompt-file", tmp_path / "a.txt"],
        "-": ["--prompt", "-"],
        "file of -": ["--prompt-file", "-"],
    }
    record = says(*words, *options.get(way, []))
    assert record["prompt_tokens"] == len(text.encode()) == expected["prompt_tokens"]
    assert record["text"] == expected["text"]


def test_nothing_on_the_standard_input_is_no_prompt(model_dir, piped, capsys):
    piped("")
    assert run("generate", "--model", model_dir) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_the_same_seed_writes_the_same_text(model_dir, says, uncompiled):
    words = ["generate", "--model", model_dir, "--prompt", TEXT, "--max-tokens", 12, "--temp", 0.9, "--top-p", 0.9]
    first, again, other = (says(*words, "--seed", seed)["text"] for seed in (1, 1, 2))
    assert first == again != other


class _Reference:
    """What the commands write, in one cache that is never saved."""

    def __init__(self, model_dir, method=None):
        self.model, self.tokenizer = lm.load(str(model_dir))
        self.cache = make_prompt_cache(self.model) if method is None else make_cache(self.model, method)
        self.tokens = []

    def goes_on(self, text, most):
        prompt = self.tokenizer.encode(text, add_special_tokens=False)
        responses = list(mlx_lm.stream_generate(self.model, self.tokenizer, prompt, most, prompt_cache=self.cache))
        self.tokens += prompt + [response.token for response in responses]
        return "".join(response.text for response in responses)


def _make_exact(model):
    """Let the library code caches of a model bit for bit, so that texts can be compared."""
    library.add(uncalibrated(cache_spec(model), fingerprint=lm.fingerprint(model), method="exact"))


@pytest.mark.parametrize(
    ("model_dir", "method", "ending"),
    [
        ("llama", None, "mlxkv"),
        ("lfm2", None, "mlxkv"),
        ("llama", None, "npz"),
        ("llama", None, "safetensors"),
        ("lfm2", None, "cache"),
        ("llama", "int8", "cache"),
        ("lfm2", "h2o-96", "cache"),
    ],
    indirect=["model_dir"],
)
def test_a_saved_cache_goes_on_as_if_nothing_had_been_saved(method, ending, model_dir, tmp_path, says):
    expected = _Reference(model_dir, method)
    _make_exact(expected.model)
    first, second = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    begin = [] if method is None else ["--cache", method]
    record = says("generate", "--model", model_dir, *begin, "--prompt", TEXT, "--max-tokens", 6, "--save", first)
    assert record["text"] == expected.goes_on(TEXT, 6)
    assert record["file_bytes"] == first.stat().st_size
    for source, target in ((first, first), (first, second), (second, second)):
        record = says("generate", source, "--model", model_dir, *MORE, "--save", target)
        assert record["cached_tokens"] == len(expected.tokens)
        assert record["text"] == expected.goes_on(" And", 8)
        assert (record["saved"], says("inspect", target)["tokens"]) == (str(target), len(expected.tokens))


ENDINGS = ("mlxkv", "npz", "safetensors", "cache")


def test_a_file_of_any_kind_goes_on_into_any_other(model_dir, tmp_path, says):
    expected = _Reference(model_dir)
    _make_exact(expected.model)
    for ending in ENDINGS:
        says("generate", "--model", model_dir, "--prompt", TEXT, "--max-tokens", 6, "--save", tmp_path / f"a.{ending}")
    texts = [expected.goes_on(*given) for given in ((TEXT, 6), (" And", 8), (" So", 4))]
    for source in ENDINGS:
        for target in ENDINGS:
            out = tmp_path / f"{source}.{target}"
            assert (
                says("generate", tmp_path / f"a.{source}", "--model", model_dir, *MORE, "--save", out)["text"]
                == texts[1]
            )
    for out in tmp_path.glob("*.*"):
        if not out.name.startswith("a."):
            options = ["--prompt", " So", "--max-tokens", 4]
            assert says("generate", out, "--model", model_dir, *options)["text"] == texts[2], out.name


def test_blocks_of_a_compressed_file_are_not_coded_twice(model_dir, tmp_path, says):
    first, copy = tmp_path / "a.mlxkv", tmp_path / "b.mlxkv"
    says("generate", "--model", model_dir, "--prompt", TEXT * 8, "--max-tokens", 2, "--save", first)
    before = first.read_bytes()
    for out in (copy, first):
        says("generate", first, "--model", model_dir, *MORE, "--save", out)
        assert (first.read_bytes() == before) == (out == copy)
    assert copy.read_bytes() == first.read_bytes()
    block = before[:8192]
    assert first.read_bytes()[:8192] == block


def test_artifacts_are_found_and_those_that_are_named_win(model_dir, tmp_path, says, capsys):
    expected = _Reference(model_dir)
    _make_exact(expected.model)
    out = tmp_path / "a.mlxkv"
    says("generate", "--model", model_dir, "--prompt", TEXT, "--max-tokens", 6, "--save", out)
    (item,) = library.items()
    library.export(item.fingerprint, tmp_path / "artifacts")
    found = says("generate", out, "--model", model_dir, *MORE)["text"]
    assert says("generate", out, "--artifacts", tmp_path / "artifacts", "--model", model_dir, *MORE)["text"] == found
    assert run("generate", out, "--artifacts", tmp_path / "none", "--model", model_dir, *MORE) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_text_that_goes_on_gets_no_template_and_is_told_so(talker, tmp_path, says, capsys):
    out = tmp_path / "a.cache"
    says("generate", "--model", talker, "--prompt", TEXT, "--max-tokens", 2, "--save", out)
    assert run("generate", out, "--model", talker, *MORE, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["prompt_tokens"] == len(" And")
    assert "without the chat template" in said.err
    assert run("generate", out, "--model", talker, *MORE, "--ignore-chat-template") == 0
    assert not capsys.readouterr().err


def test_a_live_cache_is_converted_without_its_text(model_dir, tmp_path, says):
    expected = _Reference(model_dir)
    _make_exact(expected.model)
    out, again = tmp_path / "a.cache", tmp_path / "c.cache"
    says("generate", "--model", model_dir, "--cache", "full", "--prompt", TEXT, "--max-tokens", 6, "--save", out)
    expected.goes_on(TEXT, 6)
    says("convert", out, tmp_path / "b.npz", "--model", model_dir)
    says("convert", tmp_path / "b.npz", again, "--model", model_dir)
    assert noted_tokens(out) == noted_tokens(again) == expected.tokens
    text = expected.goes_on(" And", 8)
    assert [says("generate", file, "--model", model_dir, *MORE)["text"] for file in (tmp_path / "b.npz", again)] == [
        text
    ] * 2


@pytest.mark.parametrize("tokens", [[1, 2], ["a"] * 106, {"a": 1}, [True] * 106, "text"])
def test_tokens_that_are_none_or_not_those_of_the_cache_are_damage(tokens, model_dir, tmp_path, capsys):
    model, tokenizer = lm.load(str(model_dir))
    cache = make_cache(model, "int8")
    lm.prefill(model, tokenizer.encode(TEXT) + [1] * 5, cache)
    save_cache(tmp_path / "a.cache", model, cache, notes={"tokens": tokens})
    assert run("generate", tmp_path / "a.cache", "--model", model_dir, *MORE) == 3
    assert run("convert", tmp_path / "a.cache", tmp_path / "b.npz", "--model", model_dir) == 3
    assert capsys.readouterr().err.count("tokens") >= 2


def test_a_text_cannot_move_the_cursor_of_a_terminal(model_dir, monkeypatch, capsys):
    stopped = _Run(None, None, [], [])
    stopped._show("a\x1b[2J\tb\n", show=True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    stopped._show("a\x1b[2J\tb\n", show=True)
    assert capsys.readouterr().out == "a\x1b[2J\tb\na\ufffd[2J\tb\n"


@pytest.mark.parametrize("words", [[], ["--prompt", "-"], ["--prompt-file", "-"]])
def test_a_closed_standard_input_holds_no_prompt(words, model_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert run("generate", "--model", model_dir, *words) == 2
    assert ("give either --prompt" if not words else "is closed") in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.mlxkv", "a.cache"])
def test_the_file_of_a_conversation_is_not_written_while_it_is_held_and_keeps_its_messages(
    name, talker, tmp_path, says, capsys
):
    model, tokenizer = lm.load(str(talker))
    out = tmp_path / name
    words = ["generate", out, "--model", talker, *MORE, "--save", out]
    with Session(model, tokenizer, out, cache="int8" if name == "a.cache" else None) as session:
        session.send("Hello", max_tokens=3)
        session.save()
        messages, tokens = session.messages, len(session.tokens)
        assert run(*words) == 2
        assert "another process works on" in capsys.readouterr().err
    assert says(*words)["cached_tokens"] == tokens
    with Session(model, tokenizer, out) as session:
        assert session.messages == messages
        assert len(session.tokens) == tokens + 4 + 8
        assert session.send("So", max_tokens=3) is not None
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_tokens_that_a_file_lacks_are_not_made_up(model_dir, tmp_path, says, capsys):
    expected = _Reference(model_dir)
    expected.goes_on(TEXT, 6)
    save_prompt_cache(str(tmp_path / "a.safetensors"), expected.cache)
    words = ["generate", tmp_path / "a.safetensors", "--model", model_dir, *MORE]
    for ending in ("npz", "mlxkv"):
        assert run(*words, "--save", tmp_path / f"b.{ending}") == 2
        assert "does not name its tokens" in capsys.readouterr().err
    for ending in ("safetensors", "cache"):
        assert says(*words, "--save", tmp_path / f"b.{ending}")["text"]
        assert says("inspect", tmp_path / f"b.{ending}")["tokens"] == len(expected.tokens) + 4 + 8


@pytest.mark.parametrize("ending", ["mlxkv", "npz", "safetensors"])
def test_a_file_of_all_tokens_is_not_made_of_some(ending, model_dir, tmp_path, capsys):
    words = ["generate", "--model", model_dir, "--cache", "h2o-96", "--prompt", "a"]
    assert run(*words, "--save", tmp_path / f"a.{ending}") == 2
    assert "h2o gives some up" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save", "{tmp}/a.txt"], "does not tell what to write"),
        (["--save", "{tmp}/none/a.npz"], "there is no folder"),
        (["--artifacts", "{tmp}"], "--artifacts belongs to"),
        (["--system-prompt", "b", "--ignore-chat-template"], "--system-prompt has no place"),
        (["--max-tokens", "0"], "0 is not 1 or more"),
        (["--temp", "nan"], "nan is not in 0 to 100"),
        (["--temp", "-1"], "-1.0 is not in 0 to 100"),
        (["--top-k", "3"], "--top-k needs a --temp"),
        (["--seed", "-1"], "-1 is not in"),
        (["--prompt-file", "{tmp}/none"], "give either"),
        (["--adapter-path", "{tmp}"], "no adapter_config.json"),
        (["--prompt", "a\udcff"], "--prompt is not UTF-8"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(words, message, tmp_path, monkeypatch, capsys):
    def expensive(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("mlxkv.lm.loading.mlx_lm_load", expensive)
    options = [word.format(tmp=tmp_path) for word in words]
    assert run("generate", "--model", "smollm2-135m", "--prompt", "a", *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_system_prompt_needs_a_template(model_dir, capsys):
    assert run("generate", "--model", model_dir, "--prompt", "a", "--system-prompt", "b") == 2
    assert "no chat template" in capsys.readouterr().err


def test_the_ratio_is_against_all_tokens_whatever_holds_them():
    model = tiny_model("llama", head_dim=32)
    plain, quantized, rotating = (make_prompt_cache(model, size) for size in (None, None, 16))
    for cache in (plain, quantized, rotating):
        for _ in range(5):
            mx.eval(model(mx.array([[1, 2, 3, 4, 5, 6, 7, 8]]), cache=cache))
    quantized = [entry.to_quantized(group_size=32, bits=8) for entry in quantized]
    sizes = [cache_sizes(model, cache) for cache in (plain, quantized, rotating)]
    assert [size["fp16_bytes"] for size in sizes] == [2 * 2 * 2 * 2 * 32 * 40] * 3
    assert sizes[0]["tokens"] == sizes[1]["tokens"] == 40


def test_ctrl_c_ends_the_text_and_keeps_all_of_it(model_dir, tmp_path, monkeypatch, says):
    usual, drawn = signal.getsignal(signal.SIGINT), []

    def make(_, tokenizer):
        def sampler(logprobs):
            drawn.append(1)
            if len(drawn) == 9:
                os.kill(os.getpid(), signal.SIGINT)
            return mx.argmax(logprobs, axis=-1)

        return sampler

    monkeypatch.setattr(Sampling, "make", make)
    expected = _Reference(model_dir)
    out = tmp_path / "a.cache"
    record = says("generate", "--model", model_dir, "--prompt", TEXT, "--max-tokens", 1000, "--save", out)
    assert record["finish_reason"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is usual
    count = record["generated_tokens"]
    assert 7 <= count <= 9
    assert record["text"] == expected.goes_on(TEXT, count)
    assert says("generate", out, "--model", model_dir, *MORE)["text"] == expected.goes_on(" And", 8)


@pytest.mark.parametrize(
    ("whole", "shown", "rest"),
    [("Once upon", "Once", " upon"), (" Once upon", "Once", " upon"), (" a", "", "a"), ("a", "a", ""), ("ab", "b", "")],
)
def test_ctrl_c_does_not_lose_a_word_that_waits_for_the_next_one(whole, shown, rest):
    stopped = _Run(None, SimpleNamespace(decode=lambda _: whole), [], [], shown)
    assert stopped._held_back() == rest


def test_a_second_ctrl_c_does_not_wait(model_dir, tmp_path, monkeypatch, capsys):
    def make(_, tokenizer):
        def sampler(logprobs):
            os.kill(os.getpid(), signal.SIGINT)
            return mx.argmax(logprobs, axis=-1)

        return sampler

    monkeypatch.setattr(Sampling, "make", make)
    out = tmp_path / "a.cache"
    assert run("generate", "--model", model_dir, "--prompt", TEXT, "--max-tokens", 1000, "--save", out) == 130
    assert f"{out} was not written" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_ctrl_c_in_a_terminal_leaves_a_text_a_summary_and_a_file(tmp_path, says):
    config = tiny_config("llama", vocab_size=264, max_position_embeddings=10**6, eos_token_id=None)
    (tmp_path / "model").mkdir()
    folder = save_model(tiny_model("llama", vocab_size=264), config, tmp_path / "model")
    out = tmp_path / "a.mlxkv"
    words = ["generate", "--model", folder, "--prompt", TEXT, "--max-tokens", 10**6, "--save", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxkv", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    beginning = process.stdout.read(40)  # so many are written only while it generates
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")
    text, _, line = (beginning + rest).decode("utf-8", "replace").rstrip().rpartition("\n\n")
    assert len(text) > 10
    assert "finish reason interrupted" in line
    assert f"saved {out}" in line
    record = says("generate", out, "--model", folder, *MORE)
    assert f"generated tokens {record['cached_tokens'] - len(TEXT):,}," in line
