"""Loads and checks a backbone with a scalar head, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from raftune.config.reward_model import RewardModelConfig
from raftune.data.classifier_inputs import ClassifierInputs, is_hollow, longest
from raftune.errors import ModelError
from raftune.training.load_errors import why_not_loaded
from raftune.training.quiet import quiet


@dataclass(frozen=True)
class Backbone:
    """What is trained: the tokenizer, how rows are read, and notes for the user; the weights are loaded by `load`."""

    config: RewardModelConfig
    tokenizer: Any
    reading: ClassifierInputs
    notes: tuple[str, ...]

    def load(self) -> Any:
        """The model in float32 or bfloat16 with one output; a new head is generated from the seed.

        Raises ModelError where weights of the body are missing, or the tokenizer pads with a token the model lacks.
        """
        config = self.config
        torch.manual_seed(config.seed)
        with quiet():
            model, info = _read(
                AutoModelForSequenceClassification,
                "weights",
                config,
                num_labels=1,
                dtype=getattr(torch, config.dtype),
                ignore_mismatched_sizes=config.replace_head,
                output_loading_info=True,
            )
        prefix = f"{model.base_model_prefix}."
        if body := [key for key in sorted(info["missing_keys"]) if key.startswith(prefix) and "pooler" not in key]:
            raise ModelError(
                f"model must name a backbone with all its weights; {config.model!r} lacks {body[0]!r}, which "
                "would be random. Fetch it again, or name another."
            )
        embeddings, pad = model.get_input_embeddings().num_embeddings, self.tokenizer.pad_token_id
        if len(self.tokenizer) > embeddings and pad >= embeddings:
            raise ModelError(
                f"model {config.model!r} has {embeddings:,} token embeddings, and its tokenizer pads with token "
                f"{pad:,}. Give the tokenizer a pad token that the model knows."
            )
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
        return model


def open_backbone(config: RewardModelConfig) -> Backbone:
    """The backbone without its weights. Raises ModelError where it cannot be read, or its head is no reward model's."""
    name, architecture = config.model, _read(AutoConfig, "configuration", config)
    heads = [head for head in getattr(architecture, "architectures", None) or [] if "ForSequenceClassification" in head]
    labels = architecture.num_labels if heads else 1
    if labels > 1 and not config.replace_head:
        raise ModelError(
            f"model must have a head of one label, or none; {name!r} is a {heads[0]} of {labels} labels, and a "
            "reward is one number. Name the backbone that it was made from, or give it a new head: --replace-head."
        )
    if labels == 1 and config.replace_head:
        raise ModelError(f"replace_head must be left out for {name!r}: it has no head of several labels to replace.")
    tokenizer = _read(AutoTokenizer, "tokenizer", config)
    if is_hollow(tokenizer):
        raise ModelError(
            f"model {name!r}: its tokenizer knows no words: its files are missing. Save a tokenizer there, or "
            "name another backbone."
        )
    notes = []
    if tokenizer.pad_token_id is None:
        notes.append(_fill_pad_token(name, tokenizer, architecture.get_text_config().pad_token_id))
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"  # a prompt's beginning says the least
    limit = longest(tokenizer, architecture, config.max_length)
    if limit is not None and limit < config.max_length:
        notes.append(f"max_length: rows are read up to {limit} tokens, which is all that the model can take")
    append_eos = config.append_eos
    if append_eos is None:  # where the tokenizer has one, and does not add it, nor a [SEP], by itself
        eos = tokenizer.eos_token_id
        append_eos = eos is not None and tokenizer("a")["input_ids"][-1] not in (eos, tokenizer.sep_token_id)
    reading = ClassifierInputs(append_eos=append_eos, special_tokens=True, limit=limit)
    return Backbone(config, tokenizer, reading, tuple(notes))


def _fill_pad_token(name: str, tokenizer: Any, pad_token_id: int | None) -> str:
    """Sets a pad token, that of the model's configuration or EOS, and returns a note. Raises ModelError without any."""
    if pad_token_id is not None and 0 <= pad_token_id < len(tokenizer) and pad_token_id != tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
        return f"tokenizer: it has no pad token; {tokenizer.pad_token} of the model's configuration serves as one"
    if tokenizer.eos_token is None:
        raise ModelError(
            f"model {name!r}: its tokenizer must have a pad or an EOS token; it has neither. Set one and save it "
            "again: tokenizer.pad_token = …; tokenizer.save_pretrained(…)."
        )
    tokenizer.pad_token = tokenizer.eos_token
    return (
        f"tokenizer: it has no pad token, so EOS ({tokenizer.eos_token}) serves as one, and the score of a decoder is "
        "read at the last token before it"
    )


def _read(kind: Any, what: str, config: RewardModelConfig, **options: Any) -> Any:
    """What `from_pretrained` of this class reads. Raises ModelError."""
    hub = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        return kind.from_pretrained(config.model, **options, **hub)
    except Exception as error:
        raise ModelError(
            f"model must be a folder or a hub name of a model for text; the {what} of {config.model!r} cannot be read: "
            f"{why_not_loaded(error, config.model)} Check the name."
        ) from None
