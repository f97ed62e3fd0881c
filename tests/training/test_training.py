"""One optimizer step is one global batch, however it is cut; NaN stops; a stage goes on where it was killed."""

import os
import signal
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fits import examples, options

from w2sg import losses
from w2sg.cli.launch import readable_errors
from w2sg.config.schema import TrainerConfig
from w2sg.data.loading import Examples, Features, StageData
from w2sg.errors import TrainingError, UserError
from w2sg.models.heads import BagOfWords, LinearHead
from w2sg.stops import Stopped
from w2sg.store.files import read_json
from w2sg.store.shards import Shards
from w2sg.store.store import Store
from w2sg.training.devices import Devices
from w2sg.training.label_modules import SoftLabelModule, oriented
from w2sg.training.reading_module import ReadingModule
from w2sg.training.schedule import learning_rate_factor
from w2sg.training.stage_values import load_values
from w2sg.training.stages import FitJob, ReadJob, Stages

LOSSES = {
    "ce": losses.cross_entropy,
    "rkl": losses.reverse_kl,
    "confidence": partial(losses.confidence, alpha=0.5, warmup=0.3),
    "reverse_confidence": partial(losses.reverse_confidence, alpha=0.5, warmup=0.3),
    "cace": partial(losses.cace, quantile=0.4),
}


def soft(loss):
    return partial(SoftLabelModule, loss=loss)


def devices(**changes) -> Devices:
    node = {"accelerator": "cpu"}
    return Devices(TrainerConfig.model_validate(node | changes))


def stages(tmp_path, **changes) -> Stages:
    settings = {"checkpoint_minutes": 10.0, "curve_every": 1} | changes
    return Stages(Store(tmp_path / "store"), devices(eval_tokens=256), lambda name: None, **settings)


def job(loss=losses.cross_entropy, scorer=None, micro_batch=None, held_out=None, watched=None, **changes) -> FitJob:
    torch.manual_seed(3)
    scorer = scorer or BagOfWords(64, True, 2)
    return FitJob(scorer, soft(loss), examples(), held_out, options(**changes), 5, micro_batch, {}, watched or {})


