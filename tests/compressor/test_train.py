"""Training learns, distils, resumes to the same numbers, and refuses what it cannot do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_config, make_tokenizer
from transformers import BertForSequenceClassification

from compressor.config import CompressionConfig, KSVDConfig, TrainConfig
from compressor.data import classify_features, collate, complete_task, load_examples
from compressor.files import SaveError, replace_file, replaced_folder
from compressor.ksvd import relative_error
from compressor.layers import stacked_weight
from compressor.losses import attention_loss, task_loss
from compressor.omp import refit
from compressor.stf import factorize_model, stacks_of
from compressor.tasks import find_task
from compressor.train import TrainingError, _Loop, train

CONFIG = TrainConfig(max_steps=12, batch_size=16, learning_rate=3e-3, dropout=0.1, distill_weight=0.0)


@pytest.fixture(scope="session")
def setting(sentiment_tsv: Path) -> tuple[Any, Any]:
    task = complete_task(find_task("classify"), sentiment_tsv)
    examples = load_examples(task, "train", train_file=sentiment_tsv)
    return task, classify_features(examples, make_tokenizer(), 32)


def fresh(sparse: bool = False) -> Any:
    torch.manual_seed(1)
    model = BertForSequenceClassification(make_config())
    if sparse:
        factorize_model(model, CompressionConfig(gamma=0.4, delta=0.375, block_size=8), KSVDConfig(1))
    return model


@torch.no_grad()
def mean_loss(model: Any, features: Any, task: Any) -> float:
    batch = collate(features, 0)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return float(task_loss(model.eval()(**inputs), batch, task))


@pytest.mark.parametrize("frozen", [None, False, True], ids=["dense", "stf", "frozen"])
def test_loss_falls(setting: tuple[Any, Any], tmp_path: Path, frozen: bool | None) -> None:
    task, features = setting
    model = fresh(sparse=frozen is not None)
    for stack in stacks_of(model):
        if frozen:
            stack.freeze_supports()
    before = [stack.indices.clone() for stack in stacks_of(model)]
    config = TrainConfig(max_steps=60, batch_size=16, learning_rate=3e-3, dropout=0.0, distill_weight=0.0)
    assert mean_loss(model, features, task) > 0.6  # ln 2 = 0.69 is guessing
    result = train(model, features, task, config, pad_id=0, checkpoint=tmp_path / "c.pt")
    assert result.steps == 60
    assert mean_loss(model, features, task) < 0.3
    after = [stack.indices for stack in stacks_of(model)]
    if frozen is not None:
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) is frozen


def test_distillation_pulls_towards_the_teacher(setting: tuple[Any, Any], tmp_path: Path) -> None:
    task, features = setting
    teacher = fresh().eval()
    train(
        teacher,
        features,
        task,
        TrainConfig(max_steps=60, batch_size=16, learning_rate=3e-3, distill_weight=0.0),
        pad_id=0,
        checkpoint=tmp_path / "t.pt",
    )
    teacher.eval().requires_grad_(False)
    torch.manual_seed(5)
    student = BertForSequenceClassification(make_config())

    @torch.no_grad()
    def gap() -> float:
        batch = collate(features, 0)
        batch.pop("labels")
        answers = [model.eval()(**batch).logits.softmax(1) for model in (student, teacher)]
        return float((answers[0] - answers[1]).abs().mean())

    before = gap()
    config = TrainConfig(max_steps=60, batch_size=16, learning_rate=3e-3, distill_weight=1.0, hidden_weight=0.1)
    train(student, features, task, config, pad_id=0, checkpoint=tmp_path / "s.pt", teacher=teacher)
    assert gap() < before / 3


def test_attention_maps_pull_towards_the_teacher(setting: tuple[Any, Any], tmp_path: Path) -> None:
    """A student whose attention alone is trained on it comes to look where the teacher looks."""
    task, features = setting
    torch.manual_seed(2)
    teacher = BertForSequenceClassification._from_config(make_config(), attn_implementation="eager")
    student = BertForSequenceClassification._from_config(make_config(), attn_implementation="eager")
    for name, weight in teacher.named_parameters():  # the maps of a fresh model are all alike: nothing to learn
        if ".query.weight" in name or ".key.weight" in name:
            weight.data.mul_(10)
    teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def distance() -> float:
        batch = collate(features, 0)
        batch.pop("labels")
        answers = [model.eval()(**batch, output_attentions=True) for model in (student, teacher)]
        return float(attention_loss(*answers, batch["attention_mask"]))

    before = distance()
    assert before > 0.1
    config = replace(CONFIG, max_steps=40, dropout=0.0, attention_weight=10.0)
    train(student, features, task, config, pad_id=0, checkpoint=tmp_path / "s.pt", teacher=teacher)
    assert distance() < before / 2


# Half of CONFIG's steps are 6, a quarter 3: with the resumed run broken off at 7, once after supports were frozen and
# once before.
OPTIONS: dict[str, dict[str, Any]] = {
    "interval": {"omp_interval": 5},
    "pull": {"pull": 0.5},
    "clipped": {"dictionary_max_grad_norm": 0.01},
    "closed form": {"closed_form_share": 0.5},
    "hysteresis": {"support_hysteresis": 0.1},
    "frozen before": {"frozen_share": 0.5, "evaluate_every": 4},
    "frozen after": {"frozen_share": 0.25, "closed_form_share": 1.0, "pull": 0.1},
    "all frozen": {"frozen_share": 1.0},
}


@pytest.mark.parametrize("options", [None, {}, *OPTIONS.values()], ids=["dense", "stf", *OPTIONS])
def test_resume_gives_the_numbers_of_an_unbroken_run(
    setting: tuple[Any, Any], tmp_path: Path, options: dict[str, Any] | None
) -> None:
    task, features = setting
    sparse = options is not None
    config = replace(CONFIG, **(options or {}))
    unbroken = fresh(sparse)

    def score() -> float:
        return 0.0

    whole = train(unbroken, features, task, config, pad_id=0, checkpoint=tmp_path / "whole.pt", score=score)

    loop = _Loop(fresh(sparse), features, task, config, 0, None, score)
    for _ in range(7):
        loop.advance()
    loop.save(tmp_path / "half.pt")
    del loop
    torch.manual_seed(99)
    resumed = fresh(sparse)
    path = tmp_path / "half.pt"
    rest = train(resumed, features, task, config, pad_id=0, checkpoint=path, score=score, resume=True)
    for name, tensor in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    assert rest.support_flips == whole.support_flips
    if options:  # and each option does something
        plain = fresh(sparse)
        train(plain, features, task, CONFIG, pad_id=0, checkpoint=tmp_path / "plain.pt")
        assert any(
            not torch.equal(ours.dense(), theirs.dense())
            for ours, theirs in zip(stacks_of(unbroken), stacks_of(plain), strict=True)
        )


def test_last_steps_with_frozen_supports(setting: tuple[Any, Any], tmp_path: Path) -> None:
    """They begin where STF is, keep its supports and W, move D and the values, and bring the loss down."""
    task, features = setting
    config = replace(CONFIG, max_steps=50, dropout=0.0, frozen_share=0.4)
    model = fresh(sparse=True)
    loop = _Loop(model, features, task, config, 0, None)
    for _ in range(30):
        loop.advance()
    assert loop.factorizes
    loop._settle()
    before = [(stack.indices.clone(), stack.values.clone(), stack.dictionary.clone()) for stack in stacks_of(model)]
    weight = model.get_submodule(stacks_of(model)[0].names[0]).weight.detach().clone()
    start = mean_loss(model, features, task)
    for _ in range(20):
        loop.advance()
    assert not loop.factorizes
    assert torch.equal(weight, model.get_submodule(stacks_of(model)[0].names[0]).weight)
    for stack, (indices, values, dictionary) in zip(stacks_of(model), before, strict=True):
        assert torch.equal(stack.indices, indices)
        assert not torch.equal(stack.values, values)
        assert not torch.equal(stack.dictionary, dictionary)
    assert mean_loss(model, features, task) < start - 0.01


def test_kept_codes_are_those_that_were_trained(setting: tuple[Any, Any], tmp_path: Path) -> None:
    """12 steps with a coding at the 1st, 5th and 9th: supports at the end are those of the 9th, values fit W."""
    task, features = setting
    config = replace(CONFIG, omp_interval=4)
    model = fresh(sparse=True)
    loop = _Loop(model, features, task, config, 0, None)
    for _ in range(9):
        loop.advance()
    supports = [stack.indices.clone() for stack in stacks_of(model)]
    for _ in range(3):
        loop.advance()
    loop.keep_best()
    for stack, support in zip(stacks_of(model), supports, strict=True):
        assert torch.equal(stack.indices, support)
        atoms = torch.nn.functional.normalize(stack.dictionary, dim=2)
        expected = refit(stacked_weight(model, stack.names).detach(), atoms, support)
        torch.testing.assert_close(stack.values.detach(), expected)


def test_flips_are_told_over_time(setting: tuple[Any, Any], tmp_path: Path) -> None:
    task, features = setting
    config = replace(CONFIG, max_steps=50, frozen_share=0.2, omp_interval=3)
    result = train(fresh(sparse=True), features, task, config, pad_id=0, checkpoint=tmp_path / "c.pt")
    assert len(result.support_flips) == 17  # of 20, the last quarter of them frozen but for the coding that freezes
    assert max(result.support_flips) > 0
    assert result.support_flip_share == pytest.approx(sum(result.support_flips) / 17, rel=0.3)
    dense = train(fresh(), features, task, CONFIG, pad_id=0, checkpoint=tmp_path / "d.pt")
    assert dense.support_flips == []


def test_pull_brings_weights_to_their_products(setting: tuple[Any, Any], tmp_path: Path) -> None:
    task, features = setting

    def distance(pull: float) -> float:
        model = fresh(sparse=True)
        config = replace(CONFIG, max_steps=40, dropout=0.0, pull=pull)
        train(model, features, task, config, pad_id=0, checkpoint=tmp_path / "c.pt")
        return sum(relative_error(stacked_weight(model, stack.names), stack.dense()) for stack in stacks_of(model))

    assert distance(2.0) < 0.8 * distance(0.0)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "stf"])
def test_the_best_weights_are_kept(setting: tuple[Any, Any], tmp_path: Path, sparse: bool) -> None:
    task, features = setting
    config = replace(CONFIG, max_steps=7, evaluate_every=2)
    seen: list[dict[str, torch.Tensor]] = []

    def trained(model: Any, scores: list[float], **options: Any) -> int:
        seen.clear()

        def score() -> float:
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return scores.pop(0)

        kept = train(model, features, task, config, pad_id=0, score=score, **options).kept_step
        assert not scores  # measured after steps 2, 4, 6 and 7, as many as there were scores
        return kept

    unbroken = fresh(sparse)
    assert trained(unbroken, [1.0, 3.0, 2.0, 0.5], checkpoint=tmp_path / "whole.pt") == 4
    best = seen[1]
    assert any(not torch.equal(best[name], last) for name, last in seen[3].items())
    for name, tensor in unbroken.state_dict().items():
        torch.testing.assert_close(tensor, best[name], rtol=0, atol=0, msg=name)

    half = [1.0, 3.0]
    loop = _Loop(fresh(sparse), features, task, config, 0, None, lambda: half.pop(0))
    for _ in range(5):
        loop.advance()
    loop.save(tmp_path / "half.pt")
    resumed = fresh(sparse)
    assert trained(resumed, [2.0, 0.5], checkpoint=tmp_path / "half.pt", resume=True) == 4
    for name, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, best[name], rtol=0, atol=0, msg=name)

    assert trained(fresh(sparse), [1.0, 3.0, 2.0, 3.0], checkpoint=tmp_path / "tie.pt") == 7


def test_resume_refuses_what_is_not_its_own(setting: tuple[Any, Any], tmp_path: Path) -> None:
    task, features = setting
    path = tmp_path / "c.pt"
    _Loop(fresh(), features, task, CONFIG, 0, None).save(path)
    other = TrainConfig(max_steps=5, distill_weight=0.0)
    with pytest.raises(TrainingError, match="another configuration"):
        train(fresh(), features, task, other, pad_id=0, checkpoint=path, resume=True)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="cannot be read"):
        train(fresh(), features, task, CONFIG, pad_id=0, checkpoint=path, resume=True)


def test_broken_numbers_stop_training(setting: tuple[Any, Any], tmp_path: Path) -> None:
    task, features = setting
    model = fresh()
    model.classifier.weight.data.fill_(torch.inf)
    with pytest.raises(TrainingError, match="the loss became"):
        train(model, features, task, CONFIG, pad_id=0, checkpoint=tmp_path / "c.pt")
    with pytest.raises(TrainingError, match="nothing to train on"):
        train(model, [], task, CONFIG, pad_id=0, checkpoint=tmp_path / "c.pt")


def test_failed_saves_leave_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replaced_folder(target) as folder:
        (folder / "a").write_text("old")

    def write_to_a_full_disk() -> None:
        with replaced_folder(target) as folder:
            (folder / "a").write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match="untouched"):
        write_to_a_full_disk()
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    target.rename(tmp_path / ".model.old")  # what a kill between the two renames leaves
    with pytest.raises(SaveError, match="untouched"):
        write_to_a_full_disk()
    assert (target / "a").read_text() == "old"

    file = tmp_path / "file"
    replace_file(file, b"old")
    full = Path("/dev/full")
    if full.exists():
        (tmp_path / ".file.new").symlink_to(full)
        with pytest.raises(SaveError, match="No space left"):
            replace_file(file, b"new")
    assert file.read_bytes() == b"old"


def test_few_rows_get_the_least_number_of_steps(setting: tuple[Any, Any]) -> None:
    task, features = setting
    rows = features[:20]
    one_pass = TrainConfig(epochs=1, batch_size=8)
    assert _Loop(fresh(), rows, task, one_pass, 0, None).total_steps == 3
    assert _Loop(fresh(), rows, task, replace(one_pass, min_steps=7), 0, None).total_steps == 7
    assert _Loop(fresh(), rows, task, replace(one_pass, epochs=9, min_steps=7), 0, None).total_steps == 27
    assert _Loop(fresh(), rows, task, replace(one_pass, max_steps=2, min_steps=7), 0, None).total_steps == 2
