"""Run the command line: python -m mlxkv."""

import os
import sys


def main() -> None:
    """Run the command line of the process, and exit with its code."""
    try:
        from mlxkv.cli import main as run

        run()
    except KeyboardInterrupt:  # before the command line itself could say so
        sys.exit(130)


if __name__ == "__main__":
    # `python -m` puts the current folder first: a package that happens to lie there must not be loaded as a plugin.
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
        del sys.path[0]
    main()
