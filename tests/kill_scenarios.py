"""The write paths that `killing.py` kills: those of the io layer on made-up bytes, and whole commands."""

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from kill_store_scenarios import STORE_SCENARIOS
from killing import Scenario, in_child
from synthetic import PLAIN, stream_values, toy_sensitivity
from talking import dictated, tiny_talker

from mlxkv import lm
from mlxkv.codec import library
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods import codec_methods
from mlxkv.codec.stages.entropy import even_tables
from mlxkv.config import Config
from mlxkv.dump import KVDump, read_dump, write_dump
from mlxkv.errors import InputError
from mlxkv.evaluate import evaluations, machine, runner
from mlxkv.evaluate.evaluation import EvalSample, Evaluation
from mlxkv.evaluate.variants import CachedContext, Variant
from mlxkv.io import container, growing
from mlxkv.io.atomic import atomic_write
from mlxkv.io.container import Reader, encode_section
from mlxkv.io.safetensors import SafetensorsReader
from mlxkv.live.prompt_files import write_prompt_cache
from mlxkv.live.seam import make_cache
from mlxkv.live.serialization import save_cache
from mlxkv.session import Session

FIXTURES = Path(__file__).parent / "fixtures"


def blob(*sections, seed=0):
    """A container of sections of so many random bytes."""
    random, out = np.random.default_rng(seed), io.BytesIO()
    container.write(out, {"seed": seed}, [encode_section(str(i), random.bytes(n)) for i, n in enumerate(sections)])
    return out.getvalue()


KEPT = 12 + 300  # of these two, which begin with the same section
OLD, NEW, OTHER = blob(300, 500), blob(300, 900, 70), blob(40, 30, seed=1)


class ContainerWrite(Scenario):
    """A container written under its name, where there is none or another, or one with an append that died."""

    old, pending, new = None, False, OTHER

    def __init__(self, folder):
        pass

    def prepare(self, folder):
        if self.old:
            (folder / "a").write_bytes(self.old)
        if self.pending:
            really, growing._apply = growing._apply, lambda *_: False
            growing.replace_tail(folder / "a", KEPT, NEW[KEPT:])
            growing._apply = really

    def write(self, folder):
        with atomic_write(folder / "a") as file:
            file.write(self.new)

    def read(self, folder):
        if not (folder / "a").exists():
            return None
        with Reader(folder / "a") as reader:
            reader.verify()
            reader._file.seek(0)
            return reader._file.read()


class Overwrite(ContainerWrite):
    old = OLD


class OverwriteSame(ContainerWrite):
    """An old file written again, which an append that died has gone on with: the append is gone then."""

    old, pending, new = OLD, True, OLD


class OverwritePending(ContainerWrite):
    old, pending = OLD, True


class InPlace(ContainerWrite):
    """As no one should write: without another name or a journal."""

    old = OLD

    def write(self, folder):
        (folder / "a").write_bytes(self.new)


class Hasty(Overwrite):
    """As no one should either: a part of the new end is put into the file before the journal is complete."""

    new = NEW

    def write(self, folder):
        really = growing.write_journal

        def hasty(file, data, *arguments):
            (folder / "a").write_bytes(NEW[: KEPT + 100])
            return really(file, data, *arguments)

        growing.write_journal = hasty
        growing.replace_tail(folder / "a", KEPT, NEW[KEPT:])


class Append(ContainerWrite):
    old, new = OLD, NEW

    def write(self, folder):
        growing.replace_tail(folder / "a", KEPT, self.new[KEPT:])


class AppendShorter(Append):
    old, new = NEW, OLD


class AppendToPending(Append):
    pending, new = True, blob(300, 900, 70, 2000)


class FinishPending(Append):
    """Only the earlier append is finished: a reader finds no difference."""

    pending, new, changes = True, NEW, False

    def write(self, folder):
        growing.finish_interrupted_append(folder / "a")


class Dump(ContainerWrite):
    old = None

    def write(self, folder):
        write_dump(folder / "a", toy(12))

    def read(self, folder):
        return read_dump(folder / "a").tokens.tobytes() if (folder / "a").exists() else None


class DumpOverwrite(Dump):
    def prepare(self, folder):
        write_dump(folder / "a", replace(toy(12), tokens=toy(12).tokens + 1))


class Artifacts(Scenario):
    """Artifacts written to a folder."""

    overwrite = False

    def __init__(self, folder):
        self.old, self.new = (
            CalibrationArtifacts.from_dir(FIXTURES / name / "artifacts") for name in ("golden_rd", "golden")
        )

    def write(self, folder):
        self.new.save(folder / "a", self.overwrite)

    def write_again(self, folder):
        try:
            self.write(folder)
        except InputError:  # the killed one got so far
            if self.read(folder) != self.new.fingerprint:
                raise

    def read(self, folder):
        return CalibrationArtifacts.from_dir(folder / "a").fingerprint if (folder / "a").exists() else None


