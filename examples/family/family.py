"""A policy family of your own: a bigram model of letters, in numpy. docs/families.md explains each method."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raftune.protocols import TrainReport
from raftune.records import Sample

LETTERS, FILE = "abcdefghijklmnopqrstuvwxyz.", "counts.npy"  # the dot ends a word


class Bigrams:
    """p[a, b] is the probability that letter b follows letter a. A prompt is the first letter of a word."""

    media, payload = "text", pa.schema([("completion", pa.string())])

    def __init__(self, counts):
        self.p, self.nbytes = counts / counts.sum(axis=1, keepdims=True), counts.nbytes

    @classmethod
    def start(cls, config, out, model=None, tokenizer=None):
        folder = config.policy.model  # `raftune evaluate` names the model folder of a round
        np.save(out / FILE, np.load(f"{folder}/{FILE}") if folder else np.ones((27, 27)))

    @classmethod
    def load(cls, config, folder, start):
        return cls(np.load(folder / FILE))

    @classmethod
    def verify(cls, start): ...  # nothing to check: the start model lies in the run directory

    def generate(self, chunk):
        return [
            Sample(chunk.sample_id(prompt, k), prompt.id, k, "policy", seed, chunk.version, self.word(prompt, seed))
            for prompt, seeds in zip(chunk.prompts, chunk.seeds, strict=True)
            for k, seed in enumerate(seeds)
        ]

    def word(self, prompt, seed):
        word, rng = prompt.content, np.random.default_rng(seed)
        while word[-1] != "." and len(word) < 10:
            word += LETTERS[rng.choice(27, p=self.p[LETTERS.index(word[-1])])]
        return word.rstrip(".")

    def encode_completion(self, prompt, answer, source):
        return {"completion": str(answer)}

    def train(self, rows, work, out):
        words, counts = pq.read_table(rows).to_pylist(), np.full((27, 27), 0.01)
        for row in words:
            for pair in pairwise((row["completion"] + ".")[:10]):
                counts[tuple(map(LETTERS.index, pair))] += row["weight"]
        np.save(out / FILE, counts)
        return TrainReport(rows=len(words), steps=1, losses=())

    def notes(self):
        return ()
