"""Train the byte-level miniatures of LFM2, Qwen3, GLM-4.7-Flash and GPT-2.

A miniature is what `checkpoints/<name>/config.json` describes, in mlx-lm's own model code, trained on Python's
documentation and the standard library's sources (`benchmarks/miniature_texts.py`). Training replaces the folder's
weights when it is done; the benchmark `miniatures` then measures them.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.miniature_training lfm2 qwen3 glm gpt2 [--steps 450]

A step runs each half of its batch on a CPU thread of its own, hence one BLAS thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import SwitchGLU
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import miniature_texts as texts
from mlxkv.bundled import miniatures
from mlxkv.errors import InputError

BALANCE = 0.002  # an expert's bias moves by this much a step


@dataclass(frozen=True)
class Training:
    """How a miniature is trained. contexts: lengths in bytes, one a step in turn. tokens: bytes a step."""

    steps: int = 450
    tokens: int = 2048
    contexts: tuple[int, ...] = (256, 512, 256, 256, 1024, 256, 512, 256, 256, 2048)
    learning_rate: float = 3e-3
    warmup: int = 40
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.warmup < self.steps:
            raise InputError(f"warm-up must end before the last of {self.steps} steps, not after {self.warmup}")
        if not self.contexts or not all(texts.SHORTEST <= context <= self.tokens for context in self.contexts):
            raise InputError(f"contexts must lie in {texts.SHORTEST}..{self.tokens}, not {self.contexts}")


def main() -> None:
    known = sorted(path.parent.name for path in miniatures.FOLDER.glob("*/config.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=known, metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--steps", type=int, default=Training.steps, help="each reads 2,048 bytes")
    arguments = parser.parse_args()
    for name in arguments.names:
        model, record = train(name, Training(arguments.steps))
        save(model, config_of(name), record, miniatures.FOLDER / name)


def config_of(name: str) -> dict[str, Any]:
    """The mlx-lm configuration of a miniature."""
    return json.loads((miniatures.FOLDER / name / "config.json").read_text())


def build(config: dict[str, Any], seed: int) -> Any:
    """A float32 model with mlx-lm's initial weights, except routers: GLM's start at zero and would all choose alike; and
    learned positions, which start as sinusoids: from noise a model this small never learns to find the byte before."""
    mx.random.seed(seed)
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    for part in model.modules():
        if "wpe" in part:
            part.wpe.weight = sinusoids(*part.wpe.weight.shape)
    for block in expert_blocks(model):
        block.gate.weight = 0.02 * mx.random.normal(block.gate.weight.shape)
        owner, bias = router_bias(block)
        owner.freeze(keys=bias, recurse=False)
        # Same weights and outputs; it also counts, which balancing needs.
        block.switch_mlp.__class__ = CountingExperts
    return model


def sinusoids(length: int, dims: int) -> mx.array:
    """Positions `[length, dims]` as sines and cosines (https://arxiv.org/abs/1706.03762), as large as the embeddings. The
    longest wave is 628 positions, not 62,832: neighbours differ more, and the byte before is found sooner."""
    angles = mx.arange(length)[:, None] * 100 ** (-mx.arange(0, dims, 2) / dims)
    return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1) * (2 / dims) ** 0.5


class CountingExperts(SwitchGLU):
    """mlx-lm's experts that remember how many tokens chose each of them in the last call, `[experts]`."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        experts = mx.arange(self.up_proj.num_experts)
        self._chosen = (indices.reshape(-1, 1) == experts).sum(0)  # an underscore: not a parameter
        return super().__call__(x, indices)


def expert_blocks(model: Any) -> list[Any]:
    """The model's mixture-of-experts blocks."""
    return [module for _, module in model.named_modules() if "switch_mlp" in module]


def router_bias(block: Any) -> tuple[Any, str]:
    """The module that holds the bias added to the router's scores when experts are chosen, and its name."""
    return (block, "expert_bias") if "expert_bias" in block else (block.gate, "e_score_correction_bias")


def balance(model: Any) -> None:
    """Favour experts that the last step chose too rarely (https://arxiv.org/abs/2408.15664)."""
    for block in expert_blocks(model):
        chosen = block.switch_mlp._chosen
        owner, bias = router_bias(block)
        owner[bias] = owner[bias] + BALANCE * mx.sign(chosen.mean() - chosen)


def parameters(model: Any) -> dict[str, mx.array]:
    """All weights by name."""
    return cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))


def train(name: str, settings: Training) -> tuple[Any, dict[str, Any]]:
    """The trained model, and a record of the training: settings, parameters, seconds and every step's loss."""
    model = build(config_of(name), settings.seed)
    rate = optim.join_schedules(
        [
            optim.linear_schedule(0, settings.learning_rate, settings.warmup),
            optim.cosine_decay(settings.learning_rate, settings.steps - settings.warmup, settings.learning_rate / 50),
        ],
        [settings.warmup],
    )
    optimizer = optim.AdamW(rate, betas=[0.9, 0.95], weight_decay=0.1)
    gradient = split_gradient(model)
    streams, rng = texts.training(), np.random.default_rng(settings.seed)
    losses = []
    start = perf_counter()
    loss_column = TextColumn("{task.description}, {task.fields[loss]:.2f} bits per byte")
    with Progress(loss_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(name, total=settings.steps, loss=8.0)
        for step in range(settings.steps):
            context = settings.contexts[step % len(settings.contexts)]
            loss, gradients = gradient(texts.batch(streams, settings.tokens // context, context, rng))
            clipped, _ = optim.clip_grad_norm(gradients, settings.clip)  # type: ignore[no-untyped-call]
            optimizer.update(model, clipped)
            balance(model)
            mx.eval(loss, model.parameters(), optimizer.state)
            losses.append(round(loss.item() / np.log(2), 3))
            progress.update(task, advance=1, loss=np.mean(losses[-len(settings.contexts) :]))
    return model.eval(), {
        **dataclasses.asdict(settings),
        "parameters": sum(value.size for value in parameters(model).values()),
        "seconds": round(perf_counter() - start, 1),
        "bits_per_byte_by_step": losses,
    }


def split_gradient(model: Any) -> Callable[[mx.array], tuple[mx.array, Any]]:
    """A function of a batch `[B, T]`: mean loss in nats and gradients, each half of the batch on its own thread."""
    value_and_grad = nn.value_and_grad(model, partial(mean_loss, model))  # type: ignore[attr-defined]
    threads = [mx.new_stream(mx.default_device()) for _ in range(2)]

    def gradient(batch: mx.array) -> tuple[mx.array, Any]:
        halves = mx.split(batch, 2) if len(batch) % 2 == 0 else [batch]
        results = []
        for thread, half in zip(threads, halves):
            with mx.stream(thread):
                results.append(value_and_grad(half))
        return tree_map(lambda *parts: sum(parts) / len(parts), *results)

    return gradient


def mean_loss(model: Any, rows: mx.array) -> mx.array:
    """Mean cross-entropy in nats of each next byte, rows `[B, T]`."""
    return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="mean")


def save(model: Any, config: dict[str, Any], record: dict[str, Any], folder: Path) -> None:
    """Write a directory that `mlx_lm.load` reads: configuration, float16 weights, tokenizer; and `training.json`."""
    folder.mkdir(exist_ok=True)
    weights = {name: value.astype(mx.float16) for name, value in parameters(model).items()}
    texts.tokenizer().save_pretrained(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "training.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