class ArtifactsOverwrite(Artifacts):
    overwrite = True

    def prepare(self, folder):
        self.old.save(folder / "a")


class LibraryAdd(Artifacts):
    """Artifacts added to the user's own."""

    def prepare(self, folder):
        os.environ["MLXKV_ARTIFACTS"] = str(folder / "a")
        library.add(self.old)

    def write(self, folder):
        library.add(self.new)

    write_again = write

    def read(self, folder):
        found = library.items()
        assert not any(item.problem for item in found)
        return {CalibrationArtifacts.from_dir(item.folder).fingerprint for item in found}


class LibraryRemove(LibraryAdd):
    def prepare(self, folder):
        super().prepare(folder)
        library.add(self.new)

    def write(self, folder):
        library.remove(self.new.fingerprint)

    def write_again(self, folder):
        if self.new.fingerprint in self.read(folder):
            self.write(folder)
        library.add(self.old)
        assert os.listdir(folder / "a") == [self.old.fingerprint]


class WorkKeep(Scenario):
    """A finished stretch of a calibration, put aside for whoever goes on."""

    def __init__(self, folder):
        from mlxkv.calibration.texts import Stretch
        from mlxkv.calibration.work import Work

        dump = toy(12)
        self.dump = replace(dump, sensitivity=toy_sensitivity(dump))
        self.work = lambda: Work(dump.fingerprint, dump.spec, [Stretch("prose", dump.tokens[0].tolist())])

    def prepare(self, folder):
        os.environ["MLXKV_HOME"] = str(folder / "a")

    def write(self, folder):
        work = self.work()
        if work.finished() != {0}:
            work.keep(0, self.dump)
        work.close()

    def read(self, folder):
        return [read_dump(path).tokens.tobytes() for path in (folder / "a").glob("calibrating/[!.]*/0*.npz")]


class WorkRemove(WorkKeep):
    """The same removed, as the artifacts are saved."""

    def prepare(self, folder):
        super().prepare(folder)
        super().write(folder)

    def write(self, folder):
        self.work().remove()
        assert not os.listdir(folder / "a" / "calibrating") or self.read(folder)


class AnyEvaluation(Evaluation):
    """Three samples, measured without a model."""

    options_class = type("Options", (Config,), {"__doc__": "None."})
    scores = ("score",)

    def samples(self, tokenizer, seed):
        def measure(model, tokenizer, variants):
            return [{"variant": variant.name, "ratio": 1.0, "score": 1.0} for variant in variants]

        return [EvalSample({"number": number}, measure) for number in range(3)]


class Eval(Scenario):
    """`mlxkv eval` with --out."""

    def __init__(self, folder):
        from mlxkv.cli import eval as command

        self.command = command
        evaluations.names()
        evaluations._things["any"] = AnyEvaluation
        runner.baseline = lambda: Variant("whole", {}, lambda *_: CachedContext([], {}))
        lm.load, lm.fingerprint, lm.quantization = lambda *_: (None, None), lambda *_: "f00d", lambda *_: None
        facts = machine.describe()
        machine.describe = lambda: facts

    def write(self, folder):
        self.command._evaluate(
            "any", AnyEvaluation.options_class(), words="", model="m", cache=["int8"], method=None, artifacts=None, recent=None, sinks=None, dtype="auto",
            limit=None, seeds=1, out=folder / "a", html=None, json=True,
        )  # fmt: skip

    def read(self, folder):
        return (folder / "a").read_bytes() if (folder / "a").exists() else None


class SaveCache(ContainerWrite):
    """A live cache saved."""

    uses_mlx = True

    def write(self, folder, tokens=(3, 1, 4, 1, 5)):
        import mlx.core as mx

        model = tiny_model("llama")
        cache = make_cache(model, "int8")
        model(mx.array([tokens]), cache=cache)
        save_cache(folder / "a", model, cache)


class SaveCacheOverwrite(SaveCache):
    def prepare(self, folder):
        in_child(lambda: super(SaveCacheOverwrite, self).write(folder, (2, 7)))


class PromptCache(ContainerWrite):
    """A prompt cache of mlx-lm's own form."""

    uses_mlx, layout = True, "0.32"

    def write(self, folder, tokens=(3, 1, 4, 1, 5)):
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        model = tiny_model("llama")
        cache = make_prompt_cache(model)
        model(mx.array([tokens]), cache=cache)
        write_prompt_cache(folder / "a", model, cache, tokens=tokens, layout=self.layout)

    def read(self, folder):
        if not (folder / "a").exists():
            return None
        with SafetensorsReader(folder / "a") as reader:
            return reader.metadata, {name: reader.read(name) for name in reader.arrays}


