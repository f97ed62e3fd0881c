"""Examples per second of reward-model training, against the plain loop of public weak-to-strong code.

    python benchmarks/reward_training.py --data FOLDER/transfer.jsonl

Both train the same randomly initialised decoder on the same pairs in one run, one after the other, several times over:

- plain: random batches of 32 pairs, chosen and rejected in two forwards padded on the right, micro-batches of 1 (the
  default of the public code) and of 32;
- ours: length-grouped batches of packed rows, both replies in one forward.

Printed: examples per second, the share of tokens that had to be read, their ratios, and the FLOP/s achieved (6 per
weight and useful token) as a share of this machine's own fp32 matrix product, measured in the same run.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from common import interleaved, matrix_product_rate, medians, options_of, parse
from transformers import AutoModelForSequenceClassification, GPT2Config

from w2sg import losses
from w2sg.data.rows import epoch_plan, pack
from w2sg.models.heads import HashedWords
from w2sg.models.scorer import LanguageScorer

BATCH = 32


def main() -> None:
    """Run the comparison and print it."""
    options = options_of(__doc__, pairs=128, layers=6, width=512)
    options.add_argument("--data", help="jsonl file of {chosen, rejected}; synthetic lengths where there is none")
    args = parse(options)

    texts, encode = read(args.data, args.pairs), HashedWords(8192)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8192,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.width // 64,
        n_positions=512,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).to(args.device).train()
    weights = sum(p.numel() for p in model.transformer.h.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loops = {
        "plain, micro-batch 1": lambda: plain(model, optimizer, texts, encode, 1, args.device),
        "plain, micro-batch 32": lambda: plain(model, optimizer, texts, encode, BATCH, args.device),
        "w2sg": lambda: ours(model, optimizer, texts, encode, args.device),
    }
    seconds, counts = interleaved(loops, args.repeats, args.device)
    seconds, tokens = medians(seconds), {name: runs[0] for name, runs in counts.items()}
    peak, reference = matrix_product_rate(args.device), seconds["plain, micro-batch 1"]
    needed = tokens["plain, micro-batch 1"][0]
    print(
        f"{len(texts)} pairs, {weights / 1e6:.1f}M weights in the blocks, "
        f"{args.device}, {torch.get_num_threads()} threads"
    )
    print(f"this machine's fp32 matrix product: {peak / 1e9:.0f} GFLOP/s")
    for name, middle in seconds.items():
        useful, padded = tokens[name]
        rate = 6 * weights * useful / middle
        print(
            f"{name:22s} {len(texts) / middle:7.1f} examples/s  x{reference / middle:4.2f}  useful tokens "
            f"{useful / padded:6.1%}  read {padded / needed:4.2f} of the texts' tokens  {rate / peak:5.1%} of the peak"
        )


def read(path: str | None, count: int) -> list[tuple[str, str]]:
    """Pairs of texts."""
    if path:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
        return [(row["chosen"], row["rejected"]) for row in rows]
    draw = np.random.default_rng(0)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in draw.integers(0, 5000, n))

    prompts = [words(int(draw.lognormal(2.7, 0.6)) + 2) for _ in range(count)]
    return [tuple(f"{p} {words(int(draw.lognormal(3.4, 0.8)) + 2)}" for _ in range(2)) for p in prompts]


def plain(model, optimizer, texts, encode, micro: int, device: str) -> tuple[int, int]:
    """The loop of the public code: returns useful and padded tokens."""
    order = np.random.default_rng(0).permutation(len(texts))
    chosen, rejected = (encode([t[side] for t in texts]) for side in (0, 1))
    useful = padded = 0
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        for part in np.split(batch, range(micro, len(batch), micro)):
            rewards = []
            for side in (chosen, rejected):
                ids = [torch.tensor(side[i][-512:]) for i in part]
                lengths = torch.tensor([len(x) for x in ids])
                padding = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
                mask = (torch.arange(padding.shape[1])[None] < lengths[:, None]).to(device)
                hidden = model.transformer(padding, attention_mask=mask.long(), use_cache=False).last_hidden_state
                rewards.append(model.score(hidden[torch.arange(len(part)), lengths - 1])[:, 0])
                useful, padded = useful + int(lengths.sum()), padded + padding.numel()
            (F.softplus(rewards[1] - rewards[0]).sum() / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return useful, padded


def ours(model, optimizer, texts, encode, device: str) -> tuple[int, int]:
    """What `w2sg.training.label_modules.SoftLabelModule` does in a step, without the Trainer around it."""
    scorer = LanguageScorer(model, pairs=True, full_depth=model.config.n_layer)
    rows = pack(texts, encode, 512)
    useful = padded = 0
    target = losses.hard_logits(torch.zeros(BATCH, dtype=torch.long), 2).to(device)
    for batch in epoch_plan(rows.lengths, BATCH, 0, 0):
        inputs = {k: v.to(device) for k, v in rows.collate(batch).items()}
        losses.cross_entropy(scorer(inputs), target[: len(batch)]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        useful, padded = useful + int(rows.useful[batch].sum()), padded + inputs["input_ids"].numel()
    return useful, padded


if __name__ == "__main__":
    main()
