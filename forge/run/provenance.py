"""Provenance of a run: command, code, package versions, host and SLURM facts. Never a secret."""

import getpass
import os
import platform
import re
import shlex
import socket
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import forge
from forge.run.files import write_atomically
from forge.run.records import OpenRecord

PACKAGE_FOLDER = Path(forge.__file__).resolve().parent
PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy"),
    *("peft", "trl", "deepspeed", "wandb", "pydantic"),
)
SLURM_FACTS = (
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID"),
    *("SLURM_CLUSTER_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"),
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_RESTART_COUNT"),
    *("SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE"),
)
GIT_TIMEOUT_S = 20  # a cold network file system takes seconds; one that hangs must not cost the job
GIT_MISLEADING = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
)  # set in git hooks
DIFF_BYTES = 10 << 20

# Secrets that users pass as arguments: `…api_key=VALUE`, `--api_key VALUE`, and tokens with a telling prefix.
SECRET_VALUE = re.compile(
    r"((?:api_?key|secret|password|passwd|(?:auth|access|hf|api)_?token)[=:\s]\s*)\S+|\bhf_\w{20,}", re.IGNORECASE
)
SECRET_FLAG = re.compile(r"-.*(?:api_?key|secret|password|passwd|(?:auth|access|hf|api)_?token)$", re.IGNORECASE)


class GitFacts(OpenRecord):
    """A git checkout; what is not known is None, and `reason` says why."""

    root: str | None = None
    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    reason: str | None = None


class Provenance(OpenRecord):
    """Where the numbers of an attempt, or of a proof, come from."""

    forge_version: str
    command: str
    working_directory: str
    host: str
    user: str
    python_version: str
    platform: str
    git: GitFacts
    packages: dict[str, str]
    slurm: dict[str, str]
    cuda_visible_devices: str | None
    working_directory_git: GitFacts | None = None  # if that is another checkout


def provenance(repository: Path | None, command: list[str]) -> Provenance:
    """Return the provenance of this process. `repository` is the checkout whose code runs; None: forge's own."""
    git = git_facts(repository)
    facts = Provenance(
        forge_version=forge.__version__,
        command=_without_secrets(command),
        working_directory=os.getcwd(),
        host=socket.gethostname(),
        user=_user(),
        python_version=platform.python_version(),
        platform=platform.platform(),
        git=git,
        packages=_versions(PACKAGES),
        slurm={name: os.environ[name] for name in SLURM_FACTS if name in os.environ},
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )
    here = git_facts(Path.cwd())
    if here.root is None or here.root == git.root:
        return facts
    return facts.model_copy(update={"working_directory_git": here})


def code_facts() -> dict[str, Any]:
    """Return what a checkpoint's manifest says of the code that wrote it: git_commit and versions."""
    return {"git_commit": git_facts(None).commit, "versions": {"forge": forge.__version__} | _versions(PACKAGES)}


def git_facts(repository: Path | None) -> GitFacts:
    """Return what git says of a checkout; None: the one that forge is imported from."""
    facts: dict[str, Any] = dict.fromkeys(GitFacts.model_fields)
    try:
        root = _git(repository or PACKAGE_FOLDER, "rev-parse", "--show-toplevel").strip()
        if repository is None and not _git(PACKAGE_FOLDER, "ls-files", "--", "__init__.py"):
            # An environment inside a checkout, as in project/.venv: that commit says nothing about forge.
            return GitFacts(
                **facts | {"reason": f"forge is installed in {PACKAGE_FOLDER}, which is not a git checkout"}
            )
        facts["root"] = root
        facts["dirty"] = bool(_git(Path(root), "status", "--porcelain"))
        # A detached head has no branch; an unborn branch has a name, but no commit yet.
        facts["branch"] = _git(Path(root), "branch", "--show-current").strip() or None
        facts["commit"] = _git(Path(root), "rev-parse", "--verify", "HEAD").strip()
    except _GitError as error:
        facts["reason"] = str(error)
    return GitFacts(**facts)


def write_dirty_diff(path: Path, repository: Path | None = None) -> bool:
    """Write the changes since HEAD as a patch, with the names of untracked files.

    Returns False, and writes nothing, if there are no changes or git cannot say.
    """
    facts = git_facts(repository)
    if not facts.dirty or facts.root is None:
        return False
    root = Path(facts.root)
    try:
        untracked = _git(root, "ls-files", "--others", "--exclude-standard").splitlines()
        # With no commit yet, compare with the empty tree, so that every file is new.
        base = facts.commit or _git(root, "hash-object", "-t", "tree", "/dev/null").strip()
        # Nothing from the user's git config may colour the patch or run a program on it.
        diff, size = _git_bytes(root, "diff", "--no-color", "--no-ext-diff", "--no-textconv", base)
    except _GitError:
        return False
    head = [
        f"# changes in {root} since {facts.commit or 'no commit'}",
        *(f"# untracked: {name}" for name in untracked),
    ]
    text = "\n".join(head).encode(errors="surrogateescape") + b"\n" + diff
    if size > len(diff):
        text += f"\n# cut here: the patch has {size} bytes; this file holds the first {DIFF_BYTES >> 20} MiB\n".encode()
    write_atomically(path, text)
    return True


def package_freeze() -> list[str]:
    """Return every installed distribution as name==version, sorted by name, as `pip freeze` does."""
    found = {f"{item.name}=={item.version}" for item in metadata.distributions() if item.name}
    return sorted(found, key=str.casefold)


class _GitError(Exception):
    """git failed; the text is the reason."""


def _git(folder: Path, *arguments: str) -> str:
    # Bytes in file names that are not UTF-8 survive as surrogates.
    return _git_bytes(folder, *arguments)[0].decode(errors="surrogateescape")


def _git_bytes(folder: Path, *arguments: str) -> tuple[bytes, int]:
    """Return the first DIFF_BYTES of git's output, and its size. A file holds it: it may be larger than memory."""
    environment = {name: value for name, value in os.environ.items() if name not in GIT_MISLEADING}
    # No lock on the index (the user may be working there), no prompt at the terminal, reasons in English.
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    with tempfile.TemporaryFile() as out:
        try:
            subprocess.run(
                ["git", "-c", "core.quotepath=off", "-C", str(folder), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                env=environment,
                timeout=GIT_TIMEOUT_S,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
            raise _GitError(f"git {arguments[0]}: {lines[0]}") from None
        except subprocess.TimeoutExpired:
            raise _GitError(f"git {arguments[0]} did not answer in {GIT_TIMEOUT_S} s") from None
        except OSError as error:
            raise _GitError(f"git cannot be run: {error.strerror}") from None
        size = out.seek(0, os.SEEK_END)
        out.seek(0)
        return out.read(DIFF_BYTES), size


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user of a container often has no name
        return str(os.getuid())


def _without_secrets(command: list[str]) -> str:
    words: list[str] = []
    for word in command:
        hidden = bool(words) and SECRET_FLAG.fullmatch(words[-1]) is not None
        words.append("***" if hidden else SECRET_VALUE.sub(lambda match: (match[1] or "") + "***", word))
    return shlex.join(words)
