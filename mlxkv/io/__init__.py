"""Bytes on disk: the container, lossless codings, atomic writes and bounded readers. All input is treated as untrusted.

- `atomic`, `folders`: writes that leave the old file or folder, or the new one, if they are interrupted.
- `growing`, `journal`: the same for appends to a container, which are read through their journal.
- `disk`: locks, flushes and names that these share.
- `container`: checksummed sections with a JSON header, the format of `.mlxkv` files and saved live caches.
- `lossless`: codings of a section's bytes.
- `inputs`: opening files and parsing JSON from untrusted sources.
- `npz`: NumPy's archives without pickle.
"""
