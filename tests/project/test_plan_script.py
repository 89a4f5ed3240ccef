"""The script of the real-model testing plan, phase 3, as it was written; only the import is ours."""

import re

import numpy as np
import pytest

from mlxkv import write_dump
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.lm import dump

SCRIPT = """
import numpy as np
from mlxkv import KVTCCacheCodec, CalibrationArtifacts, model_preset

preset = model_preset("lfm2")
arts = CalibrationArtifacts.from_dir("/tmp/kvtc_cal_lfm2/")
codec = KVTCCacheCodec(arts, recent=128, sinks=4, rope_cfg=preset.rope, mode=preset.mode)

data = np.load("/tmp/kvtc_lfm2_cache.npz")
k_orig = [data["k"][i] for i in range(data["k"].shape[0])]
v_orig = [data["v"][i] for i in range(data["v"].shape[0])]

blob = codec.compress(k_orig, v_orig)
k_hat, v_hat = codec.decompress(blob)

# Report
print(f"Blob size: {len(blob):,} bytes")
print(f"Original size: {sum(k.nbytes + v.nbytes for k, v in zip(k_orig, v_orig)):,} bytes")
print(f"Compression ratio: {sum(k.nbytes + v.nbytes for k, v in zip(k_orig, v_orig)) / len(blob):.1f}x")

# Check prefix/suffix exact match
for i in range(len(k_orig)):
    assert np.array_equal(k_hat[i][:, :, :4, :], k_orig[i][:, :, :4, :]), f"K prefix mismatch layer {i}"
    assert np.array_equal(k_hat[i][:, :, -128:, :], k_orig[i][:, :, -128:, :]), f"K suffix mismatch layer {i}"

# Check middle region MSE
for i in range(len(k_orig)):
    mid_orig = k_orig[i][:, :, 4:-128, :].astype(np.float32)
    mid_hat = k_hat[i][:, :, 4:-128, :].astype(np.float32)
    mse = np.mean((mid_orig - mid_hat) ** 2)
    print(f"  Layer {i} K mid MSE: {mse:.6f}")

print("LFM2 roundtrip OK")
"""


@pytest.mark.parametrize(
    ("tiny", "preset"),
    [("lfm2", "lfm2"), ("lfm2_moe", "lfm2"), ("gpt2", "gpt2"), ("llama", "llama")],
    indirect=["tiny"],
)
def test_the_plans_script_runs_as_written(tiny, preset, tmp_path, capsys):
    model, vocabulary = tiny, 90
    write_dump(tmp_path / "kvtc_lfm2_cache.npz", dump(model, [i * i % vocabulary for i in range(400)]))
    calibrate([tmp_path / "kvtc_lfm2_cache.npz"], KVTCConfig(2)).save(tmp_path / "kvtc_cal_lfm2")
    exec(SCRIPT.replace("/tmp/", f"{tmp_path}/").replace('model_preset("lfm2")', f'model_preset("{preset}")'), {})
    out = capsys.readouterr().out
    assert "LFM2 roundtrip OK" in out
    errors = [float(value) for value in re.findall(r"K mid MSE: ([\d.]+)", out)]
    assert len(errors) == len(np.load(tmp_path / "kvtc_lfm2_cache.npz")["k"])
    assert max(errors) < 0.1
