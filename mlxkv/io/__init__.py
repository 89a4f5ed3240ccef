"""Bytes on disk: the container, lossless codings, atomic writes, bounded readers. Whatever is read is treated as hostile."""
