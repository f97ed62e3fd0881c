"""Seconds and peak memory of one DPO step, against plain code and TRL's DPOTrainer, at equal gradients.

    python benchmarks/dpo_step.py --threads 2

One decoder, the same pairs in the same batches, AdamW; the loops interleaved in one run:

- plain: chosen and rejected in two forwards padded apart, the reference read in each step, logits of all positions;
- then one change after the other: a cached reference, log-probabilities of reply tokens only and in chunks, rows packed
  with several texts, and the prompt read once for both replies, which is what w2sg does;
- the same through Lightning, as `w2sg.stages` trains;
- TRL's DPOTrainer (where it is installed), with the reference read in each step and with precomputed log-probabilities.

Printed: losses and gradient norms of one batch beside the plain ones, seconds of a step, ratios, tokens read, peak
memory of a process of its own, and what a step costs if the reading of the reference is charged to a single epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.util
import io
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import lightning as L
import numpy as np
import torch
from common import matrix_product_rate, model_source, now, options_of, parse, peak_of, print_peak
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from w2sg.config.schema import FitOptions
from w2sg.data.completions import Completions, per_reply
from w2sg.data.loading import Examples, make_batch
from w2sg.data.messages import Dialogue
from w2sg.losses import preferences as preference
from w2sg.losses.logprobs import token_logprobs
from w2sg.models.policy import Policy, load_policy
from w2sg.training.devices import quiet
from w2sg.training.label_modules import FitContext
from w2sg.training.text_modules import PreferenceModule

BETA, LR, CLIP = 0.1, 1e-6, 1.0
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, chosen, rejected
PLAIN, CACHED, CHUNKED, PACKED, OURS = (
    "plain",
    "+ cached reference",
    "+ replies only, in chunks",
    "+ packed",
    "+ prompt shared (w2sg)",
)
LIGHTNING, TRL, TRL_CACHED = "w2sg in Lightning", "TRL", "TRL, precomputed"


def main() -> None:
    """Run the comparison and print it."""
    options = options_of(__doc__, layers=6, width=768, vocabulary=50257, batch=8, max_length=512)
    options.add_argument("--model", help="a file of conf/model, a folder or a hub id; default is a random GPT-2")
    options.add_argument("--data", help="jsonl file of {chosen, rejected}; synthetic lengths where there is none")
    options.add_argument("--tokenizer", default="smollm2-135m-gguf", help="of --data, where the model is random")
    options.add_argument("--batches", type=int, default=2, help="batches that are timed; two or more")
    options.add_argument("--no-memory", action="store_true", help="do not start a process for each loop's peak memory")
    options.add_argument("--memory-of", help=argparse.SUPPRESS)  # what such a process does
    args = parse(options)
    quiet()
    names = [PLAIN, CACHED, CHUNKED, PACKED, OURS, LIGHTNING]
    if importlib.util.find_spec("trl") is not None:
        names += [TRL, TRL_CACHED]
    else:
        print("TRL is not installed: `pip install trl`")

    bench = Bench(args, [args.memory_of] if args.memory_of else names)
    if args.memory_of:
        print_peak(args.device, lambda: [bench.step(args.memory_of, batch) for batch in bench.batches[:2]])
        return

    middle = [statistics.median(len(part[k]) for part in bench.pairs) for k in range(3)]
    weights = sum(p.numel() for p in bench.policy.parameters())
    print(
        f"{bench.name}: {weights / 1e6:.1f}M weights; batches of {args.batch} "
        f"pairs, {middle[0]:.0f} tokens of prompt, {middle[1]:.0f} and {middle[2]:.0f} of replies (medians); "
        f"{args.device}, {torch.get_num_threads()} threads"
    )
    for line in bench.check(names):
        print(line, flush=True)

    seconds: dict[str, list[float]] = {name: [] for name in names}
    reading: dict[str, list[float]] = {name: [] for name in names if name in (OURS, TRL_CACHED)}
    for repeat in range(args.repeats + 1):
        for name in names:  # interleaved, so that a busy machine slows all alike
            took = bench.timed(name)
            if repeat:  # the first round warms up
                seconds[name] += took
        for name, times in reading.items():
            begun = now(args.device)
            for batch in bench.batches:
                bench.read_reference(name, batch)
            if repeat:
                times.append((now(args.device) - begun) / len(bench.batches))
    memory = {} if args.no_memory else {name: f"  {peak_of(name, __file__):5.2f} GB" for name in names}
    print(f"this machine's fp32 matrix product: {matrix_product_rate(args.device) / 1e9:.0f} GFLOP/s")
    middles = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [(name, middles[name], f"{bench.tokens[name]:6.0f} tokens{memory.get(name, '')}") for name in names]
    for name, times in reading.items():
        charged = middles[name] + statistics.median(times)
        rows.append((f"{'w2sg' if name == OURS else name}, reading charged", charged, ""))
    before = None
    saved = middles[PLAIN] - middles[OURS]
    for name, took, rest in rows:
        share = f"{(before - took) / saved:6.1%} of the saving" if name in (CACHED, CHUNKED, PACKED, OURS) else " " * 20
        against = f"x{middles[TRL] / took:5.2f} of TRL" if TRL in middles else ""
        before = took
        print(f"{name:34s} {took:7.3f} s/step  x{middles[PLAIN] / took:5.2f} of plain  {against}  {share}  {rest}")


class Bench:
    """A policy, its reference, pairs, and a step of each loop.

    Args:
        names: the loops that will be asked for; nothing is kept in memory for others.
    """

    def __init__(self, args: argparse.Namespace, names: list[str]):
        self.args, self.device, self.folder = args, args.device, tempfile.TemporaryDirectory()
        source = model_source(args.model) if args.model else None
        self.pairs = read(args, source)
        if len(self.pairs) < args.batch:
            raise SystemExit(f"{len(self.pairs)} pairs do not make a batch of {args.batch}")
        self.batches = [
            list(range(start, start + args.batch)) for start in range(0, len(self.pairs) - args.batch + 1, args.batch)
        ]
        self.name, plain = args.model or "a random GPT-2", None
        torch.manual_seed(0)
        if source is None:
            heads = max(1, args.width // 64)
            config = GPT2Config(
                vocab_size=args.vocabulary,
                n_embd=args.width,
                n_layer=args.layers,
                n_head=heads,
                n_positions=1024,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
                use_cache=False,
            )
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            self.policy = Policy(plain)
        else:
            self.policy = load_policy(source)
        self.policy.to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LR, weight_decay=0.0)

        prompts, replies = [p for p, *_ in self.pairs], [tuple(rest) for _, *rest in self.pairs]
        self.shared = Completions(prompts, replies)  # prompt | chosen | rejected
        # a text for each reply, its prompt with it: chosen of pair i at 2 i, rejected at 2 i + 1
        self.apart = Completions(
            [p for p in prompts for _ in range(2)], [(reply,) for pair in replies for reply in pair]
        )
        self.reference: nn.Module | None = None
        if not args.memory_of or args.memory_of in (PLAIN, TRL):
            self.reference = copy.deepcopy(self.policy.plain).eval().requires_grad_(False)
        self.cached = torch.cat([self.read_reference(OURS, batch) for batch in self.batches])
        self.trainers = {name: self._trl(name) for name in names if name in (TRL, TRL_CACHED)}
        self.examples = Examples(
            self.shared,
            [str(i) for i in range(len(self.pairs))],
            torch.zeros(len(self.pairs), dtype=torch.long),
            targets=self.cached.cpu(),
        )
        # where policy and reference are the same, every loss is log 2, whatever the reference was read as
        with torch.no_grad():
            generator = torch.Generator(self.device).manual_seed(1)
            for weight in self.policy.parameters():
                size = weight.std() if weight.numel() > 1 else weight.abs()
                weight += 0.05 * size * torch.randn(weight.shape, generator=generator, device=self.device)
        self.tokens: dict[str, float] = {}
        gc.collect()

    # -- losses of a batch of pairs: [b] each --------------------------------------------------------------------------

    def _dpo(self, policy: Tensor, reference: Tensor) -> Tensor:
        return preference.sigmoid(policy, reference, torch.ones_like(policy), beta=BETA).mean()

    def _padded(self, batch: list[int], side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, attention mask, and which tokens are of the reply: one side of some pairs, filled on the right."""
        texts = [torch.from_numpy(np.concatenate([self.pairs[i][0], self.pairs[i][side]])) for i in batch]
        sizes = torch.tensor([len(text) for text in texts])
        before = torch.tensor([len(self.pairs[i][0]) for i in batch])
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        place = torch.arange(ids.shape[1])
        mask = place < sizes[:, None]
        return tuple(x.to(self.device) for x in (ids, mask.long(), mask & (place >= before[:, None])))

    def _whole(self, model: nn.Module, batch: list[int]) -> tuple[Tensor, int]:
        """[b, 2] by two forwards with logits of all positions, and tokens read."""
        sums, tokens = [], 0
        for side in (1, 2):
            ids, mask, reply = self._padded(batch, side)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            found = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            sums.append((found * reply[:, 1:]).sum(1))
            tokens += ids.numel()
        return torch.stack(sums, 1), tokens

    def _replies_only(self, batch: list[int]) -> tuple[Tensor, int]:
        """[b, 2] by two forwards, the output layer at replies alone."""
        sums, tokens, (weight, bias) = [], 0, self.policy.head()
        for side in (1, 2):
            ids, mask, reply = self._padded(batch, side)
            hidden = self.policy.plain.base_model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state[:, :-1]
            row, place = torch.nonzero(reply[:, 1:], as_tuple=True)
            found = token_logprobs(hidden[row, place], weight, ids[row, place + 1], bias)
            sums.append(torch.zeros(len(batch), device=self.device).index_add(0, row, found))
            tokens += ids.numel()
        return torch.stack(sums, 1), tokens

    def _packed(self, completions: Completions, index: list[int]) -> tuple[Tensor, int]:
        inputs = {k: v.to(self.device) for k, v in completions.collate(index).items()}
        sums = per_reply(self.policy(inputs), inputs["owner"], inputs["sizes"])
        return sums.view(-1, 2), inputs["input_ids"].numel()

    def loss(self, name: str, batch: list[int]) -> Tensor:
        """The mean loss of a batch, with its graph."""
        reference = self.cached[batch]
        if name in (PLAIN, CACHED):
            found, tokens = self._whole(self.policy.plain, batch)
            if name == PLAIN:
                with torch.no_grad():
                    reference, more = self._whole(self.reference, batch)
                tokens += more
        elif name == CHUNKED:
            found, tokens = self._replies_only(batch)
        elif name == PACKED:
            found, tokens = self._packed(self.apart, [2 * i + j for i in batch for j in range(2)])
        else:
            found, tokens = self._packed(self.shared, batch)
        self.tokens[name] = tokens
        return self._dpo(found, reference)

    @torch.no_grad()
    def read_reference(self, name: str, batch: list[int]) -> Tensor:
        """The reference's sums [b, 2], as they are read once before training (the policy stands for it)."""
        if name == OURS:
            return self._packed(self.shared, batch)[0]
        trainer = self.trainers[name]
        return torch.stack(trainer.compute_ref_log_probs(trainer.model, self._collated(trainer, batch)), 1)

    # -- a step --------------------------------------------------------------------------------------------------------

    def backward(self, name: str, batch: list[int]) -> tuple[float, float]:
        """Loss and gradient norm, the gradient in place (and clipped, as in training)."""
        if name in self.trainers:
            trainer = self.trainers[name]
            inputs = self._collated(trainer, batch)
            self.tokens[name] = inputs["input_ids"].numel() * (2 if name == TRL else 1)
            loss = trainer.training_step(trainer.model, inputs)
        else:
            loss = self.loss(name, batch)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), CLIP)
        return float(loss.detach()), float(norm)

    def step(self, name: str, batch: list[int]) -> None:
        """One optimizer step."""
        if name == LIGHTNING:
            self.fit([batch])
            return
        self.backward(name, batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fit(self, batches: list[list[int]], first_loss: bool = False) -> PreferenceModule:
        """Steps by Lightning with the module that w2sg's stages use."""
        options = FitOptions(
            lr=LR,
            epochs=1,
            batch_size=self.args.batch,
            optimizer="adamw",
            schedule="constant",
            warmup=0.0,
            weight_decay=0.0,
            clip=CLIP,
            validation=0.0,
            patience=None,
        )
        loss = partial(preference.sigmoid, beta=BETA)
        module = PreferenceModule(
            FitContext(self.policy, options, len(batches), 1 if first_loss else 10), loss=loss, beta=BETA
        )
        trainer = L.Trainer(
            accelerator="cpu" if self.device == "cpu" else "auto",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        collated = [make_batch(self.examples, np.array(batch), 0, 1) for batch in batches]
        self.tokens[LIGHTNING] = collated[-1].padded
        trainer.fit(module, train_dataloaders=_Given(collated))
        self.policy.to(self.device)  # Lightning takes it off a GPU
        return module

    def timed(self, name: str) -> list[float]:
        """Seconds of a step with each batch."""
        if name == LIGHTNING:
            module = self.fit(self.batches)
            now(self.device)
            return [module.seconds_so_far / len(self.batches)]
        found = []
        for batch in self.batches:
            begun = now(self.device)
            self.step(name, batch)
            found.append(now(self.device) - begun)
        return [statistics.mean(found)]

    # -- that all do the same ------------------------------------------------------------------------------------------

    def check(self, names: list[str]) -> list[str]:
        """Loss and gradient of the first batch by each loop, beside the plain ones."""
        batch, lines, wanted = self.batches[0], [], None
        for name in names:
            if name == LIGHTNING:  # steps at once; with these weights it takes the same step as the others
                state = {k: v.clone() for k, v in self.policy.state_dict().items()}
                point = self.fit([batch], first_loss=True).curve[0]
                self.policy.load_state_dict(state)
                loss, norm, angle = point["loss"], point["grad_norm"], None
            else:
                loss, norm = self.backward(name, batch)
                gradient = torch.cat([p.grad.flatten() for p in self.policy.parameters()])
                self.optimizer.zero_grad()
                wanted = wanted or (loss, norm, gradient)
                angle = float((gradient - wanted[2]).norm() / wanted[2].norm())
            off = abs(norm / wanted[1] - 1)
            verdict = "the same" if abs(loss - wanted[0]) < 1e-5 and off < 1e-4 else "DIFFERS"
            whole = "" if angle is None else f"difference of gradients {angle:.1e}  "
            lines.append(
                f"{name:26s} loss {loss:.7f} (off by {abs(loss - wanted[0]):.1e})  gradient norm {norm:.6f} (off by "
                f"{off:.1e})  {whole}{verdict}"
            )
        return lines

    # -- TRL -----------------------------------------------------------------------------------------------------------

    def _trl(self, name: str):
        """A DPOTrainer on our model, optimizer and token ids; without gradient checkpointing, which we do not use."""
        os.environ["TQDM_DISABLE"] = "1"
        from datasets import Dataset, disable_progress_bars
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer

        class Given(DPOTrainer):
            def _prepare_dataset(self, dataset, *_args, **_options):
                return dataset  # token ids already

        disable_progress_bars()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"!": 0}, unk_token="!")), eos_token="!", pad_token="!"
        )
        columns = {
            key: [part[k].tolist() for part in self.pairs]
            for k, key in enumerate(("prompt_ids", "chosen_ids", "rejected_ids"))
        }
        config = DPOConfig(
            output_dir=self.folder.name,
            beta=BETA,
            learning_rate=LR,
            max_length=None,
            per_device_train_batch_size=self.args.batch,
            precompute_ref_log_probs=name == TRL_CACHED,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=self.device == "cpu",
            report_to="none",
        )
        with contextlib.redirect_stderr(io.StringIO()):
            trainer = Given(
                model=self.policy.plain,
                ref_model=self.reference if name == TRL else None,  # precomputed by the policy, still untrained
                args=config,
                train_dataset=Dataset.from_dict(columns),
                processing_class=tokenizer,
                optimizers=(self.optimizer, None),
            )
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    @staticmethod
    def _collated(trainer, batch: list[int]) -> dict[str, Tensor]:
        return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in batch]))


