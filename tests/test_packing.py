"""Packed rows: full bins, and a loss and gradients that are those of the documents alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from forge.data import packing
from forge.data.packing import FEATURES, best_fit, check_packing, collate_packed, pack, shifted_labels
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE

OPTIONS = {"use_cache": False}
ROPE = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": ROPE,
    "qwen2": ROPE,
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3},
}
MIXING: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {
        **{"vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"max_position_embeddings": 64, "word_embed_proj_dim": 32},
    },
    "mamba": {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2},
}


def tiny(model_type: str, **keys: Any) -> PreTrainedModel:
    """Without dropout, in float64."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(model_type, **{**ends, **keys})
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config).double()


def documents(count: int = 7) -> Dataset:
    """Of 2 to 12 tokens, about half of them learned."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(count):
        length = int(draw.integers(2, 13))
        learned = [bool(x) for x in draw.integers(0, 2, length)]
        learned[-1] = True
        rows.append(
            {"input_ids": draw.integers(3, 61, length).tolist(), "learned": learned, "length": length, "row": i}
        )
    return Dataset.from_list(rows)


def loss_sum(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "position_ids")}
    logits = model(**inputs, **OPTIONS).logits
    assert logits.shape[:2] == batch["labels"].shape
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def loss_and_gradients(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    total = torch.stack([loss_sum(model, batch) for batch in batches]).sum()
    total.backward()
    return total.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("model_type", MODELS)
def test_packed_rows_give_the_loss_and_the_gradients_of_the_documents_alone(model_type: str) -> None:
    rows = documents()
    packed = pack(rows, 20)
    assert len(packed) < len(rows)
    batch = collate_packed([packed[i] for i in range(len(packed))], pad=2)
    assert (batch["position_ids"] == 0).sum() > len(rows)  # padding restarts at 0 too
    alone = [
        {
            "input_ids": torch.tensor([row["input_ids"]]),
            "labels": torch.tensor([shifted_labels(row["input_ids"], row["learned"])]),
        }
        for row in rows
    ]
    model = tiny(model_type, **MODELS[model_type])

    expected, expected_gradients = loss_and_gradients(model, alone)
    loss, gradients = loss_and_gradients(model, [batch])

    assert loss == pytest.approx(expected, rel=1e-12)
    assert len(gradients) == len(expected_gradients) > 10
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_without_restarted_positions_the_loss_would_be_another() -> None:
    """The test above can fail."""
    packed = pack(documents(), 20)
    batch = collate_packed([packed[i] for i in range(len(packed))], pad=2)
    model = tiny("llama", **ROPE)
    mixed = {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}

    assert abs(loss_sum(model, mixed).item() - loss_sum(model, batch).item()) > 1


def test_no_document_predicts_the_first_token_of_the_next() -> None:
    row = {
        "input_ids": [10, 11, 12, 20, 21, 30],
        "learned": [True] * 6,
        "lengths": [3, 2, 1],
        "length": 6,
    }
    short = {"input_ids": [40, 41], "learned": [False, True], "lengths": [2], "length": 2}
    batch = collate_packed([row, short], pad=7)

    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21, 30], [40, 41, 7, 7, 7, 7]]
    assert batch["labels"].tolist() == [[11, 12, IGNORE, 21, IGNORE, IGNORE], [41, *[IGNORE] * 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert batch["tokens"].item() == 8
    assert "attention_mask" not in batch


def test_packing_keeps_every_document_whole_and_once() -> None:
    rows = documents(40)
    packed = pack(rows, 16)

    found = []
    for row in packed:
        assert sum(row["lengths"]) == row["length"] == len(row["input_ids"]) == len(row["learned"]) <= 16
        start = 0
        for length in row["lengths"]:
            found.append((row["input_ids"][start : start + length], row["learned"][start : start + length]))
            start += length
    assert sorted(found) == sorted((row["input_ids"], row["learned"]) for row in rows)
    assert set(packed.column_names) == set(FEATURES)


def test_rows_packed_differently_are_not_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents(40).save_to_disk(str(tmp_path / "rows"))
    rows = load_from_disk(str(tmp_path / "rows"))
    long, short = pack(rows, 20), pack(rows, 14)

    assert max(short["length"][:]) <= 14 < max(long["length"][:])
    assert pack(rows, 20)._fingerprint == long._fingerprint
    (tmp_path / "changed.py").write_text(Path(str(packing.__file__)).read_text() + "# A change.\n")
    monkeypatch.setattr(packing, "__file__", str(tmp_path / "changed.py"))
    assert pack(rows, 20)._fingerprint != long._fingerprint


def test_best_fit_fills_bins_and_is_the_same_each_time() -> None:
    lengths = np.random.default_rng(1).integers(1, 101, size=2000).tolist()
    bins = best_fit(lengths, 100)

    assert sorted(index for chosen in bins for index in chosen) == list(range(2000))
    assert max(sum(lengths[i] for i in chosen) for chosen in bins) <= 100
    assert len(bins) <= 1.01 * sum(lengths) / 100
    assert best_fit(lengths, 100) == bins


def test_best_fit_takes_the_fullest_bin_that_has_room() -> None:
    assert best_fit([6, 7, 3, 4, 10], 10) == [[4], [1, 2], [0, 3]]


@pytest.mark.parametrize("model_type", MODELS)
def test_models_that_keep_documents_apart_pass_the_probe(model_type: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny(model_type, **MODELS[model_type]).config).train()

    check_packing(model, OPTIONS)

    assert model.training


@pytest.mark.parametrize("model_type", MIXING)
def test_a_model_that_mixes_documents_is_refused_by_its_name(model_type: str) -> None:
    with pytest.raises(UsageError, match=r"ForCausalLM mixes packed rows: .*; set task.packing: false$"):
        check_packing(tiny(model_type, **MIXING[model_type]).float(), OPTIONS)
