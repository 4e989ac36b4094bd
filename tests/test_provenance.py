"""A run says where it comes from, fails for no reason of git's, and tells no secret."""

import getpass
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import forge
from forge.run import provenance as module
from forge.run.provenance import GitFacts, Provenance, git_facts, package_freeze, provenance, write_dirty_diff

FORGE_FOLDER = Path(forge.__file__).resolve().parent


def test_the_facts_of_an_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = a_repository(tmp_path / "code")
    monkeypatch.chdir(repository)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    facts = provenance(repository, ["forge.py", "--config", "my config.yaml"])
    assert facts.forge_version == forge.__version__
    assert facts.command == "forge.py --config 'my config.yaml'"
    assert facts.working_directory == str(repository)
    assert facts.python_version == sys.version.split()[0]
    assert facts.git.commit == head_of(repository)
    assert facts.working_directory_git is None
    assert facts.packages["numpy"] == metadata.version("numpy")
    assert facts.packages.keys() <= set(module.PACKAGES)
    assert facts.slurm == {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2"}
    assert facts.cuda_visible_devices == "0,3"
    assert Provenance.model_validate_json(facts.model_dump_json()) == facts


def test_where_the_user_works_in_another_checkout_both_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, work = a_repository(tmp_path / "code"), a_repository(tmp_path / "work")
    (work / "deep").mkdir()
    monkeypatch.chdir(work / "deep")
    facts = provenance(code, ["forge"])
    assert facts.git.root == str(code)
    assert facts.working_directory_git.root == str(work)
    assert facts.working_directory_git.commit == head_of(work)


def test_no_secret_of_the_environment_or_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SLURM_JWT"):
        monkeypatch.setenv(name, "swordfish")
    command = ["forge.py", "--set", "tracking.wandb.api_key=swordfish", "--hf_token", "swordfish"]
    command += ["--set", "model.token=hf_swordfishswordfishswordfish", "--set", "rl.max_tokens=64"]
    facts = provenance(None, command)
    assert "swordfish" not in facts.model_dump_json()
    assert facts.command == (
        "forge.py --set 'tracking.wandb.api_key=***' --hf_token '***' --set 'model.token=***' --set rl.max_tokens=64"
    )


def test_a_clean_checkout(tmp_path: Path) -> None:
    repository = a_repository(tmp_path)
    assert git_facts(repository) == GitFacts(
        root=str(repository), commit=head_of(repository), branch="trunk", dirty=False, reason=None
    )
    assert write_dirty_diff(tmp_path / "dirty.diff", repository) is False
    assert not (tmp_path / "dirty.diff").exists()


def test_a_changed_checkout_leaves_a_patch_that_brings_the_change_back(tmp_path: Path) -> None:
    repository = a_repository(tmp_path / "code")
    before = (repository / "train.py").read_text()
    (repository / "train.py").write_text("rate = 2\n")
    (repository / "straße.py").write_text("")
    git(repository, "config", "diff.external", "/bin/false")  # what the user's own git would run for a diff
    diff = tmp_path / "dirty.diff"
    assert git_facts(repository).dirty is True
    assert write_dirty_diff(diff, repository) is True
    assert f"since {head_of(repository)}\n# untracked: straße.py\n" in diff.read_text()
    git(repository, "apply", "--reverse", str(diff))
    assert (repository / "train.py").read_text() == before
    git(repository, "apply", str(diff))
    assert (repository / "train.py").read_text() == "rate = 2\n"


def test_an_untracked_file_alone_makes_it_dirty(tmp_path: Path) -> None:
    repository = a_repository(tmp_path / "code")
    (repository / "reward.py").write_text("")
    assert git_facts(repository).dirty is True
    assert write_dirty_diff(tmp_path / "dirty.diff", repository)
    assert "# untracked: reward.py" in (tmp_path / "dirty.diff").read_text()


def test_a_large_patch_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIFF_BYTES", 1 << 20)
    repository = a_repository(tmp_path / "code")
    (repository / "train.py").write_text("a line of text\n" * 100_000)
    write_dirty_diff(tmp_path / "dirty.diff", repository)
    text = (tmp_path / "dirty.diff").read_text()
    assert 1 << 20 < len(text) < (1 << 20) + 1000
    assert text.endswith("this file holds the first 1 MiB\n")


def test_a_detached_head_has_a_commit_and_no_branch(tmp_path: Path) -> None:
    repository = a_repository(tmp_path)
    git(repository, "checkout", "-q", "--detach")
    assert (git_facts(repository).commit, git_facts(repository).branch) == (head_of(repository), None)


def test_a_folder_that_is_no_checkout_says_so(tmp_path: Path) -> None:
    facts = git_facts(tmp_path)
    assert (facts.root, facts.commit, facts.dirty) == (None, None, None)
    assert "not a git repository" in facts.reason
    assert write_dirty_diff(tmp_path / "dirty.diff", tmp_path) is False


def test_a_checkout_with_no_commit_says_so_and_still_tells_its_changes(tmp_path: Path) -> None:
    repository = tmp_path / "code"
    repository.mkdir()
    git(repository, "init", "-q", "-b", "trunk")
    (repository / "train.py").write_text("rate = 1\n")
    git(repository, "add", "train.py")
    facts = git_facts(repository)
    assert (facts.commit, facts.branch, facts.dirty) == (None, "trunk", True)
    assert "git rev-parse: " in facts.reason
    assert write_dirty_diff(tmp_path / "dirty.diff", repository)
    assert "+rate = 1" in (tmp_path / "dirty.diff").read_text()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a checkout to another user")
def test_a_checkout_of_another_user_is_refused_by_git_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = a_repository(tmp_path / "code")
    monkeypatch.setenv("HOME", str(tmp_path))  # no safe.directory of this user's may hide it
    for path in [repository, *repository.rglob("*")]:
        os.chown(path, 65534, 65534)
    facts = git_facts(repository)
    assert facts.commit is None
    assert "dubious ownership" in facts.reason


def test_no_git_on_the_path_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_facts(tmp_path).reason == "git cannot be run: No such file or directory"


def test_a_git_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "GIT_TIMEOUT_S", 0.2)
    assert git_facts(tmp_path).reason == "git rev-parse did not answer in 0.2 s"


def test_an_environment_inside_a_checkout_is_not_taken_for_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = a_repository(tmp_path)
    installed = project / ".venv" / "forge"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(module, "PACKAGE_FOLDER", installed)
    facts = git_facts(None)
    assert facts.commit is None
    assert "is not a git checkout" in facts.reason


def test_the_git_variables_of_a_hook_do_not_mislead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, other = a_repository(tmp_path / "code"), a_repository(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert git_facts(repository).commit == head_of(repository)


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def getuser() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", getuser)
    assert provenance(FORGE_FOLDER, []).user == str(os.getuid())


def test_the_freeze_names_every_distribution_once_in_order() -> None:
    lines = package_freeze()
    assert f"pytest=={metadata.version('pytest')}" in lines
    assert lines == sorted(set(lines), key=str.casefold)


def a_repository(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    git(folder, "init", "-q", "-b", "trunk")
    (folder / "train.py").write_text(f"rate = 1  # {folder.name}\n")
    git(folder, "add", "train.py")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def head_of(repository: Path) -> str:
    return git(repository, "rev-parse", "HEAD").strip()


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *who, "-C", folder, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
