"""What training costs on one GPU, in at most nine minutes and without a network: ratios, with the chip's name.

    python benchmarks/gpu.py --write

All weights are drawn at random, at the sizes of known models. Each part runs in a process of its own, for its share of
the minutes, and a part that fails says why in its line:

- products: the chip's own matrix products in bf16, TF32 and fp32, of which all else is a share;
- reward: a reward model of the size of GPT-2 XL, trained whole on pairs as long as HH-RLHF's, against the plain loop of
  public weak-to-strong code under the same autocast;
- lora: a reward model of the size of Llama 3 8B, with adapters over weights in bf16;
- dpo: a policy of the size of Llama 3.2 1B, against TRL's DPOTrainer at its best setting (no filling, fused output
  layer, reference read beforehand), in tokens of replies per second;
- waits: how often a training step waits for the GPU.

Peak memory stands beside what `w2sg.models.footprint` foresees. ``--write`` puts the lines into benchmarks/README.md.
``--device cpu --small`` runs the same code at toy sizes, which says nothing of speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from common import interleaved, now, options_of, parse
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig

from w2sg import losses
from w2sg.config.schema import FitOptions, TrainerConfig
from w2sg.data.completions import Completions
from w2sg.data.loading import Examples, StageData
from w2sg.data.rows import pack
from w2sg.losses import preferences
from w2sg.memory import Budget
from w2sg.models import footprint
from w2sg.models.policy import Policy
from w2sg.models.scorer import LanguageScorer
from w2sg.training.devices import Devices
from w2sg.training.label_modules import FitContext, FitModule, SoftLabelModule
from w2sg.training.text_modules import PreferenceModule

README = Path(__file__).with_name("README.md")
MARKS = ("<!-- gpu -->", "<!-- /gpu -->")
SHARES = {"products": 0.04, "reward": 0.36, "lora": 0.2, "dpo": 0.34, "waits": 0.06}  # of the minutes
BATCH, WARM = 32, 3  # pairs of a step; steps that are not counted
LINES = {
    "products": "its own matrix products",
    "reward": "reward model, GPT-2 XL's size, whole",
    "lora": "reward model, Llama 3 8B's size, LoRA",
    "dpo": "DPO, Llama 3.2 1B's size, whole",
    "waits": "waits for the GPU in a training step",
}
# NVIDIA's data sheets: dense bf16, TFLOP/s
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}


def main() -> None:
    """Run every part in a process of its own, and print or write their lines."""
    options = options_of(__doc__)
    options.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    options.add_argument("--small", action="store_true", help="toy sizes, to see that it runs")
    options.add_argument("--write", action="store_true", help="put the lines into benchmarks/README.md")
    options.add_argument("--only", nargs="*", choices=SHARES, default=list(SHARES), help="these parts alone")
    options.add_argument("--part", choices=SHARES, help=argparse.SUPPRESS)  # what a process does
    options.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parse(options)
    if args.device == "cpu" and not args.small:
        raise SystemExit("there is no CUDA GPU here; `--device cpu --small` shows that the benchmark runs")
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return
    found = {part: outcome(part, args) for part in args.only}
    lines = table(found, args)
    print("\n".join(lines))
    if args.write:
        before, rest = README.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        README.write_text(before + "\n".join([MARKS[0], *lines, MARKS[1]]) + after, encoding="utf-8")


def outcome(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a part found in its own process, or why it found nothing."""
    seconds = 60 * args.minutes * SHARES[part]
    command = [sys.executable, __file__, "--part", part, "--seconds", str(0.6 * seconds), "--device", args.device]
    begun = time.perf_counter()
    try:
        result = subprocess.run(
            [*command, *(["--small"] if args.small else [])],
            capture_output=True,
            text=True,
            timeout=None if args.small else seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    print(f"{part}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    if result.returncode:
        said = result.stderr.strip().splitlines() or ["it said nothing"]
        return {"failed": said[-1][:200]}
    return json.loads(result.stdout.splitlines()[-1])


def table(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """The lines of benchmarks/README.md."""
    chip = torch.cuda.get_device_name() if args.device == "cuda" else "a CPU, at toy sizes (no figures)"
    rate = found.get("products", {}).get("bf16")
    named = next((peak for name, peak in PEAKS.items() if name in chip), None)
    lines = [f"Measured on {chip}, torch {torch.__version__}:", "", "| what | found |", "|---|---|"]
    for part, values in found.items():
        if "failed" in values:
            words = f"not measured: {values['failed']}"
        elif part == "products":
            words = ", ".join(f"{name} {value:.0f} TFLOP/s" for name, value in values.items())
            if named:
                words += f"; its data sheet says bf16 {named}"
        elif part == "waits":
            words = f"{values['waits']:.1f} a step, over {values['steps']} steps"
        else:
            words = _of_training(values, rate, named)
        lines.append(f"| {LINES[part]} | {words} |")
    return lines


def _of_training(values: dict[str, Any], rate: float | None, named: float | None) -> str:
    words = [f"{values['rate']:.1f} {values['unit']}"]
    if values.get("other"):
        words.append(f"{values['rate'] / values['other']:.2f} times {values['against']}")
    else:
        words.append(f"{values['against']}: {values.get('why', 'not run')}")
    tflops = values["flops"] / 1e12
    shares = [f"{tflops / peak:.0%} of {of}" for peak, of in ((rate, "its own products"), (named, "its data sheet"))
              if peak]  # fmt: skip
    words.append(f"{tflops:.1f} TFLOP/s" + (f" ({', '.join(shares)})" if shares else ""))
    if values.get("peak"):
        words.append(f"peak {values['peak'] / 1e9:.1f} GB, foreseen {values['foreseen'] / 1e9:.1f} GB")
    return "; ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Models and rows
# ---------------------------------------------------------------------------------------------------------------------


def gpt2(small: bool, **more: Any) -> GPT2Config:
    """Of the size of GPT-2 XL."""
    sizes = (1600, 48, 25, 50257) if not small else (32, 2, 2, 199)
    names = ("n_embd", "n_layer", "n_head", "vocab_size")
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return GPT2Config(**dict(zip(names, sizes, strict=True)), **off, **ends, **more)


def llama(small: bool, billions: int, **more: Any) -> LlamaConfig:
    """Of the size of Llama 3 8B, or of Llama 3.2 1B with tied ends."""
    sizes = {8: (4096, 14336, 32, 32, 8), 1: (2048, 8192, 16, 32, 8)}[billions] if not small else (32, 64, 2, 2, 1)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 4096}
    ends |= {"vocab_size": 199 if small else 128256, "tie_word_embeddings": billions == 1}
    return LlamaConfig(**dict(zip(names, sizes, strict=True)), **ends, **more)


def made(auto: Any, config: Any, args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model on its device, drawn there: a host draws billions of numbers too slowly."""
    torch.manual_seed(0)
    with torch.device(args.device):
        return auto.from_config(config, dtype=dtype).train()


def drawn(count: int, vocabulary: int, small: bool) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Prompts with two replies, as long as HH-RLHF's: medians of 130 and 50 tokens, and long tails."""
    draw, most = np.random.default_rng(0), 16 if small else 511
    prompts = np.clip(draw.lognormal(np.log(130), 0.87, count), 8, most).astype(int)
    replies = np.clip(draw.lognormal(np.log(50), 0.9, (count, 2)), 2, most).astype(int)
    return [
        tuple(draw.integers(1, vocabulary, n) for n in (p, a, b)) for p, (a, b) in zip(prompts, replies, strict=True)
    ]


def reward_rows(count: int, vocabulary: int, small: bool) -> Examples:
    """Pairs whose first reply is the better one."""
    pairs = drawn(count, vocabulary, small)
    texts = [np.concatenate([prompt, reply]).tolist() for prompt, *both in pairs for reply in both]
    rows = pack([("", "")] * count, lambda _: texts, 1024)
    targets = losses.hard_logits(torch.zeros(count, dtype=torch.long), 2)
    return Examples(rows, list(map(str, range(count))), torch.zeros(count, dtype=torch.long), targets)


# ---------------------------------------------------------------------------------------------------------------------
# Steps as w2sg takes them
# ---------------------------------------------------------------------------------------------------------------------


class Clock(L.Callback):
    """Seconds and tokens of each step after the first ones, until the time is up."""

    def __init__(self, args: argparse.Namespace, seconds: float):
        self.args, self.until = args, time.perf_counter() + seconds
        self.seconds: list[float] = []
        self.useful, self.squares, self.replies, self.longest = 0, 0.0, 0, 0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, _: Any, batch: Any, index: int) -> None:
        moment = now(self.args.device)
        if index >= WARM:
            self.seconds.append(moment - self.last)
            self.useful += batch.useful
            self.squares += float((batch.costs.astype(float) ** 2).sum())
            self.replies += sum(batch.sizes)
            self.longest = max(self.longest, batch.padded // len(batch.micro))
        elif index == WARM - 1 and self.args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.last = moment
        trainer.should_stop = moment > self.until and index > WARM


def fitted(
    model: nn.Module, make: Callable[[FitContext], FitModule], examples: Examples, lr: float, args: Any
) -> Clock:
    """Steps by Lightning with the modules and the trainer of w2sg's stages."""
    options = FitOptions(
        lr=lr, epochs=1, batch_size=BATCH, optimizer="adamw", schedule="constant", warmup=0.0, weight_decay=0.0,
        clip=1.0, validation=0.0, patience=None,
    )  # fmt: skip
    precision = "bf16-mixed" if args.device == "cuda" else "32-true"
    devices = Devices(TrainerConfig(accelerator="gpu" if args.device == "cuda" else "cpu", precision=precision))
    clock = Clock(args, args.seconds)
    trainer = devices.trainer(
        True, max_epochs=1, callbacks=[clock], logger=False, limit_val_batches=0, enable_checkpointing=False
    )
    module = make(FitContext(model, options, len(examples) // BATCH, every=10))
    trainer.fit(module, StageData(train=examples, batch_size=BATCH, budget=Budget.of_role("strong")))
    return clock


def seen(clock: Clock, model: nn.Module, config: Any, use: footprint.Use, unit: str, count: float) -> dict[str, Any]:
    """Rates of what was timed, operations per second, and memory beside what is foreseen.

    Operations are 6 per trained and 4 per frozen weight of the blocks and useful token, and 12 per layer, width and
    pair of tokens in a row.
    """
    took, blocks = sum(clock.seconds), [w for name, w in model.named_parameters() if w.dim() == 2 and "emb" not in name]
    blocks = [w for w in blocks if w.shape[0] != config.vocab_size]
    weights = sum(w.numel() * (6 if w.requires_grad else 4) for w in blocks)
    operations = weights * clock.useful + 12 * config.num_hidden_layers * config.hidden_size * clock.squares
    states = sum(footprint.state_bytes(config, use).values())
    return {
        "rate": count * len(clock.seconds) / took if unit.startswith("pairs") else clock.replies / took,
        "unit": unit,
        "flops": operations / took,
        "peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "foreseen": states + footprint.kept(config, use).fixed + footprint.kept(config, use).token * clock.longest,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def products(args: argparse.Namespace) -> dict[str, float]:
    """TFLOP/s of large matrix products."""
    size, rates = 256 if args.small else 8192, {}
    for name, dtype, way in (("bf16", torch.bfloat16, "high"), ("TF32", torch.float32, "high"),
                             ("fp32", torch.float32, "highest")):  # fmt: skip
        torch.set_float32_matmul_precision(way)
        a, b = (torch.randn(size, size, device=args.device, dtype=dtype) for _ in range(2))
        seconds, _ = interleaved({name: partial(torch.mm, a, b)}, 5, args.device)
        rates[name] = 2 * size**3 / min(seconds[name]) / 1e12
    return rates


def reward(args: argparse.Namespace) -> dict[str, Any]:
    """Whole fine-tuning of a reward model, and the plain loop of public code over the same pairs."""
    config = gpt2(args.small, num_labels=1)
    examples = reward_rows(BATCH * (8 if args.small else 400), config.vocab_size, args.small)
    model = made(AutoModelForSequenceClassification, config, args)
    scorer = LanguageScorer(model, True, config.n_layer)
    clock = fitted(scorer, partial(SoftLabelModule, loss=losses.cross_entropy), examples,
                   1e-6, args)  # fmt: skip
    precision = "bf16-mixed" if args.device == "cuda" else "32-true"
    found = seen(clock, scorer, config, footprint.Use("full", precision, packed=True), "pairs/s", BATCH)
    scorer.to(args.device).zero_grad()
    return found | _plain(model, args, min(8, len(clock.seconds)))


def _plain(model: nn.Module, args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Pairs a second of two forwards padded apart, a pair at a time as public code does, under the same autocast."""
    pairs, against = drawn(BATCH * (steps + 1), model.config.vocab_size, args.small), "the plain loop"
    optimizer, seconds = torch.optim.AdamW(model.parameters(), lr=1e-6), []
    for step in range(steps + 1):
        begun = now(args.device)
        for prompt, *both in pairs[step * BATCH : (step + 1) * BATCH]:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                rewards = [_reward(model, np.concatenate([prompt, reply]), args.device) for reply in both]
            (nn.functional.softplus(rewards[1] - rewards[0]) / BATCH).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:
            seconds.append(now(args.device) - begun)
    return {"other": BATCH / statistics.median(seconds), "against": against}


def _reward(model: nn.Module, text: np.ndarray, device: str) -> Tensor:
    ids = torch.from_numpy(text)[None].to(device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].float()


def lora(args: argparse.Namespace) -> dict[str, Any]:
    """Adapters of a reward model over weights in bf16."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = llama(args.small, 8, num_labels=1)
    examples = reward_rows(BATCH * (8 if args.small else 200), config.vocab_size, args.small)
    model = made(AutoModelForSequenceClassification, config, args, torch.bfloat16)
    adapters = LoraConfig(TaskType.SEQ_CLS, r=16, lora_alpha=32, target_modules="all-linear")
    scorer = LanguageScorer(get_peft_model(model, adapters), True, config.num_hidden_layers)
    clock = fitted(scorer, partial(SoftLabelModule, loss=losses.cross_entropy), examples, 1e-4, args)
    precision = "bf16-mixed" if args.device == "cuda" else "32-true"
    use = footprint.Use("lora", precision, dtype="bfloat16", packed=True)
    return seen(clock, scorer, config, use, "pairs/s", BATCH) | {"against": "no other loop"}


def dpo(args: argparse.Namespace) -> dict[str, Any]:
    """Preference optimisation against TRL's trainer, in tokens of replies."""
    config = llama(args.small, 1)
    pairs = drawn(BATCH * (8 if args.small else 300), config.vocab_size, args.small)
    rows = Completions([prompt for prompt, *_ in pairs], [tuple(both) for _, *both in pairs])
    zeros = torch.zeros(len(pairs), 2)  # of the reference, which is read beforehand
    examples = Examples(rows, list(map(str, range(len(pairs)))), zeros[:, 0].long(), zeros)
    model = made(AutoModelForCausalLM, config, args)
    policy, loss = Policy(model), partial(preferences.sigmoid, beta=0.1)
    clock = fitted(policy, partial(PreferenceModule, loss=loss, beta=0.1), examples, 1e-6, args)
    precision = "bf16-mixed" if args.device == "cuda" else "32-true"
    use = footprint.Use("full", precision, packed=True)
    found = seen(clock, policy, config, use, "tokens of replies/s", BATCH) | {"against": "TRL's DPOTrainer"}
    if importlib.util.find_spec("trl") is None:
        return found | {"why": "TRL is not installed here"}
    policy.to(args.device).zero_grad()
    return found | {"other": _trl(model, pairs[: BATCH * (2 if args.small else 24)], args)}


def _trl(model: nn.Module, pairs: list[tuple[np.ndarray, ...]], args: argparse.Namespace) -> float:
    """Tokens of replies a second of TRL's trainer without filling, its reference read beforehand."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Given(DPOTrainer):
        def _prepare_dataset(self, dataset, *_args, **_options):
            return dataset  # token ids already

    class Times(TrainerCallback):
        moments: list[float]

        def on_step_end(self, *_args, **_options):
            self.moments.append(now(args.device))

    times, keys = Times(), ("prompt_ids", "chosen_ids", "rejected_ids")
    times.moments = []
    words = Tokenizer(models.WordLevel({"!": 0}, unk_token="!"))
    flash = importlib.util.find_spec("flash_attn") is not None and args.device == "cuda"
    if flash:
        model.set_attn_implementation("flash_attention_2")
    trainer = Given(
        model=model,
        args=DPOConfig(
            output_dir="/dev/null",
            max_length=None,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            precompute_ref_log_probs=True,
            padding_free=flash,
            gradient_checkpointing=False,
            learning_rate=1e-6,
            bf16=args.device == "cuda",
            use_cpu=args.device == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10**6,
        ),
        train_dataset=Dataset.from_dict({key: [pair[k].tolist() for pair in pairs] for k, key in enumerate(keys)}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="!", pad_token="!"),
        callbacks=[times],
    )
    begun = now(args.device)
    trainer.train()
    each = sum(len(a) + len(b) for _, a, b in pairs) / (len(pairs) / BATCH)
    moments = times.moments if len(times.moments) > 1 else [begun, *times.moments]
    return each * (len(moments) - 1) / (moments[-1] - moments[0])


def waits(args: argparse.Namespace) -> dict[str, float]:
    """Waits for the device in steps between points of a curve, as CUDA itself reports them; none to see on a CPU."""
    config = gpt2(True, num_labels=1)
    examples = reward_rows(BATCH * (8 if args.small else 40), config.vocab_size, True)
    scorer = LanguageScorer(made(AutoModelForSequenceClassification, config, args), True, config.n_layer)
    counts: list[int] = []

    class Module(SoftLabelModule):
        def training_step(self, batch, index):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                if args.device == "cuda":
                    torch.cuda.set_sync_debug_mode("warn")
                super().training_step(batch, index)
                if args.device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            if index >= WARM:
                counts.append(sum("synchronizing" in str(one.message) for one in said))

    args.seconds = min(args.seconds, 30)
    fitted(scorer, partial(Module, loss=losses.cross_entropy), examples, 1e-6, args)
    return {"waits": statistics.mean(counts), "steps": len(counts)}


PARTS = {"products": products, "reward": reward, "lora": lora, "dpo": dpo, "waits": waits}

if __name__ == "__main__":
    main()
