"""What is installed is what the repository says: requirements are pinned, and a wheel works without the repository."""

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import forge
from forge.run.files import read_json

SHIPPED = ("configs", "ds_configs")
SOURCES = ("forge", *SHIPPED, "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
QUICKSTART = "configs/quickstart/sft.yaml"

Forge = Callable[..., "subprocess.CompletedProcess[str]"]


def test_the_installed_package_has_the_version_and_the_command_of_the_source() -> None:
    try:
        installed = metadata.distribution("forge-train")
    except metadata.PackageNotFoundError:
        pytest.skip("forge is not installed in this environment; `make test` installs it")

    assert installed.version == forge.__version__
    assert [(entry.name, entry.value) for entry in installed.entry_points] == [("forge", "forge.cli.main:main")]


def test_every_pin_is_admitted_by_setup_cfg_and_every_requirement_is_pinned() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    wanted = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    for line in "\n".join(wanted).split():
        requirement = Requirement(line)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement} does not admit {pin}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, built from the repository: both have to be whole."""
    top = tmp_path_factory.mktemp("wheel")
    source = top / "source"
    source.mkdir()
    for name in SOURCES:
        (source / name).symlink_to(REPOSITORY / name)  # the build writes beside them, not among them
    build("sdist", source, top)
    (archive,) = top.glob("*.tar.gz")
    subprocess.run(["tar", "xzf", archive, "-C", top], check=True)
    build("wheel", archive.with_name(archive.name.removesuffix(".tar.gz")), top)
    (built,) = top.glob("*.whl")
    return built


def build(kind: str, source: Path, target: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(kind=kind), target], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed_forge(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Forge:
    """Runs `forge` in an empty folder, in an environment with the wheel and this one's other packages."""
    environment, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("empty")
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python3*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # The folders are searched, and .pth files in them are not read: an editable forge there stays out.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others))
    start = "import sys; from importlib.metadata import distribution as d; " + (
        "(command,) = d('forge-train').entry_points; sys.argv[0] = 'forge'; sys.exit(command.load()())"
    )
    quiet = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [environment / "bin" / "python", "-c", start, *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=os.environ | quiet, capture_output=True, text=True, timeout=300)

    return run


def test_a_wheel_carries_configs_plans_and_the_mark_of_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [file for top in SHIPPED for file in (REPOSITORY / top).rglob("*") if file.is_file()]
    assert {f"forge/shipped/{file.relative_to(REPOSITORY)}" for file in files} <= names
    assert "forge/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"forge", f"forge_train-{forge.__version__}.dist-info"}


def test_an_installed_forge_finds_its_configs_and_plans_from_an_empty_folder(installed_forge: Forge) -> None:
    done = installed_forge("config", "validate", QUICKSTART, "configs/base.yaml", "configs/quickstart/kd.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        *(QUICKSTART, "configs/base.yaml", "configs/quickstart/kd.yaml"),
    ]
    shown = installed_forge("config", "show", QUICKSTART, "--origin", "--set", "deepspeed.student=zero2")
    assert shown.returncode == 0
    assert "shipped/configs/base.yaml:" in shown.stdout
    assert f"shipped/{QUICKSTART}" in shown.stderr  # the notice says which file was taken
    absent = installed_forge("config", "show", "configs/quickstart/nope.yaml")
    assert (absent.returncode, absent.stdout) == (2, "")
    assert absent.stderr.startswith("error: configs/quickstart/nope.yaml: ")


@pytest.mark.multiprocess
def test_an_installed_forge_plans_trains_and_launches_from_an_empty_folder(
    installed_forge: Forge, tiny_model: Path, tmp_path: Path
) -> None:
    model = ("--set", f"model.path={tiny_model}", "--output-root", tmp_path)
    once = ("--debug", "--max-steps", "1", *model)
    with ThreadPoolExecutor() as pool:  # each is one process, and mostly its imports
        planning = pool.submit(installed_forge, "plan", QUICKSTART, "--gpus", "2x80", *model)
        training = pool.submit(installed_forge, "train", "--config", QUICKSTART, "--run-name", "one", *once)
        planned, trained = planning.result(), training.result()
    assert planned.returncode == 0, planned.stderr
    assert {"zero1", "zero2", "zero3_offload"} <= set(planned.stdout.split())
    assert trained.returncode == 0, trained.stderr
    launched = installed_forge(  # each process more would import everything once more
        "launch", QUICKSTART, "--run-name", "two", "--processes", "1", "--deepspeed", "zero2", *once
    )
    assert launched.returncode == 0, launched.stderr
    states = [read_json(tmp_path / "quickstart" / "sft" / name / "training_state.json") for name in ("one", "two")]
    assert [(state["pipeline_complete"], state["step"]) for state in states] == [(True, 1), (True, 1)]
    assert "student: zero2" in (tmp_path / "quickstart" / "sft" / "two" / "config.yaml").read_text()
