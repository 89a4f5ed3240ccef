"""One small configuration for each model type of mlx-lm, written from what its ModelArgs ask for."""

from zoo.configurations import dense, hybrid, mla, moe, windows, wrappers

CONFIGURATIONS = {
    **dense.CONFIGURATIONS,
    **moe.CONFIGURATIONS,
    **windows.CONFIGURATIONS,
    **mla.CONFIGURATIONS,
    **hybrid.CONFIGURATIONS,
    **wrappers.CONFIGURATIONS,
}
