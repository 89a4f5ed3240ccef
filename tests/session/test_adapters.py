"""Models with an adapter (LoRA): loaded by a folder, and told from the model without it."""

import mlx.core as mx
import pytest
from talking import adapter_folder, talker_folder

from mlxkv import lm
from mlxkv.errors import InputError, MismatchError
from mlxkv.session import Session


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model's folder, and that of an adapter of it."""
    return talker_folder(tmp_path_factory.mktemp("talker")), adapter_folder(tmp_path_factory.mktemp("adapter"))


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
