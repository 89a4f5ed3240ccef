"""The stages of transform coding, one per file, each beside its inverse.

They work on arrays and tables and know neither files nor caches.

| stage | does | inverse | used by |
|---|---|---|---|
| `rows` | layers to un-rotated token rows | `from_rows` | all |
| `weighting` | multiplies rows by weights from the model's sensitivity | `invert_weights` | kvtc-weighted, kvtc-rd |
| `pca` | learns principal components | transposed basis | kvtc, kvtc-weighted |
| `basis` | learns and stores principal components in few bytes | `Basis.reconstruct` | kvtc-rd |
| `plan` | allocates bits to components | - | kvtc, kvtc-weighted |
| `quantize`, `payload` | groups of coefficients to packed bytes | `decode_block` | kvtc, kvtc-weighted |
| `reflections` | gathers what a block's tokens have in common in its first rows | `reflect_back` | direct |
| `dead_zone` | coefficients to integers with one step size | `dequantize` | kvtc-rd, direct |
| `entropy` | integers to bytes with static tables and rANS | `decode` | kvtc-rd, direct |
"""
