"""Which of the teacher's layers the student's hidden states are drawn to."""

from collections.abc import Mapping

from transformers import PreTrainedConfig

from forge.config.teacher_schema import DistillationConfig
from forge.errors import UsageError


def teacher_layers(config: DistillationConfig, student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher's, in ascending order; none where no hidden states are compared.

    student_layers: counts where the config does not name the pairs.
    """
    if config.hidden is None or config.alpha == 0:
        return ()
    given = config.hidden.layers
    pairs = layer_map(given, max(given) if given is not None else student_layers, teacher_layers)
    return tuple(sorted(set(pairs.values())))


def known_depth(config: PreTrainedConfig) -> int | None:
    """Layers of the model, of an encoder-decoder those of the decoder; None where the config does not tell."""
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)


def depth(config: PreTrainedConfig) -> int:
    """known_depth, where it is needed. Raises UsageError where the config does not tell."""
    layers = known_depth(config)
    if layers is None:
        raise UsageError(f"the config of {config.model_type} does not tell its layers; take distillation.hidden out")
    return layers


def layer_map(given: Mapping[int, int] | None, student_layers: int, teacher_layers: int) -> dict[int, int]:
    """For each layer of the student that is drawn the teacher's; 0 is the embeddings' output, n the n-th layer's.

    None: each layer i, and 0, to round(i * teacher_layers / student_layers), a half to the even one. Raises UsageError
    for a layer that there is not.
    """
    if given is None:
        return {layer: round(layer * teacher_layers / student_layers) for layer in range(student_layers + 1)}
    for layer, of_teacher in given.items():
        for whose, index, count in (("student", layer, student_layers), ("teacher", of_teacher, teacher_layers)):
            if not 0 <= index <= count:
                raise UsageError(
                    f"distillation.hidden.layers draws layer {layer} to {of_teacher}, and the {whose} has no {index}: "
                    f"the student has {student_layers} layers and the teacher {teacher_layers}, counted from 1, and 0 "
                    "is the embeddings' output"
                )
    return dict(sorted(given.items()))
