"""Runs accelerate's launcher, and leaves out the tracebacks by which that tells of a stop and of a failed rank."""

import signal
import sys
from pathlib import Path

# Run as a script, this file's folder stands first on the path, where forge's own modules could hide packages.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from forge.errors import EXIT_COMPLETE, EXIT_FAILED


def run() -> int:
    """The launcher's exit code: 1 for all that is not complete. What a rank says of itself stands before."""
    try:
        main()
    except SignalException:  # the ranks have got it, and have told what they made of it
        return EXIT_FAILED
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0:  # it could not say so itself
                name = signal.Signals(-failure.exitcode).name
                print(f"rank {rank} (process {failure.pid}) was ended by {name}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(run())
