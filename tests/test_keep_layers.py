"""A shallower student is its source without some layers: the same weights, renumbered, and nothing else."""

import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import LABELS, write_adapter
from conftest import forge
from test_resumed_config import ended_at
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

from forge.config.changes import Kind, changes
from forge.config.explain import effective, with_absolute_paths
from forge.config.loader import load_config
from forge.config.schema import ModelConfig
from forge.errors import ConfigError, UsageError
from forge.model.adapter import TIED_IN_BASE
from forge.model.classifier import load_classifier
from forge.model.layers import KeptLayers, check_layers, keep_layers
from forge.model.load import LoadedModel, load_own_tokenizer, load_whole
from forge.model.weights import AllWeights
from forge.run.files import read_json

IDS = torch.tensor([[2, 5, 9, 7, 3, 11, 4, 4], [2, 8, 4, 12, 6, 3, 17, 1]])
POSITIONS = torch.arange(8)[None]
CAUSAL = torch.full((8, 8), -torch.inf).triu(1)[None, None]  # added to the scores: nobody looks ahead
WIDTH = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}
DEEP = {"vocab_size": 20, "num_hidden_layers": 4, "initializer_range": 0.3, **WIDTH}
GPT2 = GPT2Config(vocab_size=20, n_embd=16, n_layer=4, n_head=2, n_positions=64, initializer_range=0.3)

CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**DEEP, num_labels=3, id2label=dict(enumerate(["Contradiction", "Entailment", "Neutral"]))),
    "roberta": RobertaConfig(**DEEP, num_labels=3, id2label=dict(enumerate(LABELS)), pad_token_id=1),
    "distilbert": DistilBertConfig(
        **{"vocab_size": 20, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 24, "initializer_range": 0.3},
        **{"num_labels": 3, "id2label": dict(enumerate(LABELS)), "max_position_embeddings": 64},
    ),
    "llama": LlamaConfig(**DEEP, num_key_value_heads=1, tie_word_embeddings=True),
    "gpt2": GPT2,
    "qwen2": Qwen2Config(  # the last two layers see three tokens back, and not all
        **DEEP, num_key_value_heads=1, use_sliding_window=True, sliding_window=3, max_window_layers=2
    ),
}
CLASSIFIERS = ("bert", "roberta", "distilbert")
STACKS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "qwen2": "model.layers",
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)


def auto_of(kind: str) -> Any:
    return AutoModelForSequenceClassification if kind in CLASSIFIERS else AutoModelForCausalLM


@pytest.fixture
def source_of(tmp_path: Path, tiny_model: Path) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """A folder with a model of four layers, and the model: source_of("bert")."""

    def write(kind: str, **settings: Any) -> tuple[Path, PreTrainedModel]:
        torch.manual_seed(1)
        config = type(CONFIGS[kind]).from_dict({**CONFIGS[kind].to_dict(), **settings})
        model = auto_of(kind).from_config(config)
        for parameter in model.parameters():  # also biases and norms, which start as zeros and ones
            nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / kind)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / kind)
        return tmp_path / kind, model.eval()

    return write


def load(kind: str, folder: Path, **settings: Any) -> LoadedModel:
    config = ModelConfig(path=str(folder), dropout=0.0, **settings)
    if kind in CLASSIFIERS:
        return load_classifier(config, LABELS, load_own_tokenizer(config))
    return load_whole(AutoModelForCausalLM, config, "model", "weights for a causal LM", None)


@torch.no_grad()
def by_hand(kind: str, source: Any, layers: list[int]) -> Tensor:
    """The logits of the source's own modules, called one after the other."""
    if kind == "bert":
        hidden = source.bert.embeddings(IDS)
        for i in layers:
            hidden = source.bert.encoder.layer[i](hidden)
        return source.classifier(source.bert.pooler(hidden))
    if kind == "roberta":
        hidden = source.roberta.embeddings(IDS)
        padding = torch.where(IDS == 1, -torch.inf, 0.0)[:, None, None]
        for i in layers:
            hidden = source.roberta.encoder.layer[i](hidden, padding)
        return source.classifier(hidden)
    if kind == "distilbert":
        hidden = source.distilbert.embeddings(IDS)
        for i in layers:
            hidden = source.distilbert.transformer.layer[i](hidden)
        return source.classifier(source.pre_classifier(hidden[:, 0]).relu())
    if kind == "gpt2":
        hidden = source.transformer.wte(IDS) + source.transformer.wpe(POSITIONS)
        for i in layers:
            hidden = source.transformer.h[i](hidden, attention_mask=CAUSAL)
        return source.lm_head(source.transformer.ln_f(hidden))
    narrow = CAUSAL.masked_fill(POSITIONS[..., None] - POSITIONS[:, None] >= 3, -torch.inf)
    hidden = source.model.embed_tokens(IDS)
    turned = source.model.rotary_emb(hidden, POSITIONS)
    for i in layers:
        mask = narrow if kind == "qwen2" and i >= 2 else CAUSAL
        hidden = source.model.layers[i](hidden, attention_mask=mask, position_embeddings=turned)
    return source.lm_head(source.model.norm(hidden))


