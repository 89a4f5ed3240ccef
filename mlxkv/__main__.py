"""Run the command line: python -m mlxkv."""

from mlxkv.cli import main

if __name__ == "__main__":
    main()
