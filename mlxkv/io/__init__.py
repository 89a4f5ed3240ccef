"""Bytes on disk: the container, lossless codings, atomic writes and bounded readers. Whatever is read is treated as hostile.

- `atomic`: a write that is stopped at any moment leaves the old file or the new one.
- `container`: checksummed sections with a JSON header, the format of `.mlxkv` files and saved live caches.
- `lossless`: codings of a section's bytes.
- `inputs`: opening files and parsing JSON that somebody else wrote.
- `npz`: NumPy's archives without pickle.
"""
