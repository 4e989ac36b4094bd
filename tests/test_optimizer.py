"""The learning rate at every step, the size of a step, and which weights decay."""

import pytest
from torch import nn

from forge.config.schema import TrainingConfig
from forge.trainer.optimizer import build_optimizer, learning_rate


def rates(total: int, **settings: object) -> list[float]:
    config = TrainingConfig(learning_rate=1.0, **settings)
    return [round(learning_rate(step, total, config), 4) for step in range(total)]


def test_the_rate_warms_up_to_its_peak_and_falls_linearly() -> None:
    assert rates(10, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.8333, 0.6667, 0.5, 0.3333, 0.1667]


def test_the_cosine_passes_half_of_the_peak_in_the_middle() -> None:
    assert rates(4, warmup_steps=0, schedule="cosine") == [1.0, 0.8536, 0.5, 0.1464]


def test_a_constant_rate_only_warms_up() -> None:
    assert rates(5, warmup_ratio=0.4, schedule="constant") == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_a_warm_up_longer_than_the_training_never_divides_by_zero() -> None:
    assert rates(3, warmup_steps=6) == [0.1667, 0.3333, 0.5]
    assert rates(3, warmup_ratio=1.0) == [0.3333, 0.6667, 1.0]


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        ({"per_device_batch_size": 4, "gradient_accumulation_steps": 3}, 2, (24, 3)),
        ({"per_device_batch_size": 4, "batch_size": 32}, 2, (32, 4)),
        ({"per_device_batch_size": 4, "batch_size": 32}, 3, (32, 3)),  # 11 rows a rank: micro-batches of 3 and 4
        ({"per_device_batch_size": 64, "batch_size": 32}, 1, (32, 1)),
    ],
)
def test_the_accumulation_follows_from_the_batch_size(
    settings: dict[str, int], ranks: int, expected: tuple[int, int]
) -> None:
    assert TrainingConfig(**settings).step_shape(ranks) == expected


def test_matrices_and_embeddings_decay_and_biases_and_norms_do_not() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "linear": nn.Linear(4, 2), "norm": nn.LayerNorm(4)})
    model["linear"].weight.requires_grad_(requires_grad=True)
    model["norm"].weight.requires_grad_(requires_grad=False)
    decayed, spared = build_optimizer(model, TrainingConfig(weight_decay=0.3)).param_groups

    assert decayed["weight_decay"] == 0.3
    assert spared["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(model["embed"].weight), id(model["linear"].weight)}
    assert {id(p) for p in spared["params"]} == {id(model["linear"].bias), id(model["norm"].bias)}
