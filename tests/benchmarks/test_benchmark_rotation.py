"""The experiment on sinks and rotation, on a tiny model."""

from conftest import tiny_model, tiny_tokens

from benchmarks.experiments import rotation
from mlxkv.models import cache_spec


def test_every_variant_is_measured_beside_itself_with_neither_part(monkeypatch):
    monkeypatch.setattr(rotation, "CONTEXT", 256)
    monkeypatch.setattr(rotation, "PREDICT", 8)
    model = tiny_model("llama", num_hidden_layers=2, head_dim=64)
    samples = list(rotation.measured("tiny", model, cache_spec(model), {"text": tiny_tokens(300)}))
    rows = {row["variant"]: row for row in rotation.summarise(samples)}
    assert list(rows) == list(rotation.variants())
    assert rows["int8"]["kl"] < rows["int4"]["kl"]
    assert rows["int4, neither"]["kl_of_before"] == 1
    assert rows["kivi-2"]["cache_bytes"] == rows["kivi-2, neither"]["cache_bytes"]
    said = rotation.section({"config": {"context": 256, "predict": 8}, "summary": list(rows.values())})
    assert "| tiny | int4, sinks only |" in said
