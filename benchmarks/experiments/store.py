"""Prompts that survive a restart: `mlxkv serve` against `mlx_lm.server`, and against mlx-lm's own files of the same caches.

All in one run on one machine, in processes of their own, over HTTP and streaming: time to the first token of a question about
a text of 2,048 tokens, cold, from memory and after the server was started again, its files out of the system's memory, of texts of kinds
that nothing was learnt from; bytes on disk and predictions of the next 128 tokens from what comes back; bytes written by a conversation of
50 turns, and those of a branch; 1, 8 and 32 clients at once. Both servers load one folder of float32 weights, the fast type of CPUs, and
multiply by the same BLAS; mlx_lm.server also runs with its caches behind it in raw files. Calibrated blocks are coded by the newest
artifacts that the library ($MLXKV_ARTIFACTS) has of the model; where it has none, `mlxkv calibrate --model` makes them first, as a user
does, in a library of its own. Quick: a miniature, one short text, without calibration.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks import served, stored, texts
from benchmarks.schema import HYBRID, MODEL, NAMED, Outcome, Result
from benchmarks.serving import float32_folder
from benchmarks.tables import megabytes, percent, table
from mlxkv import lm
from mlxkv.codec import library

PHASE = 8
PREDICT, CLIENTS, ROUNDS, TURNS, BRANCH = 128, (1, 8, 32), 1, 50, 5
ASKED = 3  # texts that servers are asked about
# Tokens of the prefix; of the conversation's system prompt, a message and an answer: what each model was trained to read.
LENGTHS = {MODEL: 2048, "gemma3-270m": 2048, HYBRID: 1792}
TALK = {MODEL: (512, 40, 80), "gemma3-270m": (512, 40, 80), HYBRID: (256, 10, 24)}
QUICK = "miniature/qwen3"
QUICK_LENGTH, QUICK_TALK, QUICK_TURNS = 256, (64, 8, 8), 4


def run(quick: bool, model: str = MODEL) -> Outcome:
    name = QUICK if quick and model == MODEL else model
    length = QUICK_LENGTH if quick else LENGTHS[name]
    counts, rounds = ((2,), 1) if quick else (CLIENTS, ROUNDS)
    lengths, turns = (QUICK_TALK, QUICK_TURNS) if quick else (TALK[name], TURNS)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        log = work / "log"
        folder = float32_folder(name, work)
        loaded, tokenizer = lm.load(str(folder))
        libraries, facts = find_libraries(loaded, folder, work, calibrate=not quick)
        found = dict(list(passages().items())[: 1 if quick else None])
        tokens = {kind: tokenizer.encode(text)[: length + PREDICT + 1] for kind, text in found.items()}
        prefixes = {
            kind: tokenizer.decode(tokens[kind][:length], skip_special_tokens=True) for kind in list(tokens)[:ASKED]
        }
        speak = served.spoken(tokenizer.has_chat_template)
        first, together = [], []
        for contender in served.contenders(folder, libraries, work / "servers"):
            first += served.first_tokens(contender, prefixes, speak, log)
            if contender.name in (served.THEIRS, f"{served.OURS}, {next(iter(libraries))}"):
                together += served.clients(contender, speak, counts, rounds, log)
        samples = stored.prefixes(loaded, tokens, length, PREDICT, libraries, work / "prefixes")
        long = tokenizer.encode("\n\n".join(passages().values()))
        with stored.library(next(iter(libraries.values()))):
            talk = stored.conversation(loaded, long, lengths, turns, BRANCH, work / "conversation")
    config = {
        "model": name, "texts": list(found), "length": length, "predict": PREDICT, "clients": counts, "rounds": rounds,
        "turns": turns, "lengths": lengths, "load_average": round(os.getloadavg()[0], 2), **facts,
    }  # fmt: skip
    summary = {
        "first": summarise_first(first),
        "clients": together,
        "prefixes": summarise(samples),
        "conversation": talk,
    }
    return Outcome(config, [*first, *samples], summary)


def passages() -> dict[str, str]:
    """Return texts of six kinds that neither calibration nor a miniature has read, long enough for a prefix."""
    kinds = texts.OTHER_KINDS
    pairs = {"prose": ("legal", "essay"), "chat": ("chat-support", "chat-travel"), "story": ("story", "chat-code")}
    joined = {name: "\n\n".join(kinds[kind]() for kind in pair) for name, pair in pairs.items()}
    documentation = "\n".join(texts.documentation(held_out=True)[1:60])
    return {"code": kinds["code"](), **joined, "reference": kinds["reference"](), "documentation": documentation}


def find_libraries(model: Any, folder: Path, work: Path, calibrate: bool) -> tuple[dict[str, Path], dict[str, Any]]:
    """Return a library of artifacts for each mode, and where the calibrated one's come from; an empty one is of no artifacts."""
    (empty := work / "none").mkdir()
    libraries, facts = {"uncalibrated": empty, "exact": empty}, {}
    if calibrate:
        home, source = library.home(), "found"
        fingerprint = lm.fingerprint(model)
        if library.find(fingerprint, "kvtc-rd") is None:
            home, source = work / "artifacts", "made"
            command = [sys.executable, "-m", "mlxkv", "calibrate", "--model", str(folder)]
            subprocess.run(command, env={**os.environ, "MLXKV_ARTIFACTS": str(home)}, check=True)
        with stored.library(home):
            artifacts = library.find(fingerprint, "kvtc-rd")
        assert artifacts is not None
        facts = {"artifacts": artifacts.fingerprint, "artifacts_were": source}
        libraries = {"calibrated": home, **libraries}
    return libraries, facts


