"""Builds the package; a wheel also carries configs/ and ds_configs/, as forge/shipped/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "ds_configs")


class BuildWithShippedFiles(build_py):
    """Builds the package and copies the shipped folders into it; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            target = Path(self.build_lib, "forge", "shipped", name)
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree(name, target)


setup(cmdclass={"build_py": BuildWithShippedFiles})
