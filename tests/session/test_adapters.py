"""Models with an adapter (LoRA): loaded by a folder, and told from the model without it."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from talking import talker_folder, tiny_talker

from mlxkv import lm
from mlxkv.errors import InputError, MismatchError
from mlxkv.session import Session

CONFIG = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.1}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model's folder, and that of an adapter of it."""
    adapter = tmp_path_factory.mktemp("adapter")
    model, _ = tiny_talker()
    linear_to_lora_layers(model, CONFIG["num_layers"], CONFIG["lora_parameters"])
    shapes = {name: x.shape for name, x in tree_flatten(model.parameters()) if name.endswith(("lora_a", "lora_b"))}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {n: mx.random.normal(s) for n, s in shapes.items()})
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG))
    return talker_folder(tmp_path_factory.mktemp("talker")), adapter


def test_a_model_with_an_adapter_is_another_model(folders, tmp_path):
    folder, adapter = folders
    plain, spoken = lm.load(str(folder))
    adapted, _ = lm.load(str(folder), adapter)
    assert not adapted.training
    assert not mx.allclose(plain(mx.array([[1, 2]])), adapted(mx.array([[1, 2]])))
    with Session(adapted, spoken, tmp_path / "a.mlxkv") as session:
        session.send("Hello", max_tokens=2)
        session.save()
    with pytest.raises(MismatchError, match="this model with this adapter"):
        Session(plain, spoken, tmp_path / "a.mlxkv")
    again, _ = lm.load(str(folder), str(adapter))
    assert Session(again, spoken, tmp_path / "a.mlxkv").turns == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", None, "no adapter_config.json"),
        ("adapter_config.json", "{", "cannot use the adapter"),
        ("adapter_config.json", "{}", "cannot use the adapter"),
        ("adapters.safetensors", None, "cannot use the adapter"),
        ("adapters.safetensors", "damaged", "cannot use the adapter"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_refused(folders, tmp_path, name, content, message):
    folder, adapter = folders
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        lm.load(str(folder), tmp_path)
