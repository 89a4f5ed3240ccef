"""Prompt caches that mlx-lm wrote, damaged and forged: they have no checksums that would have to be right."""

import json
import struct

import mlx.core as mx
from prompt_cache_models import FILES, FOLDER, exact_model, tokens_of

from fuzz.mutations import edit_bytes, edit_json
from mlxkv import conversion
from mlxkv.errors import MlxkvError
from mlxkv.live.prompt_files import read_prompt_cache

VARIANTS = [f"{version} {name}" for version in ("0.31.3", "0.32.2") for name in FILES if name != "chunks"]


def forged(recipe):
    """The bytes of a file whose header, arrays or bytes have changed."""
    version, name = recipe["variant"].split(" ")
    data = (FOLDER / version / f"{name}.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:start]), data[start:]
    edits = [(one["kind"], one["part"], one["edit"]) for one in recipe["edits"]]
    for kind, part, edit in edits:
        if kind == "json":  # mostly of the text in it, which holds classes and numbers
            header = edit_json(header, edit) if part % 3 == 0 else header | _with_text(header, edit)
        elif kind == "bytes" and part % 2:
            body = edit_bytes(body, edit)
    text = json.dumps(header).encode("utf-8", "replace")
    data = struct.pack("<Q", len(text)) + text + body
    for kind, part, edit in edits:
        if kind == "bytes" and not part % 2:
            data = edit_bytes(data, edit)
    return data


def _with_text(header, edit):
    """The header's text with one edit, of which only text is left: anything else is refused at once."""
    if not isinstance(found := header.get("__metadata__"), dict):
        return {}
    changed = edit_json(found, edit)
    return {
        "__metadata__": {str(key): value if isinstance(value, str) else str(value) for key, value in changed.items()}
    }


def read(recipe, folder, inspect):
    """Prompt caches of both layouts: a model goes on from them, and other kinds are made of them."""
    name, path = recipe["variant"].split(" ")[1], folder / "a.safetensors"
    model = exact_model(FILES[name][0])
    path.write_bytes(forged(recipe))
    inspect(path)
    cache = read_prompt_cache(path, model)
    for token in (3, 5):
        mx.eval(model(mx.array([[token]]), cache=cache))
    for kind in conversion.KINDS:
        content = conversion.read_content(path, conversion.PROMPT, model)
        content.tokens = content.tokens or tokens_of(name)
        try:
            conversion.write_content(path.with_name("b"), kind, content, model, method="int8")
        except MlxkvError:
            continue
        conversion.read_content(path.with_name("b"), "prompt" if kind == conversion.OLD_PROMPT else kind, model)
