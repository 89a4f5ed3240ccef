"""Transform coding of key/value caches after KVTC (arXiv 2511.01815): one method per file, one stage per file.

    kvtc     layers --rows--> [B*T, p] --pca--> [B*T, r] --plan, quantize, payload--> codes --deflate or rans--> container
    kvtc-rd  layers --rows--> [B*T, p] --weighting, basis--> [B*T, r] --dead_zone--> integers --entropy--> container
    direct   layers --rows--> [B*T, p] --reflections--> [B*T, p] --dead_zone--> integers --entropy--> container
    exact    layers --rows--> [B*T, p] --planes of bytes--> container

Vocabulary:

- A *stream* is the keys, or the values, of all caching layers and heads; a *row* `[p]` is one token of a stream, un-rotated.
- *Sinks* are the first tokens of a cache. *Recent* tokens are the newest `recent` ones; stored keys call them the *window*.
- A *block* is up to 512 rows of the tokens between, coded together: one section of the file per stream.
- A *shift* is the offset of a group in `quantize`, and an offset on the table index in `entropy`.
- A *lane* is a sequence of entropy-coded symbols that one thread decodes independently of the others.

Modules:

- `session`: `CacheCodec`, a cache to one container and back; `layout`, `writing`, `reading` and `unquantized` are its
  parts, and `summary` lists the sizes of a file's parts.
- `parts`: some tokens of a text to one container, and parts that follow each other back; `pieces` decodes them.
- `calibrate`: learns the `artifacts` of a method from `samples`, the rows of dumps, or makes those of a method that needs no
  calibration.
- `library`: artifacts in the user's data folder, found by model or by file; `entries` tells what there is.
- `methods`: the interface (`base`) and the methods that implement it.
- `stages`: arrays to arrays or bytes, each beside its inverse.

To add a transform or quantizer, write a stage and a method that uses it. An entropy coder of one method is a stage as well:
`BlockCoder.pack` and `unpack` call it, as `kvtc-rd` calls `stages/entropy.py`. An entropy coder for all methods with a
lossless stage is a coding in `mlxkv/io/lossless.py`.
"""