def summarise_first(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each server: medians of the seconds to the first token, tokens not computed, and texts as `mlx_lm.server`'s."""
    right = {
        (record["when"], record["passage"]): record["text"] for record in records if record["server"] == served.THEIRS
    }
    right |= {("restarted", passage): text for (when, passage), text in right.items() if when == "reference"}
    rows = []
    for server in dict.fromkeys(record["server"] for record in records):
        row: dict[str, Any] = {"server": server}
        for when in ("cold", "memory", "restarted"):
            group = [record for record in records if (record["server"], record["when"]) == (server, when)]
            row[when] = round(median(record["first"] for record in group), 4)
            row[f"{when}_cached"] = median(record["cached"] for record in group)
            row[f"{when}_same_text"] = sum(record["text"] == right[when, record["passage"]] for record in group)
            row[f"{when}_texts"] = len(group)
        rows.append({**row, "prompt": median(record["prompt"] for record in group)})
    return rows


def summarise(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each mode: bytes of all texts together, and mean divergence."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(sample["mode"], []).append(sample)
    rows = []
    raw = {bits: sum(sample["file_bytes"] for sample in groups[name]) for name, bits in stored.RAW.items()}
    for mode, group in groups.items():
        size = sum(sample["file_bytes"] for sample in group)
        rows.append({
            "mode": mode, "coding": group[0]["coding"], "texts": len(group), "file_bytes": round(size / len(group)),
            "folder_bytes": round(fmean(sample["folder_bytes"] for sample in group)),
            "ratio": round(raw[None] / size, 2), "ratio_16": round(raw[16] / size, 2),
            "kl": round(max(0.0, fmean(sample["kl"] for sample in group)), 6),
            "worst_kl": round(max(0.0, *(sample["kl"] for sample in group)), 6),
            "top1_agreement": round(fmean(sample["top1_agreement"] for sample in group), 4),
            "fetched": median(sample["fetched"] for sample in group),
            "fetch_seconds": round(median(sample["fetch_seconds"] for sample in group), 4),
        })  # fmt: skip
    return rows


def brief(result: Result) -> str:
    """Say what a README shows: a restart, bytes and predictions, without tables."""
    summary = result["summary"]
    theirs = summary["first"][0]
    raw, raw_16, mode = summary["prefixes"][:3]
    ours = next(row for row in summary["first"] if row["server"] == f"{served.OURS}, {mode['mode']}")
    return (
        f"After a restart the first token of an answer to {theirs['prompt']:,.0f} tokens comes after {ours['restarted']:.2f} s; computed"
        f" again, after {theirs['cold']:.1f} s. A text's first {result['config']['length']:,} tokens take {megabytes(mode['file_bytes'])}"
        f" on disk, where mlx-lm's own file takes {megabytes(raw['file_bytes'])} ({megabytes(raw_16['file_bytes'])} at 16 bits a number),"
        f" and predictions of the next {result['config']['predict']} diverge by {mode['kl']:.4f} nats."
    )


def section(result: Result) -> str:
    """Show times, bytes, predictions, a conversation, and clients."""
    config, summary = result["config"], result["summary"]
    model = NAMED.get(config["model"], config["model"])
    first = summary["first"]
    return "\n\n".join(
        [
            f"On {model}. Seconds to the first token, medians of {first[0]['cold_texts']} texts: prompts of about"
            f" {first[0]['prompt']:,.0f} tokens, of which a question is the last, cold, once more from memory and after a restart."
            " The same text is that of mlx_lm.server's answer to the same prompt.",
            table(("server", "cold", "from memory", "after a restart", "mlx_lm.server's cold over that", "tokens not computed", "same text"),
                  [first_cells(row, first[0]["cold"]) for row in first]),
            f"Files of a text's first {config['length']:,} tokens, means of {summary['prefixes'][0]['texts']} texts, and the"
            f" {config['predict']} tokens predicted from what comes back. Ratios are to mlx-lm's file as it writes it here, and to that"
            " of 16 bits a number.",
            table(("mode", "coding", "bytes", "ratio", "ratio at 16 bits", "KL", "worst text", "same next token", "seconds to read"),
                  [prefix_cells(row) for row in summary["prefixes"]]),
            talk_said(summary["conversation"]),
            "Clients at once, each with its own questions on one system prompt, and all before in its next prompt:",
            table(("server", "clients", "requests a second", "errors", "median first token", "95 %", "tokens not computed", "peak memory"),
                  [client_cells(row) for row in summary["clients"]]),
        ]
    )  # fmt: skip


def first_cells(row: Mapping[str, Any], cold: float) -> list[str]:
    """Return a row of the first table; `cold` is what a restart costs without files."""
    whens = ("cold", "memory", "restarted")
    same = ", ".join(f"{row[f'{when}_same_text']} of {row[f'{when}_texts']}" for when in whens)
    return [
        row["server"], *(f"{row[when]:.2f}" for when in whens), f"{cold / row['restarted']:.1f}x",
        f"{row['restarted_cached']:,.0f}", same,
    ]  # fmt: skip


def prefix_cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the second table."""
    return [
        row["mode"], row["coding"], megabytes(row["file_bytes"]), f"{row['ratio']:.1f}x", f"{row['ratio_16']:.1f}x",
        f"{row['kl']:.4f}", f"{row['worst_kl']:.4f}", percent(row["top1_agreement"]), f"{row['fetch_seconds']:.2f}",
    ]  # fmt: skip


def client_cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the last table."""
    first = [f"{row[name]:.2f}" if row[name] is not None else "-" for name in ("first_median", "first_95")]
    peak = megabytes(row["peak_bytes"]) if row["peak_bytes"] else "-"
    return [
        row["server"], str(row["clients"]), f"{row['requests_a_second']:.2f}", str(row["errors"]), *first,
        percent(row["cached_share"]), peak,
    ]  # fmt: skip


def talk_said(found: Mapping[str, Any]) -> str:
    """Say what a conversation and its branch wrote."""
    system = found["system_written_bytes"]
    counted = f" ({megabytes(system)} with its index, as the system counts them)" if system is not None else ""
    own = found["final_bytes"] / found["tokens"]
    return (
        f"A conversation of {found['turns']} turns, {found['tokens']:,} tokens, stored after each turn: {megabytes(found['written_bytes'])}"
        f" written{counted}, {found['written_bytes'] / found['final_bytes']:.2f} times its final {megabytes(found['final_bytes'])}."
        f" mlx-lm's file, written anew each turn, takes {megabytes(found['raw_written_bytes'])} for {megabytes(found['raw_bytes'])}."
        f" A branch from its middle, {found['branch_tokens']:,} tokens after {found['branch_shared']:,} that it shares, added"
        f" {found['branch_bytes'] / 1e6:.2f} MB, {found['branch_bytes'] / found['branch_tokens'] / own:.2f} times as much a token as the whole."
    )
