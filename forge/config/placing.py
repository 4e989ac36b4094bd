"""Where a config's runs lie, and its local folders as paths that hold wherever it is read."""

from pathlib import Path

from forge.config.plans import is_file
from forge.config.schema import CausalLmTask, Config


def config_name(file: Path) -> Path:
    """Where a config's runs lie below the output root: its path below configs/, or its bare name elsewhere."""
    path = file.resolve().with_suffix("")
    if "configs" in path.parts[:-1]:
        below = len(path.parts) - 1 - path.parts[::-1].index("configs")
        return Path(*path.parts[below + 1 :])
    return Path(path.name)


def located(config: Config) -> Config:
    """The config with local folders as absolute paths: a run's own config.yaml holds wherever it is read from."""

    def place(name: str | None) -> str | None:
        return str(Path(name).expanduser().absolute()) if name and Path(name).expanduser().is_dir() else name

    dataset = config.task.dataset.model_copy(update={"path": place(config.task.dataset.path)})
    task: dict[str, object] = {"dataset": dataset}
    if isinstance(config.task, CausalLmTask) and config.task.chat_template:
        task["chat_template"] = str(Path(config.task.chat_template).expanduser().absolute())
    named = ("path", "base", "adapter", "tokenizer")
    model = {name: place(getattr(config.model, name)) for name in named}
    teacher = {name: place(getattr(config.teacher, name)) for name in (*named, "cache")}
    student = config.deepspeed.student
    plans = {
        "student": student if student is None else place_plan(student),
        "teacher": place_plan(config.deepspeed.teacher),
    }
    return config.model_copy(
        update={
            "deepspeed": config.deepspeed.model_copy(update=plans),
            "task": config.task.model_copy(update=task),
            "model": config.model.model_copy(update=model),
            "teacher": config.teacher.model_copy(update=teacher),
            "output_root": str(Path(config.output_root).absolute()),
        }
    )


def place_plan(name: str) -> str:
    """The name of one of forge's plans as it is; a file of the user's as an absolute path."""
    return str(Path(name).expanduser().absolute()) if is_file(name) else name
