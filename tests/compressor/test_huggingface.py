"""Compressed checkpoints are Hugging Face's: from_pretrained, save_pretrained, state dicts, Trainer."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_config, make_tokenizer
from torch.optim.optimizer import Optimizer
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from compressor import checkpoint as checkpoints
from compressor.checkpoint import Record
from compressor.config import ConfigError, MethodOptions
from compressor.layers import compressed_layers, materialize, stacked_weight
from compressor.methods import find_method
from compressor.omp import blocks, dense_codes
from compressor.quantizer import DSFormerConfig
from compressor.share import share_folder
from compressor.stf import code_stacks, stacks_of
from compressor.tasks import find_task

ROOT = Path(__file__).parents[2]
TEXTS = ["the film was very good .", "a dull plot .", "queen and king in paris ."]
OPTIONS = {"ds": {"gamma": 0.4, "delta": 0.375, "iterations": 2}, "svd": {"preset": "2x"}, "nm": {}}
WAYS = [("ds", "ft-f-stf"), ("ds", "ft-f-ft"), ("svd", "ft-f-ft"), ("nm", "ft-f-ft"), ("nm", "sr-ste")]


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "albert":
        sizes = {name: value for name, value in make_config().to_dict().items() if name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings",
        )}  # fmt: skip
        model: Any = AlbertForSequenceClassification(AlbertConfig(**sizes, embedding_size=16))
    else:
        model = (BertForQuestionAnswering if kind == "qa" else BertForSequenceClassification)(make_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0, std=0.3)
    return model


def save(folder: Path, name: str, schedule: Any, kind: str = "classify") -> Any:
    """A folder as `dsformer-compress compress` writes it, untrained; returns the model as it computed before."""
    model, method = make_model(kind), find_method(name).from_options(MethodOptions(**OPTIONS[name]))
    plan = method.plan(model)
    method.attach(model, plan, method.factorize(model, plan, None), schedule)  # type: ignore[arg-type] - looks at none
    checkpoints.save(folder, model, make_tokenizer(), Record("sst2", "tiny", schedule, 0, 0.0), method)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    batch = make_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ds") / "ds"
    save(path, "ds", "ft-f-stf")
    return path


@pytest.mark.parametrize(("name", "schedule"), WAYS, ids=lambda value: value)
def test_a_folder_is_loaded_and_saved_by_transformers(name: str, schedule: str, tmp_path: Path) -> None:
    expected = logits(save(tmp_path / "first", name, schedule))
    own = checkpoints.load(str(tmp_path / "first"), find_task("sst2"))
    assert own.method == name
    assert not list(compressed_layers(own.model))
    torch.testing.assert_close(logits(own.model), expected, atol=1e-6, rtol=0)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    assert len(list(compressed_layers(model))) == 12
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "second")
    for file in ("config.json", "model.safetensors"):
        old, new = (tmp_path / which / file for which in ("first", "second"))
        if file == "config.json":
            assert json.loads(old.read_text()) == json.loads(new.read_text())
        else:
            saved = load_file(new)
            assert all(torch.equal(tensor, saved.pop(part)) for part, tensor in load_file(old).items())
            assert not saved
            assert not any(part.endswith("query.weight") for part in load_file(old))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert torch.equal(logits(again), logits(model))
    assert json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]["method"] == name


@pytest.mark.parametrize("kind", ["qa", "albert"])
def test_other_heads_and_architectures(kind: str, tmp_path: Path) -> None:
    expected = logits(save(tmp_path / "ds", "ds", "ft-f-stf", kind))
    auto = AutoModelForQuestionAnswering if kind == "qa" else AutoModelForSequenceClassification
    torch.testing.assert_close(logits(auto.from_pretrained(tmp_path / "ds")), expected, atol=1e-5, rtol=0)


def test_without_its_head_and_with_another(folder: Path, tmp_path: Path) -> None:
    whole = AutoModelForSequenceClassification.from_pretrained(folder)
    base = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(logits(base), logits(whole.bert), atol=0, rtol=0)
    base.save_pretrained(tmp_path / "base")
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    assert torch.equal(logits(headed.bert), logits(base))


@pytest.mark.parametrize("first", ["compressor", "transformers"])
def test_importing_the_compressor_is_enough(first: str, folder: Path) -> None:
    """Before transformers, of which nothing is imported then, or after it."""
    imports = ["import compressor", "from transformers import AutoModelForSequenceClassification as Auto"]
    program = [
        *(imports if first == "compressor" else imports[::-1]),
        f"model = Auto.from_pretrained({str(folder)!r})",
        "print(type(model.bert.encoder.layer[0].output.dense).__name__, model.hf_quantizer.quantization_config.method)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["FactorizedLinear", "ds"], done.stderr


def test_compressed_layers_are_not_shared(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compressed already; share the layers of the dense one"):
        share_folder(str(folder), tmp_path / "shared")


def test_dequantize_gives_plain_layers(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    expected = logits(model)
    model.dequantize()
    assert type(model.bert.encoder.layer[0].output.dense) is torch.nn.Linear
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(plain), expected)


def test_models_are_float32(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_folders_of_before_load(folder: Path, tmp_path: Path) -> None:
    """Dense effective weights, and the factors in a file beside them; the method may be unnamed."""
    own = checkpoints.load(str(folder), find_task("sst2"))
    old = tmp_path / "old"
    own.model.save_pretrained(old)
    own.tokenizer.save_pretrained(old)
    tensors = {
        f"{i}.{part}": torch.from_numpy(array)
        for i, each in enumerate(own.factors)
        for part, array in each.tensors().items()
    }
    members = json.dumps([each.members for each in own.factors])
    for about in ({}, {"method": "ds"}):
        save_file(tensors, old / "factors.safetensors", metadata={"members": members, **about})
        loaded = checkpoints.load(str(old), find_task("sst2"))
        assert loaded.method == "ds"
        assert [each.members for each in loaded.factors] == [each.members for each in own.factors]
        assert torch.equal(logits(loaded.model), logits(own.model))
    save_file(tensors, old / "factors.safetensors", metadata={"members": members, "method": "tucker"})
    with pytest.raises(ConfigError, match="is broken: unknown method 'tucker'"):
        checkpoints.load(str(old), find_task("sst2"))


def test_what_cannot_be_loaded_is_said(folder: Path, tmp_path: Path) -> None:
    config = DSFormerConfig("ds", "ft-f-stf", [])
    make_model("classify").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", quantization_config=config)
    other = shutil.copytree(folder, tmp_path / "other")
    about = json.loads((other / "config.json").read_text())
    about["quantization_config"]["method"] = "tucker"
    (other / "config.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="unknown method 'tucker'"):
        checkpoints.load(str(other), find_task("sst2"))


# --- training ------------------------------------------------------------------------------------------------


def rows(n: int) -> list[dict[str, Any]]:
    tokenizer = make_tokenizer()
    return [
        {**tokenizer(TEXTS[i % 3], padding="max_length", max_length=12), "labels": int(i % 3 == 0)} for i in range(n)
    ]


class Watch(TrainerCallback):  # type: ignore[misc]
    """How often the weights had been coded when a step was due, and how far grad D was from Sᵀ(S·D − W)."""

    def __init__(self) -> None:
        self.codings: list[int] = []
        self.errors: list[float] = []
        self.n_codings = 0

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.codings.append(self.n_codings)
        for stack in stacks_of(model):
            weight = torch.cat([model.get_submodule(name).weight.detach() for name in stack.names])
            codes = dense_codes(stack.indices, stack.values, stack.plan.n_atoms)
            wanted = codes.transpose(1, 2) @ blocks(stack.dense() - weight, stack.plan.block_size)
            self.errors.append(float((stack.dictionary.grad - wanted).norm() / (wanted.norm() + 1e-3)))


def arguments(output: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        **changes,
    }
    return TrainingArguments(output_dir=str(output), **settings)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_the_trainer_codes_once_a_step(
    accumulated: int, optimizer: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor import huggingface

    watch, code_model = Watch(), huggingface.code_model

    def counted(model: Any) -> float:
        watch.n_codings += 1
        return code_model(model)

    monkeypatch.setattr(huggingface, "code_model", counted)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    before = [stack.dictionary.detach().clone() for stack in stacks_of(model)]
    settings = arguments(tmp_path / "run", gradient_accumulation_steps=accumulated, optim=optimizer)
    trainer = Trainer(model, settings, train_dataset=rows(24), callbacks=[watch])
    trainer.train()
    assert watch.codings == [0, 1, 2]  # the first step computes with the codes of the file
    assert max(watch.errors) < 1e-4
    assert all(not torch.equal(old, stack.dictionary) for old, stack in zip(before, stacks_of(model), strict=True))

    trainer.save_model(str(tmp_path / "trained"))
    assert watch.n_codings == 3
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)
    assert watch.n_codings == 3
    for stack in stacks_of(model):
        held = stack.values.clone()
        assert code_stacks([stack], [stacked_weight(model, stack.names)]) == [0.0]
        torch.testing.assert_close(stack.values.detach(), held.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "schedule"), WAYS, ids=lambda value: value)
def test_the_trainer_trains_every_method(name: str, schedule: str, tmp_path: Path) -> None:
    """The loss of a few rows falls; a checkpoint on the way is loaded back; what is frozen stays."""
    save(tmp_path / "start", name, schedule)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    places = [part for part in load_file(tmp_path / "start" / "model.safetensors") if part.endswith("indices")]
    settings = arguments(
        tmp_path / "run",
        max_steps=20,
        learning_rate=3e-3,
        save_strategy="steps",
        save_steps=10,
        optim="adamw_torch",
        lr_scheduler_type="constant",
    )
    trainer = Trainer(model, settings, train_dataset=rows(12), eval_dataset=rows(12))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    state = load_file(tmp_path / "run" / "checkpoint-20" / "model.safetensors")
    if schedule == "ft-f-ft":
        start = load_file(tmp_path / "start" / "model.safetensors")
        assert all(torch.equal(state[part], start[part]) for part in places)

    expected = logits(model)
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    assert not torch.allclose(logits(fresh), expected, atol=1e-2)
    fresh.load_state_dict(state)  # every name is known, and none is missing
    torch.testing.assert_close(logits(fresh), expected, atol=1e-5, rtol=0)
    resumed = Trainer(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "start"), settings, train_dataset=rows(12)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    # What a file does not hold, weights that the model does not compute with, starts anew: then it is not the same run.
    whole = schedule == "ft-f-ft"
    torch.testing.assert_close(logits(resumed.model), expected, atol=1e-5 if whole else 1.0, rtol=0)


def test_a_copy_is_coded_by_its_own_optimizer(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    twin = copy.deepcopy(model)
    expected = logits(model)
    assert torch.equal(logits(twin), expected)
    optimizer: Optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1)
    batch = make_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    twin.train()(**batch, labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    assert (twin.compression.due, model.compression.due) == (True, False)
    assert torch.equal(logits(model), expected)
    moved = logits(twin)
    assert not torch.allclose(moved, expected, atol=1e-2)
    assert torch.equal(logits(materialize(twin)), moved)


def test_a_dense_state_is_refused(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(RuntimeError, match=r"Missing key.*factorized_stacks\.0\.dictionary"):
        model.load_state_dict(make_model("classify").state_dict())
