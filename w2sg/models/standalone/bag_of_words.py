"""A bag of hashed words: the score of a text is the mean of its words' weights, times a fixed scale.

    from bag_of_words import BagOfWords
    BagOfWords(".").score(["a text", "another"])

Needs numpy and safetensors alone.
"""

import json
import re
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


class BagOfWords:
    """Reads the folder that this file lies in, or another.

    Attributes:
        labels: the names of the columns of `score`.
    """

    def __init__(self, folder="."):
        folder = Path(folder)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.buckets, self.scale = settings["buckets"], settings["scale"]
        self.max_length, self.labels = settings["max_length"], settings["labels"]
        self.weights = load_file(folder / "model.safetensors")["words.weight"]

    def words(self, text):
        """Places of a text's words in the weights; a longer text loses its start."""
        words = re.findall(r"\w+|[^\w\s]", text.lower()) or [""]
        return [zlib.crc32(word.encode()) % self.buckets for word in words][-self.max_length :]

    def score(self, texts):
        """[N, len(labels)]: a reward for each text, or its class logits."""
        return np.stack([self.scale * self.weights[self.words(text)].mean(0) for text in texts])
