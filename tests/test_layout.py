"""The house keeps its shape: imports only go down, nothing hides a package, and the light rooms stay light."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

FLOORS = {
    **dict.fromkeys(("errors", "__init__"), 0),
    **dict.fromkeys(("config", "losses"), 1),
    **dict.fromkeys(("run", "cluster"), 2),
    **dict.fromkeys(("data", "ranks"), 3),
    **dict.fromkeys(("model", "checkpoint"), 4),
    **dict.fromkeys(("task", "report"), 5),
    "teacher": 6,
    **dict.fromkeys(("teacher_cache", "memory"), 7),
    "student": 8,
    "attempt": 9,
    **dict.fromkeys(("trainer", "proof"), 10),
    "pipeline": 11,
    **dict.fromkeys(("api", "cli"), 12),
    "train": 13,
}
ENTRIES = {"forge.py": {"train"}, "forge/__init__.py": {"api", "losses"}}  # who may import from the top floor, and what
HEAVY = ("torch", "transformers", "datasets", "accelerate")
MAX_LINES = 500


@pytest.mark.parametrize("check", ["upward_imports", "hiding_names", "bad_docstrings", "long_files"])
def test_the_house_is_in_order(check: str) -> None:
    assert globals()[check](REPO) == []


@pytest.mark.parametrize(
    "module",
    [
        *("forge.config.loader", "forge.config.changes", "forge.run.registry", "forge.cluster.launch"),
        *("forge.memory.totals", "forge.memory.advice", "forge.cli.plan"),
        *("forge.cli.main", "forge.cli.train", "forge.train", "forge", "forge.api"),
    ],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    assert heavy_imports(REPO, module) == []


def test_a_house_in_order_passes(tmp_path: Path) -> None:
    root = a_house(tmp_path)
    assert [upward_imports(root), hiding_names(root), bad_docstrings(root), long_files(root)] == [[]] * 4
    assert heavy_imports(root, "forge.config.loader") == []


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("config/loader.py", "from forge.run.state import X", "forge/config/loader.py:3 imports forge.run.state"),
        ("config/loader.py", "import forge.run.state", "forge/config/loader.py:3 imports forge.run.state"),
        ("config/loader.py", "from forge import run", "forge/config/loader.py:3 imports forge.run"),
        ("config/loader.py", "from ..run import state", "forge/config/loader.py:3 imports forge.run"),
        ("config/loader.py", "from .. import run", "forge/config/loader.py:3 imports forge.run"),
        ("config/loader.py", "import forge.losses.ce", "forge/config/loader.py:3 imports forge.losses.ce"),
        (
            "config/loader.py",
            "def f():\n    import forge.run.state",
            "forge/config/loader.py:4 imports forge.run.state",
        ),
        (
            "config/loader.py",
            "if TYPE_CHECKING:\n    from forge.run.state import X",
            "forge/config/loader.py:4 imports forge.run.state",
        ),
        ("run/state.py", "from forge.trainer.loop import X", "forge/run/state.py:3 imports forge.trainer.loop"),
        ("pipeline.py", "from forge.train import main", "forge/pipeline.py:3 imports forge.train"),
        ("cli/main.py", "from forge.train import main", "forge/cli/main.py:3 imports forge.train"),
        ("../forge.py", "from forge.cli.main import main", "forge.py:3 imports forge.cli.main"),
        ("attic/x.py", "import os", "forge/attic/x.py stands on no floor"),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_found(file: str, line: str, expected: str, tmp_path: Path) -> None:
    root = a_house(tmp_path)
    write(root / "forge" / file, f'"""A room."""\n\n{line}\n')
    assert upward_imports(root) == [expected]


@pytest.mark.parametrize("name", ["datasets/x.py", "logging.py", "torch.py", "evaluate/__init__.py", "signal/x.py"])
def test_a_name_that_hides_a_package_is_found(name: str, tmp_path: Path) -> None:
    root = a_house(tmp_path)
    write(root / "forge" / name, "")
    hidden = name.split("/")[0].removesuffix(".py")
    if hidden == "evaluate":  # not installed here: the list is what transformers and its friends may import
        assert hidden in OTHERS
    assert hiding_names(root) == [f"forge/{name.split('/')[0]} hides {hidden}"]


@pytest.mark.parametrize("text", ["X = 1\n", '"""No full stop"""\n', '"""\nA late line.\n"""\n'])
def test_a_file_that_does_not_say_what_it_is_is_found(text: str, tmp_path: Path) -> None:
    root = a_house(tmp_path)
    write(root / "forge" / "run" / "bad.py", text)
    assert bad_docstrings(root) == ["forge/run/bad.py: its first line is no sentence with a full stop"]


def test_a_long_file_is_found(tmp_path: Path) -> None:
    root = a_house(tmp_path)
    write(root / "forge" / "run" / "long.py", '"""Long."""\n' + "x = 1\n" * MAX_LINES)
    assert long_files(root) == ["forge/run/long.py has 501 lines"]


@pytest.mark.parametrize("line", ["import torch", "from forge.config import deep"])
def test_a_heavy_import_is_found_also_behind_another(line: str, tmp_path: Path) -> None:
    root = a_house(tmp_path)
    write(root / "torch.py", "")  # a light stand-in
    write(root / "forge" / "config" / "deep.py", '"""Deep."""\n\nimport torch\n')
    write(root / "forge" / "config" / "loader.py", f'"""Loads."""\n\n{line}\n')
    assert heavy_imports(root, "forge.config.loader") == ["torch"]


# Packages that the training stack imports where they are installed: hidden by a folder, they would be missed late.
OTHERS = {
    "evaluate",
    "kernels",
    "deepspeed",
    "trl",
    "peft",
    "bitsandbytes",
    "flash_attn",
    "triton",
    "vllm",
    "liger_kernel",
}


def upward_imports(root: Path) -> list[str]:
    """Each import of forge that does not stay in its folder and does not go down."""
    found = []
    for file in modules(root):
        name = str(file.relative_to(root))
        room = "forge.py" if name == "forge.py" else file.relative_to(root / "forge").parts[0].removesuffix(".py")
        if room not in FLOORS and name != "forge.py":
            found.append(f"{name} stands on no floor")
            continue
        for line, target in imported(file, root):
            other = [*target.split("."), "__init__"][1]
            down = other in FLOORS and FLOORS[other] < FLOORS.get(room, 0)
            if not (down or other == room or other in ENTRIES.get(name, set())):
                found.append(f"{name}:{line} imports {target}")
    return found


def imported(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Every forge module that a file imports, in functions and for type checkers too, with its line."""
    package = file.parent.relative_to(root).parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            house = root / "forge"
            rooms = [a.name for a in node.names if (house / a.name).is_dir() or (house / f"{a.name}.py").is_file()]
            targets = [f"forge.{name}" for name in rooms] if source == "forge" else [source]
        else:
            continue
        yield from ((node.lineno, name) for name in targets if name == "forge" or name.startswith("forge."))


