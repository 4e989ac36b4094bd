"""What is installed is what the repository says, and every requirement is pinned."""

from configparser import ConfigParser
from importlib import metadata

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import forge


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