@torch.no_grad()
def logits(kind: str, model: Any) -> Tensor:
    return model(IDS, attention_mask=(IDS != 1).long() if kind == "roberta" else torch.ones_like(IDS)).logits


@every_kind
def test_weights_are_copied_and_renumbered(source_of: Callable[..., Any], kind: str) -> None:
    folder, source = source_of(kind)
    student = load(kind, folder, keep_layers=[1, 3])
    found, given, stack = student.model.state_dict(), source.state_dict(), STACKS[kind]
    wanted = {name: tensor for name, tensor in given.items() if not name.startswith(stack)}
    for new, old in ((0, 1), (1, 3)):
        of_layer = {name: tensor for name, tensor in given.items() if name.startswith(f"{stack}.{old}.")}
        assert of_layer
        wanted |= {name.replace(f"{stack}.{old}.", f"{stack}.{new}."): tensor for name, tensor in of_layer.items()}

    assert set(found) == set(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert student.model.config.num_hidden_layers == 2
    assert student.new_weights == []
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in student.model.parameters())


@every_kind
def test_logits_are_those_of_the_kept_modules_in_order(source_of: Callable[..., Any], kind: str) -> None:
    folder, source = source_of(kind)
    for layers in ([0, 3], [1, 2, 3], [2]):
        student = load(kind, folder, keep_layers=layers).model
        torch.testing.assert_close(logits(kind, student), by_hand(kind, source, layers))
    assert (logits(kind, student) - by_hand(kind, source, [1])).abs().max() > 0.01  # another layer shows


@every_kind
def test_keeping_all_layers_returns_the_source(
    source_of: Callable[..., Any], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, source = source_of(kind)
    with caplog.at_level(logging.INFO, "forge"):
        student = load(kind, folder, keep_layers=[0, 1, 2, 3])

    assert torch.equal(logits(kind, student.model), logits(kind, source))
    assert f"model: model.keep_layers keeps all 4 layers of {folder}" in caplog.messages
    assert student.facts()["kept_layers"] == [0, 1, 2, 3]


@every_kind
def test_the_files_of_a_student_load_without_forge(source_of: Callable[..., Any], kind: str, tmp_path: Path) -> None:
    folder, _ = source_of(kind)
    student = load(kind, folder, keep_layers=[0, 3]).model.eval()
    student.save_pretrained(tmp_path / "final")
    again = auto_of(kind).from_pretrained(tmp_path / "final").eval()

    assert torch.equal(logits(kind, again), logits(kind, student))
    assert again.config.num_hidden_layers == 2
    on_it = load(kind, tmp_path / "final")
    assert on_it.facts()["kept_layers"] is None
    assert torch.equal(logits(kind, on_it.model.eval()), logits(kind, student))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_student_generates_with_a_cache_what_it_generates_without(source_of: Callable[..., Any], kind: str) -> None:
    folder, _ = source_of(kind)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 19, "top_k": 7}))
    student: Any = load(kind, folder, keep_layers=[1, 3]).model.eval()

    assert (student.generation_config.eos_token_id, student.generation_config.top_k) == (19, 7)
    with_cache, without = (
        student.generate(IDS[:, :3], max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=None)
        for use_cache in (True, False)
    )
    assert with_cache.shape == (2, 9)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_embeddings_and_head_stay_one_weight(source_of: Callable[..., Any], kind: str) -> None:
    student = load(kind, source_of(kind)[0], keep_layers=[0, 3]).model
    head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
    assert head.weight is embeddings.weight
    assert "lm_head.weight" not in AllWeights(student).tensors()  # written once

    apart = load(kind, source_of(kind, tie_word_embeddings=False)[0], keep_layers=[0, 3]).model
    assert apart.get_output_embeddings().weight is not apart.get_input_embeddings().weight


@pytest.mark.parametrize("training", [True, False])
def test_a_student_keeps_the_mode_of_its_source_and_what_its_base_ties(
    source_of: Callable[..., Any], training: bool
) -> None:
    source = load("llama", source_of("llama")[0]).model.train(training)
    vars(source)[TIED_IN_BASE] = True
    kept = KeptLayers([0, 3], source.config.num_hidden_layers)
    cut = keep_layers(source, kept, "it", "model")
    assert all(module.training == training for module in cut.modules())
    assert vars(cut)[TIED_IN_BASE] is True
    del vars(source)[TIED_IN_BASE]
    assert TIED_IN_BASE not in vars(keep_layers(source, kept, "it", "model"))


