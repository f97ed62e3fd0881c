"""In which numbers a run computes: by device, in keys, on the page."""

from types import SimpleNamespace

import pytest
import torch
from fits import devices

from w2sg.config.schema import TrainerConfig
from w2sg.errors import ConfigError
from w2sg.training import cpu_speed, precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A GPU as torch tells of it: ``card(bf16, capability)``."""

    def given(bf16: bool, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "Tesla V100")

    return given


def test_a_gpu_computes_in_bf16_and_tf32_and_a_cpu_in_fp32(card):
    card(True, (9, 0))
    auto = TrainerConfig()
    used = precision.settled(auto, GPU)
    assert (used.precision, used.matmul) == ("bf16-mixed", "high")
    assert precision.key_of(used) == "bf16-mixed, matmul high"
    assert "in bf16, those that stay fp32 in TF32" in precision.words_of(used)
    asked = TrainerConfig(precision="32-true", matmul="highest")  # the protocol of papers is one word each
    assert precision.settled(asked, GPU) == asked
    assert precision.key_of(precision.settled(TrainerConfig(matmul="highest"), GPU)) == "bf16-mixed"
    on_cpu = precision.settled(auto, CPU)
    assert (on_cpu.precision, on_cpu.matmul, precision.key_of(on_cpu)) == ("32-true", "highest", "32-true")


def test_a_gpu_without_bf16_says_so_in_one_line(card):
    card(False, (7, 0))
    auto = TrainerConfig()
    used = precision.settled(auto, GPU)
    assert (used.precision, used.matmul) == ("32-true", "highest")
    assert precision.notes(auto, used, GPU) == [
        "trainer.precision: Tesla V100 has no bf16, so the run computes in fp32",
    ]
    with pytest.raises(ConfigError, match=r"trainer\.precision: Tesla V100 has no bf16; use trainer.precision=32-true"):
        precision.settled(TrainerConfig(precision="bf16-mixed"), GPU)


def test_torch_is_told_how_to_multiply(monkeypatch):
    monkeypatch.setattr(cpu_speed, "bf16_speedup", lambda: 0.25)
    before = torch.get_float32_matmul_precision()
    try:
        assert devices(matmul="high").notes == []
        assert torch.get_float32_matmul_precision() == "high"
        slow = devices(precision="bf16-mixed")
        assert torch.get_float32_matmul_precision() == "highest"
        assert slow.notes == [
            "trainer.precision=bf16-mixed: products in bf16 take 4.0 times as long as in fp32 on this CPU; "
            "trainer.precision=32-true is faster"
        ]
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_speed_of_bf16_is_measured_once_for_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(cpu_speed, "measured", lambda: calls.append(1) or 2.5)
    for _ in range(2):
        cpu_speed.bf16_speedup.cache_clear()  # as in another process
        assert cpu_speed.bf16_speedup() == 2.5
        assert cpu_speed.slower() is None
    assert len(calls) == 1
    (tmp_path / "w2sg" / "bf16_speedup.json").write_text("{broken")  # stopped while it was written: measured again
    cpu_speed.bf16_speedup.cache_clear()
    assert cpu_speed.bf16_speedup() == 2.5
    assert len(calls) == 2
    cpu_speed.bf16_speedup.cache_clear()


def test_the_comparison_of_products_counts_seconds_of_both(monkeypatch):
    """With a clock that goes by what is multiplied, bf16 is four times as fast."""
    now = [0.0]

    def linear(a, b):
        now[0] += 1.0 if a.dtype == torch.bfloat16 else 4.0

    monkeypatch.setattr(cpu_speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert cpu_speed.measured() == 4.0
