"""Every model type of the installed mlx-lm: known to the zoo, and a sample of them put to use."""

import re

import pytest

from zoo.build import CANNOT_RUN, model_types
from zoo.configurations import CONFIGURATIONS
from zoo.report import PAGE, line, measured

# Each kind of cache once: windows and patterns of them, sinks, shared layers, chunks, indexers, recurrent states, latents beside
# them, lists of caches, layers of unequal shapes, caches that are never filled, wrappers. Convolutions (lfm2) and latents alone
# (glm4_moe_lite) are in the tests of every room.
SAMPLE = (
    "deepseek_v32",
    "falcon_h1",
    "gemma3_text",
    "gemma3n",
    "gemma4",
    "gpt_oss",
    "kimi_linear",
    "llama4",
    "longcat_flash_ngram",
    "mamba",
    "mimo_v2_flash",
    "minimax_m3_vl",
    "nemotron-nas",
    "qwen3_5",
    "step3p5",
)


def test_every_model_type_of_mlx_lm_has_a_configuration_or_a_stated_reason():
    assert set(model_types()) - set(CONFIGURATIONS) - set(CANNOT_RUN) == set()


def test_no_configuration_is_of_a_model_type_that_mlx_lm_does_not_have():
    assert set(CONFIGURATIONS) | set(CANNOT_RUN) <= set(model_types())


def test_the_page_of_models_names_every_type_once_in_its_table_or_among_those_not_covered():
    text = PAGE.read_text()
    table, listed = re.findall(r"^\| `(\S+)` \|", text, re.MULTILINE), re.findall(r"^- `(\S+)`: ", text, re.MULTILINE)
    assert table == sorted(set(table))
    assert set(table) | set(listed) == set(model_types())


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_does_what_the_page_of_models_says(name):
    row = measured(name)
    assert not row.wrong
    assert line(row) in PAGE.read_text().splitlines()
