"""Seconds and tokens of weak-to-strong decoding against drafting to the end and checking then.

    python benchmarks/drafting.py --threads 2

Two randomly initialised Llamas (the small one of 2 layers and width 128), no end of text, greedy. The plain one is the
public algorithm, one prompt at a time: `generate` a whole draft, read prompt and draft with the base model, find the
switch, `generate` on from the text that is kept, which reads it anew. The threshold is chosen so that each draft is
left within its first tokens, as the paper's are. Both must write the same. Runs are interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from reward_training import matrix_product_rate
from search import make

from w2sg.decoding.drafting import Drafting, Rule, switch_after
from w2sg.decoding.together import Side
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.models.policy import Policy

GREEDY = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
WINDOW = 6


def main() -> None:
    """Run the comparison and print it."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--vocabulary", type=int, default=4096)
    options.add_argument("--prompt", type=int, default=100)
    options.add_argument("--draft", type=int, default=512)
    options.add_argument("--new-tokens", type=int, default=512)
    options.add_argument("--check", type=int, default=16)
    options.add_argument("--within", type=int, default=60, help="the switch is among this many tokens of each draft")
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    base = make(args, 0)
    small = make(argparse.Namespace(**{**vars(args), "layers": 2, "width": 128}), 1)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, args.vocabulary, args.prompt) for _ in range(args.prompts)]
    with torch.inference_mode():
        threshold = min(reached(small, base, row, args) for row in prompts)
    rate = matrix_product_rate(args.device)
    print(
        f"{args.device}, {torch.get_num_threads()} threads; this machine's fp32 matrix product: {rate / 1e9:.0f} "
        f"GFLOP/s; {args.prompts} prompts of {args.prompt} tokens, drafts of up to {args.draft}, {args.new_tokens} new"
    )
    seconds: dict[str, list[float]] = {"plain": [], "one at a time": [], "together": []}
    for _ in range(args.repeats):
        for name in seconds:
            begun = time.perf_counter()
            if name == "plain":
                theirs, counts = plain(small, base, prompts, threshold, args)
            else:
                size = 1 if name == "one at a time" else len(prompts)
                ours, own = online(small, base, prompts, threshold, args, size)
                same = [np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True)]
            seconds[name].append((time.perf_counter() - begun) / len(prompts))
        if not all(same):
            print(f"{same.count(False)} of {len(same)} replies differ")
    first = statistics.median(seconds["plain"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:14s} {median:6.2f} s a prompt, x{first / median:5.2f}")
    for name, found in (("plain", counts), ("w2sg", own)):
        print(f"{name:14s} " + ", ".join(f"{value:,.0f} {what}" for what, value in found.items()), flush=True)


class Ids:
    """In place of a chat: prompts are token ids already, texts are their numbers, and nothing ends a reply."""

    vocabulary, stop, end = "ids", (), 0

    @staticmethod
    def prompts(prompts: list[np.ndarray]) -> list[np.ndarray]:
        return list(prompts)

    @staticmethod
    def text(ids: np.ndarray) -> str:
        return " ".join(map(str, ids))

    @staticmethod
    def until_stop(text: str, start: int) -> tuple[str, bool]:
        return text, False


def online(small: Policy, base: Policy, prompts: list[np.ndarray], threshold: float, args, size: int):
    """What `w2sg.decoding` does, and tokens a prompt."""
    rule = Rule(WINDOW, threshold, args.check, args.draft, args.new_tokens)
    found, counts = [], dict.fromkeys(("drafted", "read by the base model", "written by it"), 0)
    for begin in range(0, len(prompts), size):
        part = prompts[begin : begin + size]
        drafter, reader = TransformersEngine(small), TransformersEngine(base)
        sides = (Side(engine, Ids, GREEDY) for engine in (drafter, reader))
        work = Drafting(*sides, rule, list(map(str, range(len(part)))), 0)
        drafts = work.write(part)
        found += [draft.tokens for draft in drafts]
        counts["drafted"] += sum(draft.drafted for draft in drafts)
        counts["read by the base model"] += reader.count.prompt + reader.count.given
        counts["written by it"] += sum(len(draft.tokens) - draft.kept for draft in drafts)
    return found, {name: count / len(prompts) for name, count in counts.items()}


def drafted(small: Policy, base: Policy, prompt: np.ndarray, args) -> tuple[torch.Tensor, np.ndarray]:
    """A whole draft, and the log-probabilities that the base model gives it."""
    ids = torch.from_numpy(prompt)[None].to(args.device)
    draft = small.plain.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=args.draft, pad_token_id=0
    )
    logits = base.plain(input_ids=draft).logits.float()
    logs = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, draft[0, len(prompt) :, None])[:, 0]
    return draft, logs.double().cpu().numpy()


def reached(small: Policy, base: Policy, prompt: np.ndarray, args) -> float:
    """The largest threshold that a draft reaches within its first tokens."""
    _, logs = drafted(small, base, prompt, args)
    windows = np.lib.stride_tricks.sliding_window_view(logs[: args.within], WINDOW)
    return float(np.exp(windows.mean(-1).max())) * (1 - 1e-6)


@torch.inference_mode()
def plain(small: Policy, base: Policy, prompts: list[np.ndarray], threshold: float, args):
    """The public algorithm."""
    found, counts = [], dict.fromkeys(("drafted", "read by the base model", "written by it"), 0)
    for prompt in prompts:
        draft, logs = drafted(small, base, prompt, args)
        kept, _ = switch_after(logs, WINDOW, threshold)
        start = draft[:, : len(prompt) + kept]
        whole = base.plain.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=False,
            max_new_tokens=args.new_tokens - kept,
            pad_token_id=0,
        )
        found.append(whole[0, len(prompt) :].cpu().numpy())
        counts["drafted"] += len(logs)
        counts["read by the base model"] += draft.shape[1] + start.shape[1]
        counts["written by it"] += args.new_tokens - kept
    return found, {name: count / len(prompts) for name, count in counts.items()}


if __name__ == "__main__":
    main()
