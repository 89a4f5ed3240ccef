#!/usr/bin/env bash
# A chat with a prompt cache should have the model read what the chat template makes of the conversation so far. mlx_lm.chat
# puts only the newest message through the template, as if it were a conversation of its own, and appends that to the cache:
# whatever the template writes once, at the beginning, comes again at every turn. That is --system-prompt, and without one
# the system message that a template adds by itself, as SmolLM2's does. Nothing says so. The cache grows by these tokens, and
# a program that renders the whole conversation finds its own beginning in the cache, but not what follows the first answer.
# So whoever keeps the cache of a conversation has to render all of it, and feed what is new.
set -euo pipefail

temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
cd "$temp"

mlx="mlx==0.32.4"
if [ "$(uname)" = Linux ]; then
  mlx="mlx[cpu]==0.32.4"
fi
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check "$mlx" mlx-lm==0.32.2 transformers==5.24.0

TRANSFORMERS_VERBOSITY=error venv/bin/python -I - <<'PYTHON'
import contextlib
import io
import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import chat
from mlx_lm.models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = "<none> <end> <system> <user> <assistant> be brief and kind hello there how are you who is fine thanks a model".split()
ANSWERS = ["<assistant>", "fine", "thanks", "<end>"]  # the model's answer to anything
SAID = ["hello there", "how are you", "who is there"]
TEMPLATE = """
{%- if messages[0].role != "system" %}{{ "<system> be kind <end> " }}{% endif %}
{%- for message in messages %}{{ "<" + message.role + "> " + message.content + " <end> " }}{% endfor %}
{%- if add_generation_prompt %}{{ "<assistant> " }}{% endif %}"""
CONFIG = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2,
          "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": len(WORDS), "tie_word_embeddings": False}


def make_tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<none>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<none>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_model(folder):
    """A llama of one layer, of which only embeddings and head have an effect: each token has one successor."""
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    weights = dict(tree_flatten(model.parameters()))
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(weights[name])
    weights["model.embed_tokens.weight"] = mx.eye(len(WORDS), CONFIG["hidden_size"])
    head = mx.zeros((len(WORDS), CONFIG["hidden_size"]))
    for token, successor in zip(ANSWERS, ANSWERS[1:]):
        head[WORDS.index(successor), WORDS.index(token)] = 1.0
    weights["lm_head.weight"] = head
    mx.save_safetensors(f"{folder}/model.safetensors", weights)
    Path(folder, "config.json").write_text(json.dumps(CONFIG))


def converse(folder, options):
    """Run mlx_lm.chat on what is said; return the words that its model read and the entries of its cache."""
    read, caches = [], []
    forward = llama.Model.__call__

    def recorded(self, inputs, cache=None, **rest):
        read.extend(inputs.reshape(-1).tolist())
        caches[:] = cache
        return forward(self, inputs, cache=cache, **rest)

    arguments, keyboard, llama.Model.__call__ = sys.argv, sys.stdin, recorded
    sys.argv = ["mlx_lm.chat", "--model", folder, *options]
    sys.stdin = io.StringIO("\n".join([*SAID, "q"]) + "\n")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            chat.main()
    finally:
        sys.argv, sys.stdin, llama.Model.__call__ = arguments, keyboard, forward
    assert caches[0].offset == len(read), "not every token that was read is in the cache"
    return [WORDS[token] for token in read]


def rendered(tokenizer, system):
    """The same conversation as the template renders it."""
    messages = [{"role": "system", "content": system}] if system else []
    for said in SAID:
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": " ".join(ANSWERS[1:-1])}]
    return tokenizer.apply_chat_template(messages, tokenize=False).split()


def show(words):
    return " ".join(words).replace(" <end> ", " <end>\n    ")


folder = "model"
tokenizer = make_tokenizer()
tokenizer.save_pretrained(folder)
write_model(folder)
print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, transformers {version('transformers')}")
print("mlx_lm.chat begins every turn as if it were a new conversation.\n")
seen = []
for title, system in (("--system-prompt 'be brief'", "be brief"), ("no --system-prompt; the template adds 'be kind'", None)):
    read, whole = converse(folder, ["--system-prompt", system] if system else []), rendered(tokenizer, system)
    seen.append((read.count("<system>"), whole.count("<system>"), read == whole))
    print(f"{title}\n  in the cache, {len(read)} tokens:\n    {show(read)}")
    print(f"  the template's conversation, {len(whole)} tokens:\n    {show(whole)}\n")
if seen != [(len(SAID), 1, False)] * 2:
    sys.exit(f"The behaviour has changed: expected a system message a turn in the cache, one in the conversation, seen {seen}")
print("As described.")
PYTHON