def hiding_names(root: Path) -> list[str]:
    """Modules and folders directly below forge/ that hide a package where forge/ stands first on the path."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) | OTHERS
    taken -= {"forge", "__init__"}
    entries = sorted(p for p in (root / "forge").iterdir() if p.suffix == ".py" or p.is_dir())
    return [f"forge/{entry.name} hides {entry.stem}" for entry in entries if entry.stem in taken]


def bad_docstrings(root: Path) -> list[str]:
    """Modules that do not open with a sentence; empty package files need none."""
    found = []
    for file in modules(root):
        text = file.read_text()
        docstring = ast.get_docstring(ast.parse(text), clean=False) or ""
        is_sentence = docstring.split("\n")[0].rstrip().endswith(".")
        if text.strip() and file.parent != root and not is_sentence:
            found.append(f"{file.relative_to(root)}: its first line is no sentence with a full stop")
    return found


def long_files(root: Path) -> list[str]:
    lengths = {file: len(file.read_text().splitlines()) for file in modules(root)}
    return [f"{file.relative_to(root)} has {lines} lines" for file, lines in lengths.items() if lines > MAX_LINES]


def heavy_imports(root: Path, module: str) -> list[str]:
    """The heavy packages that importing a module brings in, in a fresh interpreter."""
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def modules(root: Path) -> list[Path]:
    return [root / "forge.py", *sorted((root / "forge").rglob("*.py"))]


def a_house(root: Path) -> Path:
    """A small tree in which all is well."""
    files = {
        "forge.py": "from forge.train import main",
        "forge/__init__.py": "",
        "forge/errors.py": "",
        "forge/config/__init__.py": "",
        "forge/config/loader.py": "from forge.errors import X",
        "forge/losses/ce.py": "import torch",
        "forge/run/state.py": "from . import files\nfrom forge import __version__, config\nimport forge.run.files",
        "forge/run/files.py": "",
        "forge/trainer/loop.py": "from forge.run import state\nfrom forge.losses.ce import Y",
        "forge/pipeline.py": "def f():\n    import forge.trainer.loop",
        "forge/train.py": "if True:\n    from forge.pipeline import X",
        "forge/cli/train.py": "from forge import pipeline",
        "forge/cli/main.py": "from forge.cli.train import X",
    }
    for name, body in files.items():
        write(root / name, f'"""A room."""\n\n{body}\n')
    write(root / "forge/errors.py", '"""A room."""\n\nX = 1\n')
    return root


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
