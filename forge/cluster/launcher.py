"""Runs accelerate's launcher with no config of its own, and without its tracebacks for a stop or a failed rank."""

import os
import signal
import sys
from pathlib import Path

# Run as a script, this file's folder stands first on the path, where forge's own modules could hide packages.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from forge.cluster.launch import OUTCOME, read_outcome, write_outcome
from forge.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_STOPPED

# What `accelerate config` wrote was meant for other programs, or for another machine: the command line says it all.
launch.default_config_file = ""


def run() -> int:
    """The launcher's exit code: 1 for all that is not complete. What a rank says of itself stands before."""
    try:
        launch.main()
    except SignalException:  # the ranks have got it, and have told what they made of it
        return EXIT_FAILED
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0:  # it could not say so itself
                name = signal.Signals(-failure.exitcode).name
                print(f"rank {rank} (process {failure.pid}) was ended by {name}", file=sys.stderr)
        # The launcher asks the other ranks to stop then, and the first one may take that for the user's wish.
        failed = any(failure.exitcode != EXIT_STOPPED for failure in error.failures.values())
        if failed and OUTCOME in os.environ and read_outcome(Path(os.environ[OUTCOME])) == EXIT_STOPPED:
            write_outcome(EXIT_FAILED)
        return EXIT_FAILED
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(run())
