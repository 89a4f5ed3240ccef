"""The stages of transform coding, one a file, each beside its inverse. They know arrays and tables, not files or caches.

| stage | does | inverse | used by |
|---|---|---|---|
| `rows` | layers to un-rotated token rows | `from_rows` | all |
| `weighting` | weights rows by the model's sensitivity | `invert_weights` | kvtc-weighted, kvtc-rd |
| `pca` | learns principal components | transposed basis | kvtc, kvtc-weighted |
| `basis` | learns and stores principal components in few bytes | `Basis.reconstruct` | kvtc-rd |
| `plan` | distributes bits over components | - | kvtc, kvtc-weighted |
| `quantize`, `payload` | groups of coefficients to packed bytes | `decode_block` | kvtc, kvtc-weighted |
| `dead_zone` | coefficients to integers by one step | `dequantize` | kvtc-rd |
| `entropy` | integers to bytes by static tables and rANS | `decode` | kvtc-rd |
"""
