"""The errors a user can cause, and the exit codes of every forge command."""

EXIT_COMPLETE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # stopped on a signal with all that it needs to go on: resume me


class ForgeError(Exception):
    """Ends the command with one clear sentence and no traceback: what, where, what to do."""

    exit_code = EXIT_FAILED


class UsageError(ForgeError):
    """The command line, the config, the data or the model named in it is wrong; nothing was created."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """Everything that is wrong with a config, one sentence each, collected before anything is reported."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class BaseConfigError(ConfigError):
    """Nothing is wrong with the config but that it names neither task nor model: others inherit it."""


class AlreadyComplete(ForgeError):
    """There is nothing to do."""

    exit_code = EXIT_COMPLETE


class Stopped(ForgeError):
    """A signal asked the run to stop, and all ranks do so at the same place; the run can go on."""

    exit_code = EXIT_STOPPED


class Superseded(ForgeError):
    """A later attempt has taken the run over: this one must write nothing more into it."""


class LostRank(ForgeError):
    """Another rank has died; every rank that is left says so, since it may have been the one that speaks."""


class UnreadableRows(ForgeError):
    """One rank could not prepare its rows: it says so itself, for no other rank knows of it."""


class TrainingError(ForgeError):
    """Training cannot go on (a non-finite loss, a disk that filled up); what was saved before stays."""
