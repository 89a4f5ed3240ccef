"""Tiny models that talk: every character is a token, so that any text is read as it was written; answers may be dictated."""

import json
from unittest.mock import patch

import mlx.core as mx
from conftest import TINY, tiny_config, tiny_model
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers
from zoo.build import build, configuration
from zoo.configurations import CONFIGURATIONS

SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
LORA = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.1}}
CHARACTERS = 96
VOCABULARY = CHARACTERS + len(SPECIAL)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "trims answers": CHATML.replace("m['content'] }}", "m['content'] | trim }}"),
    "drops thinking": CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}"),
    "channels": CHATML.replace(
        "{{ m['content'] }}",
        "{% if '<|channel|>' in m['content'] %}{{ raise_exception('no channels') }}{% endif %}{{ m['content'] }}",
    ),
    "dates": "Today is {{ strftime_now('%d %B %Y') }}, {{ strftime_now(\"%H:%M:%S\") }}.\n" + CHATML,
    "none": None,
}
KINDS = ("llama", "lfm2", "glm4_moe_lite", "gemma3_text")  # plain, with convolutions, with latents, with windows


def tiny_talker(kind="llama", template="chatml", seed=0):
    """A random model and its tokenizer."""
    spoken = TokenizerWrapper(tokenizer(template))
    if kind in TINY:
        return tiny_model(kind, seed=seed, vocab_size=VOCABULARY), spoken
    with patch.dict(CONFIGURATIONS, {kind: {**CONFIGURATIONS[kind], "vocab_size": VOCABULARY}}):
        return build(kind, seed), spoken


def talker_folder(folder, kind="llama", template="chatml", seed=0):
    """The same as a folder that mlx-lm loads."""
    model, _ = tiny_talker(kind, template, seed)
    tokenizer(template).save_pretrained(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    config = tiny_config(kind) if kind in TINY else configuration(kind)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY}))
    return folder


def adapter_folder(folder):
    """An adapter of a tiny talker, as mlx-lm trains one."""
    model, _ = tiny_talker()
    linear_to_lora_layers(model, LORA["num_layers"], LORA["lora_parameters"])
    shapes = {name: x.shape for name, x in tree_flatten(model.parameters()) if name.endswith(("lora_a", "lora_b"))}
    mx.save_safetensors(str(folder / "adapters.safetensors"), {n: mx.random.normal(s) for n, s in shapes.items()})
    (folder / "adapter_config.json").write_text(json.dumps(LORA))
    return folder


def tokenizer(template):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shown = [
        pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(c))[0][0] for c in (10, *range(32, 127))
    ]
    own = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(shown)}, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATES[template]
    assert len(fast) == VOCABULARY
    return fast


def dictated(spoken, text, *, ends=True):
    """A sampler that says a text, and then nothing more."""
    tokens = spoken.encode(text, add_special_tokens=False) + [spoken.eos_token_id] * (3 if ends else 0)
    rest = iter(tokens)
    return lambda logprobs: mx.array([next(rest, spoken.eos_token_id)])
