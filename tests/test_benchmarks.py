"""The benchmarks of the loss run on a CPU, and do not believe a wrong number."""

from pathlib import Path

import pytest
from conftest import REPOSITORY, python

# A student's gradient that is two percent too large: no loss would show it.
WRONG = """
import runpy, sys
from forge.losses import linear_kd as module
real = module.plain_linear_kd
def wrong(*arguments):
    outputs = real(*arguments)
    outputs.d_hidden.mul_(1.02)
    return outputs
module.plain_linear_kd = wrong
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMMANDS = {"kd_loss": ("--shape", "24,300,16,24", "--repeats", "2"), "kd_loss_error": ("--shape", "16,200,32")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_table_is_printed_and_a_wrong_gradient_marked(name: str, tmp_path: Path) -> None:
    command = [REPOSITORY / "benchmarks" / f"{name}.py", "--device", "cpu", *COMMANDS[name]]
    right = python(*command, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1")
    assert right.returncode == 0, right.stderr
    rows = [line for line in right.stdout.splitlines() if "%" in line]
    assert len(rows) == (13 if name == "kd_loss" else 24)
    assert "WRONG" not in right.stdout
    assert "not run" not in right.stdout

    (tmp_path / "wrong.py").write_text(WRONG)
    wrong = python(tmp_path / "wrong.py", *command, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1")
    assert wrong.returncode == 1, wrong.stderr + wrong.stdout
    marked = [line for line in wrong.stdout.splitlines() if line.endswith("WRONG")]
    # The eager one is not of forge.
    assert len(marked) == (12 if name == "kd_loss" else 24)
    assert all("eager" not in line for line in marked)
    assert wrong.stderr.count("; ") >= 11