def test_per_layer_lists_of_the_config_are_cut_too(source_of: Callable[..., Any]) -> None:
    student = load("qwen2", source_of("qwen2")[0], keep_layers=[0, 1, 3]).model
    assert student.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert [layer.self_attn.sliding_window for layer in student.model.layers] == [None, None, 3]
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]


def test_labels_stay_aligned(source_of: Callable[..., Any]) -> None:
    folder, source = source_of("bert")
    student = load("bert", folder, keep_layers=[0, 3])
    assert student.label_ids == load("bert", folder).label_ids == [1, 2, 0]
    assert student.model.config.id2label == source.config.id2label

    renewed = load("bert", folder, keep_layers=[0, 3], new_head=True)
    assert renewed.label_ids == [0, 1, 2]
    assert renewed.new_weights == ["classifier.bias", "classifier.weight"]
    assert not torch.equal(renewed.model.classifier.weight, source.classifier.weight)
    assert torch.equal(renewed.model.bert.pooler.dense.weight, source.bert.pooler.dense.weight)


def test_adapters_are_merged_before_layers_are_cut(source_of: Callable[..., Any], tmp_path: Path) -> None:
    base, source = source_of("llama")
    adapter, targets = tmp_path / "adapter", ["q_proj", "down_proj", "lm_head"]
    write_adapter(AutoModelForCausalLM.from_pretrained(base), base, adapter, target_modules=targets)
    merged = load("llama", adapter).model.eval()
    student = load("llama", adapter, keep_layers=[1, 3])

    torch.testing.assert_close(logits("llama", student.model), by_hand("llama", merged, [1, 3]))
    assert (logits("llama", student.model) - by_hand("llama", source, [1, 3])).abs().max() > 0.01
    assert student.facts()["untied"]  # the adapter changes only the head, so the two were untied
    assert not student.model.config.tie_word_embeddings
    assert student.facts()["adapter"] is None


def test_facts_and_log_name_the_layers(source_of: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = source_of("bert")
    with caplog.at_level(logging.INFO, "forge"):
        facts = load("bert", folder, keep_layers=[0, 3]).facts()
    assert (facts["kept_layers"], facts["layers_of"]) == ([0, 3], 4)
    assert f"model: layers 0 and 3 of 4 of {folder}" in caplog.messages
    assert str(KeptLayers([0, 2, 5], 6)) == "layers 0, 2 and 5 of 6"
    assert str(KeptLayers([2], 6)) == "layer 2 of 6"
    whole = load("bert", folder).facts()
    assert (whole["kept_layers"], whole["layers_of"]) == (None, None)


def test_a_layer_that_does_not_exist_is_refused_before_weights_are_read(source_of: Callable[..., Any]) -> None:
    folder, _ = source_of("bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.keep_layers has layer 4, .*bert has 4 layers, numbered 0 to 3"):
        load("bert", folder, keep_layers=[0, 4])


def test_models_with_several_stacks_or_shared_layers_are_refused(source_of: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"keep_layers: m is of type t5, .*\(.*\)"):
        check_layers([0], T5Config(num_layers=2), "m", "model")
    parts = {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}}
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.json").write_text(json.dumps({"model_type": "vision-encoder-decoder", **parts}))
    with pytest.raises(UsageError, match=r"keep_layers: .* type vision-encoder-decoder"):
        load("llama", tmp_path / "two", keep_layers=[0])

    folder, _ = source_of("bert")
    albert = AlbertConfig(**DEEP, embedding_size=8, id2label=dict(enumerate(LABELS)))
    AutoModelForSequenceClassification.from_config(albert).save_pretrained(folder)
    with pytest.raises(UsageError, match=r"the 4 layers of .* \(AlbertForSequenceClassification\)"):
        load("bert", folder, keep_layers=[0])


