"""Which of the teacher's layers a student learns hidden states from."""

from transformers import PreTrainedConfig

from forge.config.distilling import DistillationConfig


def teacher_layers(config: DistillationConfig, student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """The teacher's, in ascending order; none where no hidden states are compared.

    Where the config does not name them: for each of the student's, and for the embeddings, at equal distances.
    """
    if config.hidden is None or config.alpha == 0:
        return ()
    named = config.hidden.layers
    if named is None:
        named = {layer: round(layer * teacher_depth / student_depth) for layer in range(student_depth + 1)}
    return tuple(sorted(set(named.values())))


def depth(config: PreTrainedConfig) -> int:
    """Layers of the model; of an encoder-decoder those of the decoder."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)
