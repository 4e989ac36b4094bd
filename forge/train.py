"""The entry that `python forge.py` and `accelerate launch` run: arguments in, exit code out."""

import sys
from pathlib import Path

# Run as a script, this file's folder stands first on the path: `import forge` would fail where forge is not
# installed, and forge's own folders would hide packages of the same name. The repo root belongs there.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from forge.cli.arguments import EPILOG, Parser, add_train_arguments


def main(arguments: list[str] | None = None) -> int:
    """Train, and return the exit code."""
    parser = Parser(prog="forge.py", description="Train a model from one YAML config.", epilog=EPILOG)
    add_train_arguments(parser)
    args = parser.parse_args(arguments)
    from forge.cli.train import train  # after --help and a wrong command line have had their answer

    return train(args)


if __name__ == "__main__":
    sys.exit(main())
