"""Seconds of weak-to-strong search against a straightforward implementation of the public algorithm.

    python benchmarks/search.py --threads 2

Three randomly initialised Llamas of 6 layers and width 256 (strong, tuned, untuned), no end of text. The public code
(ZHZisZZ/weak-to-strong-search, for transformers 4) keeps the strong model's cache and reorders it, prepares each step
as `generate` does, and after every chunk has both small models read prompt and reply of every candidate again, with
logits at all positions; one prompt at a time. *Public* is a port of that to transformers 5, without its tokenizing;
*lean* leaves out the attention masks, the preparation of inputs and the small models' caches as well, which nobody
needs where prompts are not padded. All draw the same random numbers, so they choose the same replies; printed are the
seconds of each, their ratios, the tokens that each small model read, and the seconds for each of 16 prompts in flight.
Runs are interleaved.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from common import Ids, interleaved, machine, medians, options_of, parse, small_llama
from transformers import DynamicCache

from w2sg.decoding.contrastive import stream
from w2sg.decoding.engine import Several
from w2sg.decoding.sampling import Settings, choose
from w2sg.decoding.search import EngineGrower, search
from w2sg.decoding.search_values import ImplicitValue
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.models.policy import Policy

SETTINGS = ((12, 50, 5, 4, 4), (100, 256, 16, 4, 4), (100, 512, 30, 2, 2), (400, 128, 5, 4, 4))
COLUMNS = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]  # temperature 1, nothing cut off


def main() -> None:
    """Run the comparison and print it."""
    options = options_of(__doc__, layers=6, width=256, vocabulary=4096, in_flight=16)
    options.add_argument("--settings", type=int, nargs="+", default=[0, 1, 2, 3], help="which of the four, from 0")
    args = parse(options)
    models = [small_llama(args, seed) for seed in range(3)]
    plain = [small_llama(args, seed) for seed in range(3)]  # whose layers no engine has laid out anew
    print(f"{args.layers} layers of width {args.width}; {machine(args.device)}")
    for setting in (SETTINGS[k] for k in args.settings):
        prompt, length, chunk, beams, children = setting
        draw = np.random.default_rng(0)
        prompts = [draw.integers(1, args.vocabulary, prompt) for _ in range(args.in_flight)]
        sizes = length, chunk, beams, children
        loops = {
            "public": partial(straightforward, plain, prompts[0], *sizes, False),
            "lean": partial(straightforward, plain, prompts[0], *sizes, True),
            "one": partial(cached, models, prompts[:1], *sizes),
            "many": partial(cached, models, prompts, *sizes),
        }
        seconds, chosen = interleaved(loops, args.repeats, args.device, warm_up=False)
        public, lean, one, each = medians(seconds).values()
        each /= len(prompts)
        (theirs, read), (ours, ours_read), (many, _) = (chosen[name][-1] for name in ("lean", "one", "many"))
        same = min(leading(ours[0], theirs), leading(many[0], theirs))
        print(
            f"P {prompt:3d} T {length:3d} L {chunk:2d} W {beams} K {children}: "
            f"public {public:7.2f} s, lean {lean:7.2f} s, ours {one:6.2f} s x{public / one:5.2f} x{lean / one:5.2f}; "
            f"{args.in_flight} in flight {each:6.2f} s a prompt x{one / each:5.2f} more, x{public / each:5.2f} in all; "
            f"each small model read {read:,} and {ours_read:,} tokens; first {same} of {length} tokens equal",
            flush=True,
        )


def leading(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens that both begin with; a draw next to a border of two tokens may fall either way by rounding."""
    differs = np.flatnonzero(one != other)
    return int(differs[0]) if len(differs) else len(one)


def cached(models: list[Policy], prompts: list[np.ndarray], length: int, chunk: int, beams: int, children: int):
    """What `w2sg.decoding` does: the best reply to each prompt, and tokens that each small model read."""
    strong, tuned, untuned = (TransformersEngine(model) for model in models)
    guide = Several(tuned, untuned)
    value = ImplicitValue(guide, Ids, True, [])
    ids = [str(k) for k in range(len(prompts))]
    grower = EngineGrower(strong, Ids.prompts, lambda _: "", ids, COLUMNS, [], chunk, length, 0)
    return [result.best.tokens for result in search(grower, value, prompts, beams, children)], guide.count.total


@torch.inference_mode()
def straightforward(
    models: list[Policy], prompt: np.ndarray, length: int, chunk: int, beams: int, children: int, lean: bool
):
    """The public algorithm: the same for one prompt."""
    strong, tuned, untuned = (model.plain for model in models)
    device = next(strong.parameters()).device
    rows = beams * children
    settings = Settings.from_columns(torch.tensor([COLUMNS]).expand(rows, -1).to(device))
    ids = torch.from_numpy(prompt).to(device)[None].expand(rows, -1)
    state = {"past_key_values": DynamicCache(config=strong.config), "attention_mask": torch.ones_like(ids)}

    def step(new: torch.Tensor) -> torch.Tensor:
        if lean:
            cache = state["past_key_values"]
            return strong(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        inputs = strong.prepare_inputs_for_generation(ids, next_sequence_length=new.shape[1], use_cache=True, **state)
        outputs = strong(**inputs, logits_to_keep=1, return_dict=True)
        state.update(strong._update_model_kwargs_for_generation(outputs, state))
        return outputs.logits[:, -1]

    logits = step(ids)
    lineage, read = [str(k) for k in range(rows)], 0
    for begin in range(0, length, chunk):
        steps = min(chunk, length - begin)
        uniform = np.stack([stream(0, "0", name, begin + steps)[begin:] for name in lineage])
        uniform = torch.from_numpy(uniform).to(device)
        for k in range(steps):
            tokens = choose(logits.log_softmax(-1), settings, uniform[:, k])
            ids = torch.cat([ids, tokens[:, None]], 1)
            if begin + k + 1 < length:
                logits = step(tokens[:, None])
        values = []
        for model in (tuned, untuned):
            more = {"use_cache": False} if lean else {"attention_mask": torch.ones_like(ids)}
            logs = model(input_ids=ids, **more).logits.float().log_softmax(-1)
            replies = ids[:, len(prompt) :]
            values.append(logs[:, len(prompt) - 1 : -1].gather(2, replies[..., None])[..., 0].double().sum(1))
        read += ids.numel()
        best = (values[0] - values[1]).topk(beams).indices
        parents = best.repeat_interleave(children)
        state["past_key_values"].reorder_cache(parents)
        ids, logits = ids[parents], logits[parents]
        kept = [lineage[k] for k in best.tolist()]
        lineage = [name if k == 0 else f"{name}/{begin + steps}.{k}" for name in kept for k in range(children)]
    return ids[0, len(prompt) :].cpu().numpy(), read


if __name__ == "__main__":
    main()
