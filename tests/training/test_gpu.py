"""What only a GPU shows; `pytest -m gpu` runs it where there is one."""

from functools import partial

import pytest
import torch
from conftest import run_script
from fits import devices, found, job, options, stages
from test_waits import ON_REPLIES, rows_of
from tiny_engines import tiny

from w2sg.data.loading import Examples, StageData
from w2sg.training.label_modules import FitContext

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def fit(folder, **trainer):
    return found(stages(folder, devices(**trainer)).fit("student", {"seed": 5}, job))


def test_a_fit_in_fp32_ends_with_the_weights_of_a_cpu(tmp_path):
    cpu = fit(tmp_path / "cpu")
    gpu = fit(tmp_path / "gpu", accelerator="gpu", precision="32-true", matmul="highest")
    assert torch.allclose(cpu[0], gpu[0], atol=1e-4)


def test_a_fit_computes_in_mixed_precision_unless_told_otherwise(tmp_path):
    on = devices(accelerator="gpu")
    assert on.config.precision == ("bf16-mixed" if torch.cuda.is_bf16_supported(False) else "32-true")
    cpu, gpu = fit(tmp_path / "cpu"), fit(tmp_path / "gpu", accelerator="gpu")
    assert gpu[1][-1]["loss"] == pytest.approx(cpu[1][-1]["loss"], rel=0.05)


@pytest.mark.parametrize(("make", "each", "columns"), ON_REPLIES.values(), ids=ON_REPLIES)
def test_no_step_waits(make, each, columns):
    """CUDA itself refuses whatever waits."""
    rows = rows_of(64, each, columns)
    examples = Examples(rows, list(map(str, range(64))), torch.zeros(64, dtype=torch.long), torch.zeros(64, 2))
    seen = []

    class Module(make.func):
        def training_step(self, batch, index):
            if index >= 2:  # the first steps choose how much goes through at once
                torch.cuda.set_sync_debug_mode("error")
            try:
                super().training_step(batch, index)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            seen.append(index)

    trainer = devices(accelerator="gpu").trainer(
        max_epochs=1, logger=False, limit_val_batches=0, enable_checkpointing=False
    )
    fit = FitContext(tiny("llama").train(), options(batch_size=4), 1000, every=1000)
    trainer.fit(partial(Module, **make.keywords)(fit), StageData(train=examples, batch_size=4))
    assert len(seen) == 16


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_gpus_train_what_one_trains(how, pairs_folder, tiny_gpt2, tmp_path):
    same = ["dataset=local", f"dataset.path={pairs_folder}", "weak=bow", f"strong.name={tiny_gpt2}", "strong.tune=full"]
    same += ["strong.feature_layer=null", "strong.max_length=64", "trainer.precision=32-true", "strong.epochs=1"]
    accuracy = []
    for trainer in (["trainer=gpu"], [f"trainer={how}", "trainer.devices=2"]):
        said = run_script("train.py", *same, *trainer, f"out={tmp_path / trainer[0]}", fresh=True).stdout
        accuracy.append([line for line in said.splitlines() if "strong student" in line])
    assert accuracy[0] == accuracy[1] != []
