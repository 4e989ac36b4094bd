"""Models with weights that the loss does not depend on are trained by several processes as by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import forge, forge_on_two_ranks
from torch import nn
from transformers import AutoTokenizer, EsmConfig, EsmModel

from forge.model.unused import unused_weights, use_varies
from forge.run.files import read_json_lines


class Model(nn.Module):
    def __init__(self, layerdrop: float = 0.0, experts: bool = False):
        super().__init__()
        self.config: Any = type("", (), {"to_dict": lambda _: {"decoder": {"decoder_layerdrop": layerdrop}}})()
        self.used, self.idle, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
        if experts:
            self.mlp = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})


def test_the_weights_that_a_loss_does_not_reach_are_named() -> None:
    model = Model()
    loss = model.used(torch.ones(1, 2)).sum() + model.idle(torch.ones(1, 2)).detach().sum()
    assert unused_weights(model, loss) == ["idle.weight", "idle.bias"]
    found = [use_varies(model) for model in (Model(), Model(layerdrop=0.1), Model(experts=True))]  # type: ignore[arg-type]
    assert found == [False, True, True]


@pytest.mark.multiprocess
def test_two_processes_train_a_model_with_unused_weights_as_one_does(
    config_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """ESM has a pooler and a head for contacts, which its classifier does not read."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "esm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = EsmConfig(vocab_size=len(tokenizer), pad_token_id=0, mask_token_id=1, max_position_embeddings=64, **sizes)
    EsmModel(config).save_pretrained(tmp_path / "esm")
    settings = ("--set", f"model.path={tmp_path / 'esm'}", "--set", "evaluation.baseline=false")
    alone = forge("--config", config_file, "--run_name", "one", *settings)
    both = forge_on_two_ranks("--config", config_file, "--run_name", "two", *settings)
    assert (alone.returncode, both.returncode) == (0, 0), both.stdout + both.stderr
    assert "weights have no part in the loss, so they are not trained" in both.stdout + both.stderr
    files = [next((tmp_path / "outputs").rglob(f"*{name}/metrics.jsonl")) for name in ("one", "two")]
    one, two = ([row["loss"] for row in read_json_lines(file) if "loss" in row] for file in files)
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-4)
