"""Finds the configs and DeepSpeed plans that come with forge, in its repository or in an installed wheel."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(name: str) -> Path:
    """Return the folder `configs` or `ds_configs` that comes with forge.

    A wheel carries them inside the package (setup.py); in a repository they are beside it.
    """
    inside = PACKAGE / "shipped" / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def find_config(file: Path) -> Path:
    """Return the file itself, or the config of that name that comes with forge if only that exists.

    So `configs/quickstart/sft.yaml` can be named from any folder.
    """
    if file.exists() or file.is_absolute() or file.parts[:1] != ("configs",):
        return file
    shipped = shipped_folder("configs").joinpath(*file.parts[1:])
    return shipped if shipped.is_file() else file