class PromptCacheOverwrite(PromptCache):
    layout = "0.31"

    def prepare(self, folder):
        in_child(lambda: super(PromptCacheOverwrite, self).write(folder, (2, 7)))


class SessionTurn(ContainerWrite):
    """A turn of a conversation; a killed process also leaves a mark that it owned the file."""

    uses_mlx = True

    def __init__(self, folder):
        codec_methods.names(), even_tables()  # here, and not in each forked process again
        self.begun = folder / "begun"
        if not self.begun.exists():
            self.begun.mkdir()
            in_child(self.talk, self.begun, 1)

    def prepare(self, folder):
        shutil.copy(self.begun / "a", folder / "a")

    def write(self, folder):
        self.talk(folder, 2)

    def talk(self, folder, turns):
        model, spoken = tiny_talker()
        with Session(model, spoken, folder / "a") as session:
            if session.turns < turns:  # the process that follows a killed one finds out how far that came
                session.send("Hello", sampler=dictated(spoken, "Hi."))
                session.save()

    def read(self, folder):
        with Reader(folder / "a") as reader:
            reader.verify()
            return reader.header["meta"]["notes"]["messages"], [reader.read(name) for name in reader.sections]


def toy(length):
    k, v = (stream_values(PLAIN.stream(name), 1, length, 0).astype(np.float16) for name in "kv")
    return KVDump(k, v, PLAIN, np.arange(length, dtype=np.int32)[None], "a/toy", "f00d.cafe", "float16")


class Command(ContainerWrite):
    """A whole command."""

    uses_mlx = True

    def __init__(self, folder):
        from mlxkv.cli import main

        codec_methods.names()  # here, and not in each forked process again
        self.main, self.given = main, folder / "given"
        if not self.given.exists():
            self.given.mkdir()
            in_child(self.give)

    def give(self):
        for length in (300, 700, 1200):
            write_dump(self.given / f"{length}.npz", toy(length))
        self.run(
            "calibrate", "--npz", self.given / "300.npz", "--compression-ratio", 4, "--out", self.given / "artifacts"
        )
        self.run("compress", *self.of(700), "--out", self.given / "700.mlxkv")

    def of(self, length):
        return "--npz", self.given / f"{length}.npz", "--artifacts", self.given / "artifacts"

    def run(self, *words):
        with pytest.raises(SystemExit) as ended:
            self.main([str(word) for word in words])
        if ended.value.code:
            raise RuntimeError(f"{words} ended with {ended.value.code}")


class Compress(Command):
    def write(self, folder):
        self.run("compress", *self.of(700), "--out", folder / "a")


class CompressAppend(Command):
    def prepare(self, folder):
        shutil.copy(self.given / "700.mlxkv", folder / "a")

    def write(self, folder):
        self.run("compress", *self.of(1200), "--out", folder / "a", "--append")


class Convert(Command):
    def write(self, folder):
        self.run(
            "convert", self.given / "700.npz", folder / "a", "--to", "mlxkv", "--artifacts", self.given / "artifacts"
        )


class Calibrate(Command):
    def prepare(self, folder):
        shutil.copytree(self.given / "artifacts", folder / "a")

    def write(self, folder):
        self.run(
            "calibrate", "--npz", self.given / "300.npz", "--compression-ratio", 5, "--out", folder / "a", "--overwrite"
        )

    read = Artifacts.read


SCENARIOS = {
    "in-place": InPlace,
    "hasty": Hasty,
    "write": ContainerWrite,
    "overwrite": Overwrite,
    "overwrite-pending": OverwritePending,
    "overwrite-same": OverwriteSame,
    "append": Append,
    "append-shorter": AppendShorter,
    "append-to-pending": AppendToPending,
    "finish-pending": FinishPending,
    "dump": Dump,
    "dump-overwrite": DumpOverwrite,
    "artifacts": Artifacts,
    "artifacts-overwrite": ArtifactsOverwrite,
    "library-add": LibraryAdd,
    "library-remove": LibraryRemove,
    "work-keep": WorkKeep,
    "work-remove": WorkRemove,
    "eval": Eval,
    "save-cache": SaveCache,
    "save-cache-overwrite": SaveCacheOverwrite,
    "prompt-cache": PromptCache,
    "prompt-cache-overwrite": PromptCacheOverwrite,
    "session-turn": SessionTurn,
    "compress-command": Compress,
    "append-command": CompressAppend,
    "convert-command": Convert,
    "calibrate-command": Calibrate,
    **STORE_SCENARIOS,
}
