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

HEAD = "ForSequenceClassification"


@dataclass(frozen=True)
class Backbone:
    """What is trained: the architecture's configuration, the tokenizer, how rows are read, and what to say of it."""

    config: RewardModelConfig
    architecture: Any
    tokenizer: Any
    reading: ClassifierInputs
    said: tuple[str, ...]

    def load(self) -> Any:
        """The model in float32 or bfloat16 with one output; a new head is generated from the seed. Raises
        ModelError.
        """
        torch.manual_seed(self.config.seed)
        try:
            with quiet():
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    self.config.model,
                    num_labels=1,
                    dtype=getattr(torch, self.config.dtype),
                    ignore_mismatched_sizes=self.config.replace_head,
                    output_loading_info=True,
                    **hub(self.config),
                )
        except Exception as error:
            raise unreadable(self.config.model, "weights", error) from None
        self._check_body(model, info["missing_keys"])
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def _check_body(self, model: Any, missing: set[str]) -> None:
        """Raises ModelError if weights of the body are missing, or the tokenizer knows more tokens than the model."""
        body = [key for key in sorted(missing) if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
        if body:
            raise ModelError(
                f"model must name a backbone with all its weights; {self.config.model!r} lacks {body[0]!r}, which "
                "would be random. Fetch it again, or name another."
            )
        places = model.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > places and self.tokenizer.pad_token_id >= places:
            raise ModelError(
                f"model {self.config.model!r} has {places:,} token embeddings, and its tokenizer pads with token "
                f"{self.tokenizer.pad_token_id:,}. Give the tokenizer a pad token that the model knows."
            )


def open_backbone(config: RewardModelConfig) -> Backbone:
    """The backbone without its weights. Raises ModelError where it cannot be read, or its head is no reward model's."""
    try:
        architecture = AutoConfig.from_pretrained(config.model, **hub(config))
    except Exception as error:
        raise unreadable(config.model, "configuration", error) from None
    check_head(config, architecture)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, **hub(config))
    except Exception as error:
        raise unreadable(config.model, "tokenizer", error) from None
    if is_hollow(tokenizer):
        raise ModelError(
            f"model {config.model!r}: its tokenizer knows no words: its files are missing. Save a tokenizer there, or "
            "name another backbone."
        )
    said = (*about_padding(config.model, tokenizer, architecture),)
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"  # a prompt's beginning says the least
    limit = longest(tokenizer, architecture, config.max_length)
    if limit is not None and limit < config.max_length:
        said += (f"max_length: rows are read up to {limit} tokens, which is all that the model can take",)
    eos = adds_no_eos(tokenizer) if config.append_eos is None else config.append_eos
    return Backbone(
        config, architecture, tokenizer, ClassifierInputs(append_eos=eos, special_tokens=True, limit=limit), said
    )


def check_head(config: RewardModelConfig, architecture: Any) -> None:
    """Raises ModelError for a classifier of several labels, unless its head is to be replaced, and only then."""
    names = [name for name in getattr(architecture, "architectures", None) or [] if HEAD in name]
    labels = architecture.num_labels if names else 1
    if labels > 1 and not config.replace_head:
        raise ModelError(
            f"model must have a head of one label, or none; {config.model!r} is a {names[0]} of {labels} labels, and a "
            "reward is one number. Name the backbone that it was made from, or give it a new head: --replace-head."
        )
    if labels == 1 and config.replace_head:
        raise ModelError(
            f"replace_head must be left out for {config.model!r}: it has no head of several labels to replace."
        )


def about_padding(name: str, tokenizer: Any, architecture: Any) -> list[str]:
    """Gives the tokenizer a pad token if it lacks one, and says so. Raises ModelError if there is none to take.

    The configuration's own is taken first, then EOS.
    """
    if tokenizer.pad_token_id is not None:
        return []
    known = architecture.get_text_config().pad_token_id
    if known is not None and 0 <= known < len(tokenizer) and known != tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known)
        return [f"tokenizer: it has no pad token; {tokenizer.pad_token} of the model's configuration serves as one"]
    if tokenizer.eos_token is None:
        raise ModelError(
            f"model {name!r}: its tokenizer must have a pad or an EOS token; it has neither. Set one and save it "
            "again: tokenizer.pad_token = …; tokenizer.save_pretrained(…)."
        )
    tokenizer.pad_token = tokenizer.eos_token
    return [
        f"tokenizer: it has no pad token, so EOS ({tokenizer.eos_token}) serves as one, and the score of a decoder is "
        "read at the last token before it"
    ]


def adds_no_eos(tokenizer: Any) -> bool:
    """Whether plain texts want an EOS: the tokenizer has one, and does not add it, nor a [SEP], by itself."""
    if tokenizer.eos_token_id is None:
        return False
    return bool(tokenizer("a")["input_ids"][-1] not in (tokenizer.eos_token_id, tokenizer.sep_token_id))


def hub(config: RewardModelConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def unreadable(name: str, what: str, error: Exception) -> ModelError:
    return ModelError(
        f"model must be a folder or a hub name of a model for text; the {what} of {name!r} cannot be read: "
        f"{why_not_loaded(error, name)} Check the name."
    )
