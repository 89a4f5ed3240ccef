"""Transform coding of key/value caches after KVTC (arXiv 2511.01815): one method a file, one stage a file.

    kvtc     layers --rows--> [B*T, p] --pca--> [B*T, r] --plan, quantize, payload--> codes --deflate or rans--> container
    kvtc-rd  layers --rows--> [B*T, p] --weighting, basis--> [B*T, r] --dead_zone--> integers --entropy--> container

- `session`: `CacheCodec`, a cache to one container and back; `layout`, `writing`, `reading` and `unquantized` are its
  parts, and `summary` says where a file's bytes went.
- `calibrate`: dumps to `artifacts`, which hold what a method learns from `samples`.
- `methods`: the interface (`base`) and the methods that implement it.
- `stages`: arrays to arrays or bytes, each beside its inverse.

A new transform or quantizer is a stage, and a method that uses it. A new entropy coder of one method is a stage as well:
`BlockCoder.pack` and `unpack` call it, as `kvtc-rd` calls `stages/entropy.py`. One for every method that leaves its bytes
to the lossless stage is a coding in `mlxkv/io/lossless.py`.
"""
