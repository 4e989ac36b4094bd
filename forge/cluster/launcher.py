"""Runs accelerate's launcher without its config file, and without its tracebacks for a stop or a failed rank."""

import os
import signal
import sys
from pathlib import Path

# Run as a script, this file's folder is first on the path, where forge's modules could hide packages.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from forge.cluster.launch import read_outcome, write_outcome
from forge.cluster.processes import OUTCOME
from forge.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_STOPPED

# A config of `accelerate config` is meant for other programs or machines; the command line says everything here.
launch.default_config_file = ""


def run() -> int:
    """Run the launcher and return its exit code: 1 for all that is not complete. The ranks report the reason."""
    try:
        launch.main()
    except SignalException:  # the ranks have handled it and reported the outcome
        return EXIT_FAILED
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0:  # killed by a signal, so it could not report that itself
                name = signal.Signals(-failure.exitcode).name
                print(f"rank {rank} (process {failure.pid}) was killed by {name}", file=sys.stderr)
        # The launcher then stops the other ranks, and rank 0 may have taken that for a stop by the user.
        failed = any(failure.exitcode != EXIT_STOPPED for failure in error.failures.values())
        if failed and OUTCOME in os.environ and read_outcome(Path(os.environ[OUTCOME])) == EXIT_STOPPED:
            write_outcome(EXIT_FAILED)
        return EXIT_FAILED
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(run())