def test_a_layer_that_would_compute_something_else_in_its_new_place_is_refused(source_of: Callable[..., Any]) -> None:
    folder, source = source_of("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UsageError, match=r"layer 2 cannot become layer 1: .* type gpt2 .*attn\.scaling is"):
        load("gpt2", folder, keep_layers=[0, 2])
    first = load("gpt2", folder, keep_layers=[0, 1]).model
    torch.testing.assert_close(logits("gpt2", first), by_hand("gpt2", source, [0, 1]))


class Counting(LlamaForCausalLM):
    """Each layer has a buffer of its own that no file holds, as the masks of some architectures are."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.register_buffer("offset", torch.tensor(number // 2), persistent=False)


def test_layers_whose_buffers_differ_are_refused() -> None:
    source = Counting(CONFIGS["llama"])
    with pytest.raises(UsageError, match=r"layer 3 cannot become layer 1: .*\(offset differs\)"):
        keep_layers(source, KeptLayers([0, 3], 4), "it", "model")
    assert len(keep_layers(source, KeptLayers([1], 4), "it", "model").model.layers) == 1


WHOLE = "task: {type: classification, dataset: {path: data}}\n"


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("keep_layers: []", "c.yaml:3: model.keep_layers has no entries; it needs at least 1"),
        ("keep_layers: [3, 0]", "c.yaml:3: model.keep_layers is a list; it must be ascending, each number once, such "
         "as [0, 3]"),
        ("keep_layers: [0, 0]", "c.yaml:3: model.keep_layers is a list; it must be ascending, each number once, such "
         "as [0]"),
        ("keep_layers: [-1, 3]", "c.yaml:3: model.keep_layers.0 is -1; it must be at least 0"),
        ("keep_layers: 3", "c.yaml:3: model.keep_layers is `3`; it must be a list, such as [a, b], or null"),
        *((f"keep_layers: [0]\n  {text}", f"c.yaml:2: model has both {key} and model.keep_layers, but ")
          for key, text in (("model.lora", "lora: {rank: 2}"), ("model.continue_adapter", "continue_adapter: true"),
                            ("model.load_in_4bit", "load_in_4bit: true"))),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused(
    model: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(f"{WHOLE}model:\n  {model}\n  path: m\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Path("c.yaml"))
    (found,) = caught.value.problems
    assert found.startswith(problem)


def test_a_model_from_scratch_has_no_layers_to_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(f"{WHOLE}model: {{config: {{model_type: bert}}, tokenizer: t, keep_layers: [0]}}\n")
    with pytest.raises(ConfigError, match=r"c.yaml:2: model\.keep_layers has no effect .* model\.config"):
        load_config(Path("c.yaml"))
    Path("c.yaml").write_text(f"{WHOLE}model: {{path: m, keep_layers: [0, 3]}}\n")
    scratch = load_config(Path("c.yaml"), ["model.config={model_type: bert}", "model.tokenizer=t"])
    assert any("model.keep_layers (c.yaml:2" in notice for notice in scratch.notices)


def test_other_layers_change_the_meaning_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(f"{WHOLE}model: {{path: m, keep_layers: [0, 3]}}\n")
    old = effective(with_absolute_paths(load_config(Path("c.yaml")).config))
    assert old["model"]["keep_layers"] == [0, 3]
    other = load_config(Path("c.yaml"), ["model.keep_layers=[0, 2]"]).config
    (change,) = changes(old, other, rows_per_step_old=8, rows_per_step_new=8)
    assert (str(change), change.kind) == ("model.keep_layers: [0, 3] -> [0, 2]", Kind.MEANING)
    del old["model"]["keep_layers"]  # of a forge that did not have the key
    whole = load_config(Path("c.yaml"), ["model.keep_layers=null"]).config
    assert changes(old, whole, rows_per_step_old=8, rows_per_step_new=8) == []


def test_a_resumed_run_ends_bit_identical_and_the_next_starts_from_it(
    config_file: Path, source_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = source_of("bert")
    runs = tmp_path / "outputs" / "tiny"
    settings = ("model.keep_layers=[0, 3]", f"model.path={folder}", "model.dropout=0.1", "evaluation.baseline=false")
    new = ("--config", config_file, "--max_steps", "40", *(part for item in settings for part in ("--set", item)))
    whole = forge(*new, "--run_name", "whole")
    assert whole.returncode == 0, whole.stderr
    assert f"model: layers 0 and 3 of 4 of {folder}" in whole.stderr
    recorded = read_json(runs / "whole" / "run_metadata.json")["model"]
    assert (recorded["kept_layers"], recorded["layers_of"], recorded["source"]) == ([0, 3], 4, str(folder))
    assert f"- Initialised from layers 0 and 3 of 4 of {folder}" in (runs / "whole" / "final" / "README.md").read_text()

    assert ended_at("step 3/40", signal.SIGTERM, *new, "--run_name", "broken") == 75
    resumed = forge("--resume", runs / "broken")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("model.safetensors", "config.json"):
        assert (runs / "broken" / "final" / name).read_bytes() == (runs / "whole" / "final" / name).read_bytes()

    final = AutoModelForSequenceClassification.from_pretrained(runs / "whole" / "final")
    assert (final.config.num_hidden_layers, len(final.bert.encoder.layer)) == (2, 2)
    after = load("bert", runs / "whole")
    assert (after.facts()["kept_layers"], after.new_weights, after.label_ids) == (None, [], [1, 2, 0])
