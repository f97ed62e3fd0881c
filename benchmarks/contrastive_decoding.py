"""Tokens per second of contrastive decoding, against one prompt at a time and against transformers' `generate`.

    python benchmarks/contrastive_decoding.py --data FOLDER/test.jsonl --threads 2

The aligned model is a base model with a LoRA, merged where two separate models are asked for. In one run, the loops
interleaved and at the same batches of prompts, grouped by length:

- loop: one prompt at a time, both models with their caches, as the public code does;
- generate: transformers' `generate` on a batch, with a logits processor that reads the other model with a cache of its
  own and forms ConG's score, then transformers' own temperature and top-p;
- two models: `w2sg.decoding` with two models;
- LoRA: `w2sg.decoding` with a LoRA over its base, both in one forward.

Replies end at the model's own end of turn, or where a length drawn for each prompt makes it end its turn: like those of
people, half are shorter than 50 tokens and some are far longer. Printed: tokens per second, their ratios, peak
memory, the part of all computed rows that still wrote, and the FLOP/s achieved (2 per weight, model and useful token)
as a share of this machine's own fp32 matrix product; and whether greedy decoding gives the same tokens in all of them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from common import interleaved, matrix_product_rate, model_source, options_of, parse, peak_of, print_peak
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig, LogitsProcessor
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from w2sg.data.messages import LAST_TURN, Dialogue
from w2sg.decoding.contrastive import decode, stream
from w2sg.decoding.engine import Engine, Several
from w2sg.decoding.sampling import Settings
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.models.policy import Policy, load_policy

ALPHA, TOP, TEMPERATURE, TOP_P, PENALTY = 0.4, 0.1, 0.8, 0.95, 1.2  # as in conf/method/cong.yaml
METHODS = ("loop", "generate", "two models", "LoRA")


def main() -> None:
    """Run the comparison and print it."""
    options = options_of(__doc__, prompts=32, new_tokens=128)
    options.add_argument("--model", default="smollm2-135m-gguf", help="a file of conf/model, a folder or a hub id")
    options.add_argument("--random", action="store_true", help="a small random Llama in its place")
    options.add_argument("--data", help="jsonl file of {chosen, rejected}; synthetic lengths where there is none")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--single", type=int, default=8, help="how many of the prompts are asked one at a time")
    options.add_argument("--greedy-tokens", type=int, default=24, help="how far greedy replies are compared")
    options.add_argument("--no-memory", action="store_true", help="do not start a process for each loop's peak memory")
    options.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)  # what such a process does
    args = parse(options)

    task = make_task(args)
    if args.memory_of:
        return memory_of(args, task)
    largest = max(args.batches)
    methods = {name: method(name, task) for name in METHODS}
    print(
        f"{task.name}: {task.weights / 1e6:.1f}M weights in the blocks, {task.head / 1e6:.1f}M in the output layer; "
        f"{len(task.prompts)} prompts of {statistics.median(map(len, task.prompts)):.0f} tokens (median), at most "
        f"{task.most} new ones; {args.device}, {torch.get_num_threads()} threads",
        flush=True,
    )

    task.most = min(args.new_tokens, args.greedy_tokens)
    greedy = {case: run(methods[case[0]], task, case[1], args.single, 0.0) for case in cases(args.batches)}
    task.most = args.new_tokens
    replies = {case: dict(zip(written.places, written.tokens, strict=True)) for case, written in greedy.items()}
    wanted = replies["generate", largest]
    print("greedy replies equal to those of generate: ", end="")
    for (name, batch), found in replies.items():
        equal = sum(np.array_equal(tokens, wanted[place]) for place, tokens in found.items())
        print(f"{name} at {batch}: {equal}/{len(found)}, ", end="")
    print(flush=True)

    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in greedy}
    found: dict[tuple[str, int], list[Written]] = {case: [] for case in greedy}
    for repeat in range(args.repeats):
        loops = {case: partial(sampled, methods[case[0]], task, case[1], args.single, repeat) for case in greedy}
        took, written = interleaved(loops, 1, args.device, warm_up=False)  # what was greedy warmed up
        for case in greedy:
            seconds[case].append(took[case][0] / sum(map(len, written[case][0].tokens)))
            found[case] += written[case]
    peak = matrix_product_rate(args.device)
    lengths = [len(t) for w in found["generate", largest] for t in w.tokens]
    print(
        f"sampled replies of generate: {np.mean(lengths):.0f} tokens on average, {np.median(lengths):.0f} in the "
        f"middle, {np.mean([n < task.most for n in lengths]):.0%} ended before the limit"
    )
    print(f"this machine's fp32 matrix product: {peak / 1e9:.0f} GFLOP/s")
    memory = {} if args.no_memory else {name: peak_of(name, __file__) for name in METHODS}
    reference = statistics.median(seconds["loop", 1])
    for (name, batch), each in seconds.items():
        middle, runs = statistics.median(each), found[name, batch]
        against = statistics.median(seconds["generate", batch]) / middle
        tokens = sum(len(t) for w in runs for t in w.tokens)
        useful = tokens / sum(w.rows for w in runs)
        # both models read the prompts once and each new token once; the output layer is for new tokens only
        blocks = 2 * 2 * task.weights * (tokens + sum(w.prompt_tokens for w in runs)) / tokens
        rate = (blocks + 2 * 2 * task.head) / middle
        shown = f"{memory[name]:5.2f} GB" if memory and batch == (1 if name == "loop" else largest) else ""
        print(
            f"{name:10s} batch {batch:3d} {1 / middle:8.1f} tokens/s  x{reference / middle:5.2f} of loop  "
            f"x{against:5.2f} of generate  useful rows {useful:6.1%}  {rate / peak:5.1%} of the peak  {shown}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is decoded
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """Models and prompts: ``base`` makes the model before alignment, ``adapted`` the same with a LoRA that does much.

    ``ends`` says how long each prompt's reply is at most; ``weights`` and ``head`` are those of one model's matrix
    products.
    """

    name: str
    base: Callable[[], Policy]
    adapted: Callable[[], Policy]
    prompts: list[np.ndarray]
    stop: list[int]
    ends: dict[str, int]
    most: int
    device: str
    weights: int
    head: int


@dataclass
class Written:
    """Replies to the prompts at ``places``, rows that were computed over all steps, and tokens of those prompts."""

    places: list[int]
    tokens: list[np.ndarray]
    rows: int
    prompt_tokens: int


def make_task(args: argparse.Namespace) -> Task:
    """Models and prompts as they were asked for."""
    if args.random:
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )

        def plain() -> nn.Module:
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

        name, stop, encode = "a small random Llama", list(range(0, 512, 16)), None
    else:
        source = model_source(args.model)
        plain = lambda: load_policy(source, trainable=False).plain  # noqa: E731
        name, stop, encode = args.model, source.chat.stop, source.chat.prompts

    def base() -> Policy:
        return Policy(plain()).to(args.device).requires_grad_(False)

    def adapted() -> Policy:
        torch.manual_seed(0)
        model = get_peft_model(plain(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(0)
        for key, weight in model.named_parameters():
            if "lora_A" in key:
                weight.data.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
            if "lora_B" in key:
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.002)
        return Policy(model).eval().to(args.device).requires_grad_(False)

    prompts = read(args.data, args.prompts, encode, 512 if args.random else None)
    model = base().plain
    head = model.get_output_embeddings().weight.numel()
    weights = sum(w.numel() for key, w in model.base_model.named_parameters() if w.ndim == 2 and "embed" not in key)
    drawn = np.random.default_rng(1).lognormal(np.log(50), 0.9, len(prompts))  # as long as HH-RLHF's replies
    ends = {str(p): int(np.clip(n, 2, args.new_tokens)) for p, n in enumerate(drawn)}
    return Task(name, base, adapted, prompts, stop, ends, args.new_tokens, args.device, weights, head)


def read(path: str | None, count: int, encode: Callable | None, vocabulary: int | None) -> list[np.ndarray]:
    """Prompts as token ids, longest first."""
    if path and encode is not None:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line)["chosen"] for line, _ in zip(file, range(count), strict=False)]
        prompts = encode([Dialogue.of_text(row[: row.rindex(LAST_TURN)] + LAST_TURN) for row in rows])
    else:
        draw = np.random.default_rng(0)
        lengths = np.clip(draw.lognormal(np.log(130), 0.7, count), 8, 400).astype(int)
        prompts = [draw.integers(1, vocabulary or 10000, n) for n in lengths]
    return sorted(prompts, key=len, reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# The loops
# ---------------------------------------------------------------------------------------------------------------------

Decoder = Callable[[list[np.ndarray], list[str], float, int], tuple[list[np.ndarray], int]]


def cases(batches: list[int]) -> list[tuple[str, int]]:
    """Method and batch size; the loop knows no batches."""
    return [(name, batch) for batch in sorted({1, *batches}) for name in METHODS if batch == 1 or name != "loop"]


def run(decoder: Decoder, task: Task, batch: int, single: int, temperature: float, seed: int = 0) -> Written:
    """Prompts of all lengths in batches: all of them in large batches, ``single`` one at a time."""
    count = len(task.prompts)
    places = np.linspace(0, count - 1, min(max(single, 2 * batch if batch > 1 else 1), count)).round().astype(int)
    tokens, rows = [], 0
    for start in range(0, len(places), batch):
        part = places[start : start + batch]
        found, computed = decoder([task.prompts[p] for p in part], [str(p) for p in part], temperature, seed)
        tokens, rows = tokens + found, rows + computed
    return Written(places.tolist(), tokens, rows, sum(len(task.prompts[p]) for p in places))


def method(name: str, task: Task) -> Decoder:
    """One of `METHODS`, its models loaded."""
    if name == "LoRA":
        return ours(TransformersEngine(task.adapted(), base_too=True), task)
    aligned, base = Policy(copy.deepcopy(task.adapted().model.merge_and_unload())), task.base()
    if name == "two models":
        return ours(Several(TransformersEngine(aligned), TransformersEngine(base)), task)
    return (loop if name == "loop" else generate)(aligned.plain, base.plain, task)


def close(logits: Tensor, left: Tensor, stop: list[int]) -> Tensor:
    """Where one token is left of a reply, it is the end of turn; logits or scores [..., B, V], left [B]."""
    rows = left <= 1
    logits[..., rows, :] = -1e4
    logits[..., rows, stop[0]] = 0.0
    return logits


class Ending:
    """An engine whose models end their turns at given lengths [B]."""

    def __init__(self, engine: Engine, lengths: Tensor, stop: list[int]):
        self.engine, self.left, self.stop, self.limit = engine, lengths, stop, engine.limit

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        return close(self.engine.start(prompts), self.left, self.stop)

    def extend(self, tokens: Tensor) -> Tensor:
        self.left = self.left - 1
        return close(self.engine.extend(tokens), self.left, self.stop)

    def select(self, rows: Tensor) -> None:
        self.left = self.left[rows]
        self.engine.select(rows)


def ours(engine: Engine, task: Task) -> Decoder:
    """What `w2sg.decoding` does in a batch."""

    def write(prompts: list[np.ndarray], ids: list[str], temperature: float, seed: int):
        columns = torch.tensor([[ALPHA, TOP, temperature, 0.0, TOP_P, PENALTY]]).expand(len(prompts), -1)
        uniform = torch.from_numpy(np.stack([stream(seed, i, 0, task.most) for i in ids]))
        settings = Settings.from_columns(columns.to(task.device))
        ending = Ending(engine, torch.tensor([task.ends[i] for i in ids], device=task.device), task.stop)
        found = decode(ending, prompts, settings, uniform, task.stop)
        return found.tokens, found.forwards

    return write


def contrast(aligned: Tensor, base: Tensor, written: Tensor) -> Tensor:
    """ConG's score of logits [B, V], with the penalty on what the replies have already."""
    aligned, base = aligned.float().log_softmax(-1), base.float().log_softmax(-1)
    scores = aligned - (1 - ALPHA) * base
    scores = scores.masked_fill(aligned < aligned.amax(-1, keepdim=True) + np.log(TOP), -torch.inf)
    if written.shape[1]:
        scores = scores.log_softmax(-1)
        scores = scores.scatter(1, written, scores.gather(1, written) * PENALTY)
    return scores