def weights(folder):
    from safetensors.torch import load_file

    return load_file(next((folder / "model").glob("*.safetensors")))


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_do_not_change_what_is_learned(name, tmp_path):
    """The public code's confidence threshold is of the micro-batch; with micro-batches of 1 it is degenerate."""
    work = stages(tmp_path)
    learned = [
        weights(work.fit("m", {"micro": micro or 0}, lambda m=micro: job(LOSSES[name], micro_batch=m)))["words.weight"]
        for micro in (None, 3, 1)
    ]
    torch.testing.assert_close(learned[0], learned[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(learned[0], learned[2], atol=1e-6, rtol=1e-5)


def test_a_threshold_per_micro_batch_would_be_noticed(tmp_path, monkeypatch):
    work = stages(tmp_path)
    whole = weights(work.fit("m", {"a": 1}, lambda: job(LOSSES["confidence"])))["words.weight"]
    monkeypatch.setattr("w2sg.training.label_modules.needs_whole_batch", lambda loss: False)
    cut = weights(work.fit("m", {"a": 2}, lambda: job(LOSSES["confidence"], micro_batch=1)))["words.weight"]
    assert (whole - cut).abs().max() > 1e-3


def test_one_step_is_the_textbook_step(tmp_path):
    """Against plain SGD-free arithmetic: the gradient of the mean loss over the batch, one AdamW step."""
    data = examples(8)
    torch.manual_seed(3)
    ours = BagOfWords(64, True, 2)
    plain = BagOfWords(64, True, 2)
    plain.load_state_dict(ours.state_dict())
    work = stages(tmp_path)
    setting = options(epochs=1, batch_size=8, clip=None, schedule="constant", warmup=0.0)
    folder = work.fit("m", {}, lambda: FitJob(ours, soft(losses.reverse_kl), data, None, setting, 0, 3))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.01)
    logits = oriented(plain(data.inputs.collate(range(8))), data.first)
    losses.reverse_kl(logits, data.targets).mean().backward()
    optimizer.step()
    torch.testing.assert_close(weights(folder)["words.weight"], plain.words.weight.detach(), atol=1e-6, rtol=1e-5)
    assert len(read_json(folder / "curve.json")) == 1


def test_two_passes_draw_the_same_dropout(tmp_path):
    """The gradient of the second pass belongs to the logits of the first only if both dropped the same units."""
    seen = []

    class Dropped(BagOfWords):
        def forward(self, batch):
            scores = torch.nn.functional.dropout(super().forward(batch), 0.5, self.training)
            seen.append(scores.detach().clone())
            return scores

    stages(tmp_path).fit("m", {}, lambda: job(LOSSES["confidence"], Dropped(64, True, 2), micro_batch=4))
    steps = [seen[i : i + 4] for i in range(0, len(seen), 4)]  # two micro-batches, read twice
    assert len(steps) == 8
    for first, second, first_again, second_again in steps:
        assert torch.equal(first, first_again)
        assert torch.equal(second, second_again)
        assert (first == 0).any() or (second == 0).any()  # something was dropped


def test_learning_rate_rises_and_falls_without_a_jump():
    for schedule in ("cosine", "linear", "constant"):
        factor = learning_rate_factor(schedule, 0.2, 50)
        values = [factor(step) for step in range(50)]
        assert values[0] == pytest.approx(0.1)
        assert max(values) == pytest.approx(1.0)
        assert max(abs(a - b) for a, b in pairwise(values)) <= 0.1 + 1e-9
        assert values[-1] == (1.0 if schedule == "constant" else pytest.approx(0.0, abs=0.03))


def test_a_loss_that_is_not_finite_stops_the_stage_with_the_ids(tmp_path):
    def broken(logits, targets, progress):
        loss = losses.cross_entropy(logits, targets)
        return loss * torch.nan if progress > 0.4 else loss

    work = stages(tmp_path)
    with pytest.raises(TrainingError, match=r"student: the loss is not finite at step \d of 8, on examples id\d+"):
        work.fit("student", {"a": 1}, lambda: job(broken))
    assert not list((tmp_path / "store").glob("student-????????????????"))  # nothing was sealed


def test_a_loss_that_hard_labels_make_infinite_is_told_from_one_that_diverges(tmp_path):
    def student_first(logits, targets, _progress):
        return (logits.softmax(-1) * (logits.log_softmax(-1) - targets.log_softmax(-1))).sum(-1)

    hard = job(student_first)
    rows = hard.train
    gold = losses.hard_logits(rows.gold, 2)
    hard.train = Examples(rows.inputs, rows.ids, rows.first, gold, rows.gold)
    with pytest.raises(TrainingError, match=r"infinite on hard labels.*mark it @w2sg\.losses\.needs_soft_labels"):
        stages(tmp_path).fit("student", {"hard": 1}, lambda: hard)
    with pytest.raises(TrainingError, match="Lower the learning rate"):
        stages(tmp_path).fit("student", {"hard": 2}, lambda: job(lambda x, _, __: student_first(x, x, 0) * torch.nan))
    hard.module = partial(hard.module, loss=losses.needs_soft_labels(student_first))
    with pytest.raises(UserError, match=r"optim\.hard_label_clamp: this loss is infinite on hard labels"):
        stages(tmp_path).fit("student", {"hard": 3}, lambda: hard)


def test_early_stopping_keeps_the_best_epoch(tmp_path):
    held_out = examples(20, seed=9)
    work = stages(tmp_path)
    folder = work.fit("m", {}, lambda: job(held_out=held_out, epochs=30, lr=0.5, validation=0.1, patience=2))
    info = work.records[-1].info
    points = [p["held_out_loss"] for p in read_json(folder / "curve.json") if "held_out_loss" in p]
    assert info["best_epoch"] == int(np.argmin(points)) + 1
    assert info["steps"] < 30 * 4  # it stopped
    scorer = BagOfWords(64, True, 2)
    scorer.load_state_dict(weights(folder))
    logits = oriented(scorer(held_out.inputs.collate(range(20))), held_out.first)
    assert float(losses.cross_entropy(logits, held_out.targets).mean().detach()) == pytest.approx(min(points), abs=1e-5)


def test_selection_looks_at_weak_labels_unless_gold_is_asked_for(tmp_path):
    held_out = examples(20, seed=9)
    opposite = Examples(held_out.inputs, held_out.ids, held_out.first, held_out.targets, 1 - held_out.gold)
    results = {}
    for gold in (False, True):
        work = stages(tmp_path)
        made = job(held_out=opposite, epochs=6, lr=0.3, validation=0.1)
        made.module = partial(made.module, select_on_gold=gold)
        folder = work.fit("m", {"gold": gold}, lambda m=made: m)
        results[gold] = [p["held_out_loss"] for p in read_json(folder / "curve.json") if "held_out_loss" in p]
    assert results[False] != results[True]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("kill_at", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("selecting", [False, True])
def test_a_fit_killed_at_any_step_ends_as_if_it_had_not_been(kill_at, selecting, tmp_path, monkeypatch):
    """Four steps an epoch, three epochs: inside an epoch, at its end, at its beginning, before the end."""
    changes = {"epochs": 3, "validation": 0.1 if selecting else 0.0}

    def make():
        held_out = examples(20, seed=9) if selecting else None
        return job(LOSSES["confidence"], held_out=held_out, watched={"test": examples(20, seed=4)}, **changes)

    unbroken = stages(tmp_path / "a", checkpoint_minutes=0.0, eval_every=2)
    whole = unbroken.fit("m", {"k": 1}, make)
    broken = stages(tmp_path / "b", checkpoint_minutes=0.0, eval_every=2)
    step = SoftLabelModule.training_step

    def dying(self, batch, index):
        if self.global_step == kill_at:
            raise Killed
        step(self, batch, index)

    monkeypatch.setattr(SoftLabelModule, "training_step", dying)
    with pytest.raises(Killed):
        broken.fit("m", {"k": 1}, make)
    monkeypatch.setattr(SoftLabelModule, "training_step", step)
    resumed = broken.fit("m", {"k": 1}, make)
    assert torch.equal(weights(whole)["words.weight"], weights(resumed)["words.weight"])
    assert read_json(whole / "curve.json") == read_json(resumed / "curve.json")
    a, b = unbroken.records[-1].info, broken.records[-1].info
    assert {k: a[k] for k in a if k != "seconds"} == {k: b[k] for k in b if k != "seconds"}


@pytest.mark.parametrize("kind", ["fit", "read"])
def test_a_stage_that_is_asked_to_end_keeps_what_it_has_done(kind, tmp_path, monkeypatch):
    """SIGTERM, long before the next checkpoint or file of findings is due."""
    module, method = {"fit": (SoftLabelModule, "training_step"), "read": (ReadingModule, "predict_step")}[kind]
    torch.manual_seed(0)
    data, model, seen = examples(50), BagOfWords(64, True, 2), []
    step = getattr(module, method)

    def work(folder):
        if kind == "fit":
            return weights(stages(tmp_path / folder).fit("m", {"k": 1}, lambda: job(LOSSES["ce"])))["words.weight"]
        return load_values(stages(tmp_path / folder).read("m", {"k": 1}, lambda: ReadJob(model, model, data)))[1]

    def asked(self, batch, index):
        seen.append(index)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, index)

    monkeypatch.setattr(module, method, asked)
    with pytest.raises(SystemExit):
        work("broken")
    assert len(seen) == 3
    broken = work("broken")
    taken = len(seen)
    monkeypatch.setattr(module, method, step)
    whole = work("whole")
    assert torch.equal(whole, broken)
    seen.clear()
    monkeypatch.setattr(module, method, asked)
    seen += [0] * 3
    work("again")
    assert len(seen) - 3 == taken - (kind == "read")  # all steps, none twice; a batch in hand is read anew


@pytest.mark.parametrize("kind", ["sigterm", "exit"])
def test_the_command_line_says_that_it_was_asked_to_end(kind, capsys):
    error = Stopped(signal.SIGTERM) if kind == "sigterm" else SystemExit(3)
    with pytest.raises(SystemExit) as caught, readable_errors():
        raise error
    assert caught.value.code == {"sigterm": 143, "exit": 3}[kind]
    assert ("resumes from here" in capsys.readouterr().err) == (kind == "sigterm")


def test_an_unreadable_checkpoint_is_named_and_the_stage_starts_afresh(tmp_path, caplog):
    work = stages(tmp_path, checkpoint_minutes=0.0)
    with work.store.claim("m", {"k": 1}) as claim:
        (claim.scratch / f"fit-000000001-{0:032x}.ckpt").write_bytes(b"not a checkpoint")
    work.fit("m", {"k": 1}, job)
    assert "is damaged and removed" in caplog.text
    assert "starts afresh" in caplog.text
    assert not work.records[-1].cached


# -- reading ---------------------------------------------------------------------------------------------------------


def test_reading_joins_by_row_and_counts_tokens(tmp_path):
    data = examples(50)
    torch.manual_seed(0)
    model = BagOfWords(64, True, 2)
    work = stages(tmp_path)
    folder = work.read("scores", {}, lambda: ReadJob(model, model, data))
    ids, values = load_values(folder)
    assert ids == data.ids
    torch.testing.assert_close(values, model(data.inputs.collate(range(50))).detach())
    record = work.records[-1]
    assert record.tokens == data.inputs.useful.sum()
    assert 0.5 < record.useful_token_fraction <= 1.0


def test_reading_killed_half_way_reads_only_the_rest(tmp_path, monkeypatch):
    data = examples(50)
    torch.manual_seed(0)
    model = BagOfWords(64, True, 2)
    monkeypatch.setattr(Shards.__init__, "__defaults__", (0.0,))  # a shard after every batch
    seen: list[int] = []

    def reading(batch):
        if len(seen) == 3:
            raise Killed
        seen.append(len(batch["ends"]))
        return model(batch)

    with pytest.raises(Killed):
        stages(tmp_path).read("scores", {}, lambda: ReadJob(model, reading, data))
    before = sum(seen)
    assert 0 < before < 50
    seen = [0] * 10
    work = stages(tmp_path)
    folder = work.read("scores", {}, lambda: ReadJob(model, reading, data))
    assert sum(seen) == 50 - before
    torch.testing.assert_close(load_values(folder)[1], model(data.inputs.collate(range(50))).detach())
    assert work.records[-1].tokens == data.inputs.useful.sum()


def test_heads_train_on_features_without_reading_a_token(tmp_path):
    random = torch.Generator().manual_seed(0)
    states = torch.randn(200, 2, 16, generator=random)
    direction = torch.randn(16, generator=random)
    margin = (states[:, 0] - states[:, 1]) @ direction
    targets = torch.stack([margin, -margin], 1)
    data = Examples(Features(states), [str(i) for i in range(200)], torch.zeros(200, dtype=torch.long), targets)
    head = LinearHead(16, True, 2)
    head.standardise(states)
    work = stages(tmp_path)
    setting = options(epochs=30, lr=0.05, batch_size=32)
    work.fit("head", {}, lambda: FitJob(head, soft(losses.cross_entropy), data, None, setting, 0))
    accuracy = (head({"features": states}).argmax(1) == targets.argmax(1)).float().mean()
    assert accuracy > 0.95
    assert work.records[-1].tokens == 0
    assert work.records[-1].useful_token_fraction is None


def test_a_loader_counts_its_epochs_and_goes_on_in_the_middle_of_one():
    data = StageData(train=examples(), batch_size=8, seed=1)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = data.trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=0, strategy=strategy)
    loader = data.train_dataloader()
    epochs = [[batch.ids for batch in loader] for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    trainer.global_step = 6
    again = data.train_dataloader()
    assert [[batch.ids for batch in again] for _ in range(2)] == [epochs[1][2:], epochs[2]]
