"""Checks that a power cut loses nothing that has a final name: files are synced before they are renamed.

The kernel keeps the writes of a killed process, but not those of a machine without power: the order of calls counts.
"""

from faults.crash import Event, events
from faults.scene import Scene, Shape
from faults.trials import Trial

NOT_SYNCED = (".lock", "output.log")  # a lock, and text for people


def power_trials(scene: Scene, shape: Shape) -> list[Trial]:
    """Return a trial for each rename of a whole run, and one for each rank's files."""
    return order_trials(events(scene, shape))


def order_trials(recorded: list[list[Event]]) -> list[Trial]:
    """The same for recorded events, by rank."""
    trials = []
    for rank, found in enumerate(recorded):
        trials.append(Trial(f"files of rank {rank}", lambda found=found: _unsynced(found)))
    for i, event in enumerate(recorded[0]):
        if event.kind in ("rename", "replace") and ".trash-" not in event.name:
            trials.append(Trial(str(event), lambda i=i: _named_too_early(recorded[0], i)))
    return trials


def _unsynced(found: list[Event]) -> str | None:
    """Return an event whose file is not synced after its last write."""
    for i, event in enumerate(found):
        if event.kind != "write" or event.name.endswith(NOT_SYNCED):
            continue
        if not any(later.kind == "fsync" and later.name == event.name for later in found[i + 1 :]):
            return f"{event} is never synced"
    return None


def _named_too_early(found: list[Event], place: int) -> str | None:
    """Return what is not synced: everything under the old name before the rename, the target folder after it."""
    target = found[place].name
    folder, _, name = target.rpartition("/")
    sources = [f"{folder}/.tmp-*-*", f"{folder}/.tmp-{name}-*", f"{folder}/.{name}.*.tmp"]
    if name.endswith(".json") and "*" in name:
        sources.append(f"{folder}/.*.json.*.tmp")
    since = next((i for i in range(place - 1, -1, -1) if found[i].name == target), 0)
    for i in range(since, place):
        event = found[i]
        own = [source for source in sources if event.name == source or event.name.startswith(f"{source}/")]
        if not own or event.kind not in ("write", "create", "replace", "safetensors"):
            continue
        synced = event.name.rpartition("/")[0] if event.kind == "replace" else event.name
        if not any(later.kind == "fsync" and later.name == synced for later in found[i + 1 : place]):
            return f"{event} is not synced before {found[place]}"
    if not any(later.kind == "fsync" and later.name == folder for later in found[place + 1 : place + 3]):
        return f"{folder} is not synced after {found[place]}"
    return None
