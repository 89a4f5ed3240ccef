"""Every model type of the installed mlx-lm: known to the zoo, and a sample of them put to use."""

from zoo.build import CANNOT_RUN, model_types
from zoo.configurations import CONFIGURATIONS


def test_every_model_type_of_mlx_lm_has_a_configuration_or_a_stated_reason():
    assert set(model_types()) - set(CONFIGURATIONS) - set(CANNOT_RUN) == set()


def test_no_configuration_is_of_a_model_type_that_mlx_lm_does_not_have():
    assert set(CONFIGURATIONS) | set(CANNOT_RUN) <= set(model_types())
