"""Live methods, one a file: METHOD (the name, with dashes), a frozen dataclass Settings, and Cache(LayerCache).

The file name is the registry. Files that start with an underscore are what several methods share.
"""
