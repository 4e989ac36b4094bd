"""The errors a user can cause, and the exit codes of every forge command."""

EXIT_COMPLETE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # stopped on a signal with a checkpoint: resume it


class ForgeError(Exception):
    """An error that ends the command with one clear sentence and no traceback: what, where, what to do."""

    exit_code = EXIT_FAILED


class UsageError(ForgeError):
    """The command line, the config, the data or the model named in it is wrong; nothing was created."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """Everything that is wrong with a config, one sentence each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class BaseConfigError(ConfigError):
    """The config is valid but names neither task nor model: it is a base for other configs."""


class AlreadyComplete(ForgeError):
    """There is nothing to do."""

    exit_code = EXIT_COMPLETE


class Stopped(ForgeError):
    """A signal asked the run to stop, and all ranks stop at the same place; the run can be resumed."""

    exit_code = EXIT_STOPPED


class Superseded(ForgeError):
    """A later attempt has taken over the run: this one must not write to it any more."""


class LostRank(ForgeError):
    """Another rank has died. Every rank left reports it, since the dead one may be rank 0, which usually reports."""


class UnreadableRows(ForgeError):
    """This rank could not prepare its rows. It reports that itself, since no other rank knows."""


class TrainingError(ForgeError):
    """Training cannot continue (a non-finite loss, a full disk); earlier checkpoints stay."""
