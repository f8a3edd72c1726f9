"""The tokenizer of every bundled text encoder: CLIP's, with the merges that make a token of each word of a caption."""

from collections import Counter
from itertools import pairwise
from typing import Final

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from raftune.starters.image.images import ATTRIBUTES

LENGTH: Final = 20  # tokens: a caption has 13, "a spoiled picture of …" 17, the special two counted
SPOILED: Final = "a spoiled picture of "


def tokenizer() -> CLIPTokenizer:
    """All bytes, and the merges that make one token of each word of a caption; any other word stays in pieces."""
    letters = sorted(ByteLevel.alphabet())
    merges = merged([[*word[:-1], f"{word[-1]}</w>"] for word in words()])
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    ids = {token: i for i, token in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=LENGTH)


def merged(pieces: list[list[str]]) -> list[tuple[str, str]]:
    """Byte-pair encoding: the commonest neighbours are merged (of equals the first in the alphabet) to whole words."""
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [joined(word, best) for word in pieces]
    return merges


def joined(word: list[str], pair: tuple[str, str]) -> list[str]:
    """The word with each occurrence of the pair, from the left, as one piece."""
    found: list[str] = []
    for piece in word:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return found


def words() -> list[str]:
    """Every word of the captions, once, in one order."""
    told = [word for choices in ATTRIBUTES.values() for choice in choices for word in choice.split()]
    return list(dict.fromkeys(["a", "an", "in", "the", "on", "background", *SPOILED.split(), *told]))


def text_config(known: CLIPTokenizer, width: int, layers: int = 2, heads: int = 4) -> CLIPTextConfig:
    """A small CLIP text encoder's shape. Its end token is the tokenizer's: 2 would mean CLIP's first, mistaken way."""
    return CLIPTextConfig(
        vocab_size=len(known),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        max_position_embeddings=LENGTH,
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
        pad_token_id=known.pad_token_id,
    )


def silent_tokenizer() -> T5Tokenizer:
    """Words of captions for the encoder below."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    return T5Tokenizer(vocab=special + [(f"▁{word}", -3.0) for word in words()], extra_ids=0, model_max_length=LENGTH)


def silent_encoder(width: int) -> T5EncoderModel:
    """A T5 that gives zeros for every text.

    Stable Diffusion 3 puts zeros in the place of a third text encoder that is left out; but a folder without one is
    loaded only by those who say so.
    """
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    encoder = T5EncoderModel(T5Config(**sizes, vocab_size=len(silent_tokenizer()), dropout_rate=0.0))
    encoder.encoder.final_layer_norm.weight.data.zero_()
    return encoder.eval()
