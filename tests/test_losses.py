"""The supervised loss against float64, and what it does not count."""

import torch

from forge.losses.cross_entropy import IGNORE, count_labels, cross_entropy_sum


def test_the_sum_equals_minus_the_log_probability_of_each_label() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=generator, dtype=torch.float64) * 3
    labels = torch.tensor([0, 4, IGNORE, 2, 2, IGNORE, 1])
    expected = -sum(logits[i].log_softmax(-1)[label] for i, label in enumerate(labels.tolist()) if label != IGNORE)

    assert torch.allclose(cross_entropy_sum(logits, labels).double(), expected, rtol=1e-6)
    assert count_labels(labels).item() == 5


def test_the_gradient_is_probability_minus_one_hot_and_zero_where_nothing_is_counted() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 9.0]], requires_grad=True)
    cross_entropy_sum(logits, torch.tensor([1, IGNORE])).backward()

    expected = logits.detach().softmax(-1)
    expected[0, 1] -= 1
    expected[1] = 0
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.full((4096, 3), 1.0, dtype=torch.bfloat16)
    loss = cross_entropy_sum(logits, torch.zeros(4096, dtype=torch.int64))

    assert loss.dtype == torch.float32
    assert abs(loss.item() - 4096 * 1.0986123) < 0.1  # bfloat16 would be off by 16


def test_no_counted_label_gives_zero_and_not_nan() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.full((2,), IGNORE))
    loss.backward()

    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0
