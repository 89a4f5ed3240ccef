"""The stages of transform coding, one a file, each beside its inverse."""