class _Given:
    """Batches as a loader."""

    def __init__(self, batches: list):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def read(args: argparse.Namespace, source) -> list[Pair]:
    """Pairs as token ids, in random order; both replies of a pair fit with their prompt."""
    count = args.batch * args.batches
    if args.data:
        chat = (source or model_source(args.tokenizer)).chat
        rows = []
        with open(args.data, encoding="utf-8") as file:
            for line in file:
                rows.append(json.loads(line))
                if len(rows) == 2 * count:
                    break
        cut = [row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:") for row in rows]
        prompts = chat.prompts([Dialogue.of_text(row["chosen"][:c]) for row, c in zip(rows, cut, strict=True)])
        sides = [chat.replies([row[s][c:] for row, c in zip(rows, cut, strict=True)]) for s in ("chosen", "rejected")]
        sides = [[np.append(reply, chat.end) for reply in side] for side in sides]
        pairs = [
            pair
            for pair in zip(prompts, *sides, strict=True)
            if min(map(len, pair)) > 1 and len(pair[0]) + max(len(pair[1]), len(pair[2])) <= args.max_length
        ]
        if source is None:
            pairs = [tuple(part % args.vocabulary for part in pair) for pair in pairs]
        return pairs[:count]
    draw = np.random.default_rng(0)
    vocabulary = args.vocabulary if source is None else source.config.vocab_size
    # as in HH-RLHF with GPT-2's tokenizer: medians of 130 and 50, and long tails
    prompts = np.clip(draw.lognormal(np.log(130), 0.87, count), 8, args.max_length // 2)
    replies = np.clip(draw.lognormal(np.log(50), 0.9, (count, 2)), 2, args.max_length // 2)
    text: Callable[[float], np.ndarray] = lambda n: draw.integers(0, vocabulary, int(n))  # noqa: E731
    return [(text(p), text(a), text(b)) for p, (a, b) in zip(prompts, replies, strict=True)]


if __name__ == "__main__":
    main()