@torch.inference_mode()
def loop(aligned: nn.Module, base: nn.Module, task: Task) -> Decoder:
    """One prompt at a time."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)])

    @torch.inference_mode()
    def write(prompts: list[np.ndarray], ids_of: list[str], temperature: float, _seed: int):
        replies = []
        for prompt, name in zip(prompts, ids_of, strict=True):
            caches, reply = [DynamicCache(config=aligned.config), DynamicCache(config=base.config)], []
            ids = torch.from_numpy(prompt)[None].to(task.device)
            while len(reply) < task.most and not (reply and reply[-1] in task.stop):
                both = [
                    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                    for model, cache in zip((aligned, base), caches, strict=True)
                ]
                scores = contrast(*both, torch.tensor([reply], dtype=torch.long, device=task.device))
                scores = close(scores, torch.tensor([task.ends[name] - len(reply)]), task.stop)
                if temperature:
                    ids = torch.multinomial(warpers(ids, scores).softmax(-1), 1)
                else:
                    ids = scores.argmax(-1, keepdim=True)
                reply.append(int(ids))
            replies.append(np.array(reply))
        return replies, sum(map(len, replies))

    return write


class Contrast(LogitsProcessor):
    """Reads the other model as `generate` goes along, and forms the score."""

    def __init__(self, base: nn.Module, mask: Tensor, lengths: Tensor, stop: list[int]):
        self.lengths, self.stop = lengths, stop
        self.base, self.mask, self.cache = base, mask, DynamicCache(config=base.config)
        self.prompt = mask.shape[1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids if input_ids.shape[1] == self.prompt else input_ids[:, -1:]
        if new is not input_ids:
            self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.mask), 1))], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        found = self.base(
            input_ids=new,
            position_ids=positions,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        written = input_ids[:, self.prompt :]
        return close(contrast(scores, found.logits[:, -1], written), self.lengths - written.shape[1], self.stop)


def generate(aligned: nn.Module, base: nn.Module, task: Task) -> Decoder:
    """transformers' own loop, on a batch."""
    aligned.generation_config = GenerationConfig()  # of the checkpoint: other settings of sampling

    @torch.inference_mode()
    def write(prompts: list[np.ndarray], names: list[str], temperature: float, _seed: int):
        longest = max(map(len, prompts))
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.from_numpy(prompt), 1
        ids, mask = ids.to(task.device), mask.to(task.device)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": TOP_P, "top_k": 0}
        settings = GenerationConfig(
            max_new_tokens=task.most, eos_token_id=task.stop, pad_token_id=0, **(sampling if temperature else {})
        )
        lengths = torch.tensor([task.ends[name] for name in names], device=task.device)
        found = aligned.generate(
            ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([Contrast(base, mask, lengths, task.stop)]),
        )[:, longest:]
        replies = []
        for row in found.cpu().numpy():
            ends = np.flatnonzero(np.isin(row, task.stop))
            replies.append(row[: ends[0] + 1] if len(ends) else row)
        return replies, found.numel()

    return write


def sampled(decoder: Decoder, task: Task, batch: int, single: int, seed: int) -> Written:
    """As `run`, with the numbers of this round."""
    torch.manual_seed(seed)
    return run(decoder, task, batch, single, TEMPERATURE, seed)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def memory_of(args: argparse.Namespace, task: Task) -> None:
    """Print the peak memory of a process that does nothing but decode one batch."""
    decoder = method(args.memory_of, task)
    gc.collect()
    batch = 1 if args.memory_of == "loop" else max(args.batches)
    names = [str(p) for p in range(batch)][: len(task.prompts)]
    print_peak(args.device, lambda: decoder(task.prompts[:batch], names, TEMPERATURE, 0))


if __name__ == "__main__":
    main()
