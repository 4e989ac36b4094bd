"""Commands that a message can suggest, in the form in which this process was started."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def forge_command() -> str:
    """The `forge` command as it can be typed here: by its name where it is installed, else through Python."""
    return "forge" if shutil.which("forge") is not None else f"{_python()} -m forge.cli"


def train_command() -> str:
    """What starts a training like this one in one process: `python forge.py` or `forge train`."""
    script = Path(sys.argv[0])
    if script.name != "forge.py":
        return f"{forge_command()} train"
    where = os.path.relpath(script) if script.is_absolute() and script.is_relative_to(Path.cwd()) else str(script)
    return f"{_python()} {shlex.quote(where)}"


def resume_command(run: Path, ranks: int = 1) -> str:
    """What resumes a run; a run of several ranks needs the command, which starts as many again."""
    if ranks == 1 and Path(sys.argv[0]).name == "forge.py":
        return f"{train_command()} --resume {shlex.quote(str(run))}"
    return f"{forge_command()} resume {shlex.quote(str(run))}"


def _python() -> str:
    return "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)
