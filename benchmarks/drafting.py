"""Seconds and tokens of weak-to-strong decoding against drafting to the end and checking then.

    python benchmarks/drafting.py --threads 2

Two randomly initialised Llamas (the small one of 2 layers and width 128), no end of text, greedy. The plain one is the
public algorithm, one prompt at a time: `generate` a whole draft, read prompt and draft with the base model, find the
switch, `generate` on from the text that is kept, which reads it anew. The threshold is chosen so that each draft is
left within its first tokens, as the paper's are. Both must write the same. Runs are interleaved.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from common import Ids, interleaved, machine, medians, options_of, parse, small_llama

from w2sg.decoding.drafting import Drafting, Rule, switch_after
from w2sg.decoding.together import Side
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.models.policy import Policy

GREEDY = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
WINDOW = 6


def main() -> None:
    """Run the comparison and print it."""
    sizes = {"layers": 6, "width": 256, "vocabulary": 4096, "prompt": 100, "prompts": 8}
    options = options_of(__doc__, **sizes, draft=512, new_tokens=512, check=16)
    options.add_argument("--within", type=int, default=60, help="the switch is among this many tokens of each draft")
    args = parse(options)
    base = small_llama(args, 0)
    small = small_llama(argparse.Namespace(**{**vars(args), "layers": 2, "width": 128}), 1)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, args.vocabulary, args.prompt) for _ in range(args.prompts)]
    with torch.inference_mode():
        threshold = min(reached(small, base, row, args) for row in prompts)
    print(
        f"{machine(args.device)}; {args.prompts} prompts of {args.prompt} tokens, drafts of up to {args.draft}, "
        f"{args.new_tokens} new"
    )
    both = small, base, prompts, threshold, args
    loops = {
        "plain": partial(plain, *both),
        "one at a time": partial(online, *both, 1),
        "together": partial(online, *both, len(prompts)),
    }
    seconds, written = interleaved(loops, args.repeats, args.device, warm_up=False)
    for name, runs in written.items():
        for (theirs, _), (ours, _) in zip(written["plain"], runs, strict=True):
            same = [np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True)]
            if not all(same):
                print(f"{name}: {same.count(False)} of {len(same)} replies differ")
    seconds = medians(seconds, len(prompts))
    for name, middle in seconds.items():
        print(f"{name:14s} {middle:6.2f} s a prompt, x{seconds['plain'] / middle:5.2f}")
    for name, (_, counts) in (("plain", written["plain"][-1]), ("w2sg", written["together"][-1])):
        print(f"{name:14s} " + ", ".join(f"{value:,.0f} {what}" for what, value in counts.items()), flush=True)


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
