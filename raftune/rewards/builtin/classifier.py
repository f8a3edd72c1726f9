"""Sequence-classification models as rewards: a scalar head, or one label of a classifier."""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import cached_file

from raftune.config.rewards import derived_name
from raftune.data.classifier_inputs import NOTES, ClassifierInputs, is_hollow, longest, read_notes, tokens
from raftune.errors import RewardError
from raftune.rewards import fingerprint
from raftune.rewards.builtin.model_options import ClassifierOptions
from raftune.rewards.builtin.models import HeldWeights, weights_fingerprint
from raftune.rewards.builtin.text import TEXT_MEDIA
from raftune.rewards.outcome import hub_error
from raftune.training.devices import choose_device
from raftune.training.load_errors import why_not_loaded
from raftune.training.quiet import quiet


def pad_of(config: Any) -> int | None:
    """The token that a model's head takes for padding."""
    text = config.get_text_config().pad_token_id
    pad: int | None = config.pad_token_id if text is None else text
    return pad


class ClassifierReward(HeldWeights):
    """One number a completion, from prompt and completion together, through the model's own tokenizer and template.

    The configuration and the tokenizer are read at once, the weights by `prepare` or the first call. Raises RewardError
    where they cannot be read, where the head is missing, where the label is not clear, and where normalisation is asked
    for and no distribution of scores is known.
    """

    def __init__(
        self,
        options: ClassifierOptions | None = None,
        *,
        model: Any = None,
        tokenizer: Any = None,
        name: str | None = None,
        device: str = "auto",
    ) -> None:
        self.options, self._device = options or ClassifierOptions(), str(choose_device(device, "rewards.device"))
        self._given = model
        self.config = self._read_config() if model is None else model.config
        self._source = self.options.model or str(getattr(self.config, "_name_or_path", "") or type(model).__name__)
        self.name = name or derived_name(self._source)
        self.media = TEXT_MEDIA
        self._label = self._find_label()
        self._tokenizer = self._read_tokenizer(tokenizer)
        self._notes = self._read_notes()
        self._reading = self._find_reading()
        self._mean, self._std = self._find_scale()

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        texts = [self._encode(*pair) for pair in zip(prompts, completions, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        values: list[float | None] = [None] * len(texts)
        for start in range(0, len(order), self.options.batch_size):
            rows = order[start : start + self.options.batch_size]
            for i, value in zip(rows, self._forward([texts[i] for i in rows]), strict=True):
                values[i] = value
        return values

    @cached_property
    def fingerprint(self) -> str:
        """Over the options and the weights: a folder's files, a hub model's commit, the numbers of a model object."""
        reading = {"include_prompt": self._reading.include_prompt, "append_eos": self._reading.append_eos}
        reading["max_length"] = self._told("max_length")
        options = {**asdict(self.options), **reading}
        for key in ("model", "tokenizer", "normalize"):
            del options[key]
        noted = [self._notes["reading"]] if self._notes else []
        scale = [self._mean, self._std] if self.options.normalize else []
        if (pad := pad_of(self.config)) != self._tokenizer.pad_token_id:
            noted = [*noted, ["pad", pad]]
        known = (
            weights_fingerprint(self.options.model, self.config, self.options.revision, self._given),
            self._tokenizer_fingerprint(),
        )
        return fingerprint.digest("classifier", 1, options, *known, *noted, *scale)

    def _forward(self, rows: list[list[int]]) -> list[float]:
        self.prepare()
        own = pad_of(self._model.config)
        places = range(self._model.get_input_embeddings().num_embeddings)
        if own is not None and own in places:
            return self._forward_padded(rows, own)
        # The configuration knows no padding, so a decoder's head reads the last token, whichever it is: it is told of a
        # token that no row has, for as long as the batch takes.
        used = {token for row in rows for token in row}
        pad = next((token for token in (self._tokenizer.pad_token_id, *places) if token not in (None, *used)), None)
        if pad is None:
            return [value for row in rows for value in self._forward_padded([row], 0)]
        configs = [self._model.config, self._model.config.get_text_config()]
        before = [config.pad_token_id for config in configs]
        try:
            for config in configs:
                config.pad_token_id = pad
            return self._forward_padded(rows, pad)
        finally:
            for config, given in zip(configs, before, strict=True):
                config.pad_token_id = given

    def _forward_padded(self, rows: list[list[int]], pad: int) -> list[float]:
        device = next(self._model.parameters()).device
        width = max(len(row) for row in rows)
        ids_BS = torch.full((len(rows), width), pad)
        mask_BS = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids_BS[i, : len(row)] = torch.tensor(row)
            mask_BS[i, : len(row)] = 1
        with torch.inference_mode():
            logits_BL = self._model(input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device)).logits
        return [float(value) for value in self._read_out(logits_BL.double().cpu())]

    def _read_out(self, logits_BL: torch.Tensor) -> torch.Tensor:
        """The label's log-odds against all others, or its probability; one output is a log-odds already."""
        chosen_B = logits_BL[:, self._label]
        if logits_BL.shape[1] > 1 and self.config.problem_type != "multi_label_classification":
            others = [i for i in range(logits_BL.shape[1]) if i != self._label]
            chosen_B = chosen_B - torch.logsumexp(logits_BL[:, others], dim=1)
        return torch.sigmoid(chosen_B) if self.options.output == "probability" else (chosen_B - self._mean) / self._std

    def _encode(self, prompt: Any, completion: Any) -> list[int]:
        return tokens(self._tokenizer, prompt, completion, self._reading)

    def _find_reading(self) -> ClassifierInputs:
        """What the options say, else what the model was trained with, else what fits the tokenizer."""
        special, noted = self.options.add_special_tokens, self._told("add_special_tokens")
        usual = self._tokenizer.cls_token_id is not None
        return ClassifierInputs(
            include_prompt=self._told("include_prompt") is not False,
            append_eos=bool(self._told("append_eos")),
            special_tokens=usual if noted is None else noted,
            special_in_messages=bool(special),
            limit=longest(self._tokenizer, self.config, self._told("max_length")),
        )

    def _told(self, field: str) -> Any:
        given = getattr(self.options, field)
        return self._notes.get("reading", {}).get(field) if given is None else given

    def _find_scale(self) -> tuple[float, float]:
        """The mean and the standard deviation that scores are normalised by; 0 and 1 where they are not."""
        if not self.options.normalize:
            return 0.0, 1.0
        if self.options.output != "log_odds":
            raise RewardError(
                f"reward model {self._source!r}: options.normalize must come with output: log_odds; got "
                f"{self.options.output!r}, which is normalised already. Leave one of them out."
            )
        found = self._notes.get("distribution", {})
        if not found.get("std"):
            raise RewardError(
                f"reward model {self._source!r}: options.normalize needs the distribution of its scores, and there is "
                f"none in {NOTES} beside it. `raftune reward train` writes one; leave normalize out for other models."
            )
        return float(found["mean"]), float(found["std"])

    def _read_notes(self) -> dict[str, Any]:
        folder = Path(self._source).expanduser()
        if folder.is_dir():
            return read_notes(folder / NOTES)
        if self._given is not None:
            return {}
        quietly = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        found = cached_file(self._source, NOTES, revision=self.options.revision, **quietly)
        return read_notes(Path(found) if found else None)

    def _find_label(self) -> int:
        count, label = self.config.num_labels, self.options.label
        if label is None:
            if count == 1:
                return 0
            raise RewardError(
                f"reward model {self._source!r} has {count} labels ({self._labels()}), and a reward model has one. "
                "Name the one to be rewarded: options.label: 1."
            )
        named = {name: i for i, name in self.config.id2label.items()}
        found = {**named, **{str(i): i for i in range(count)}}.get(str(label))
        if found is None:
            raise RewardError(f"reward model {self._source!r} has no label {label!r}; there are: {self._labels()}")
        return int(found)

    def _labels(self) -> str:
        return ", ".join(f"{i}: {name}" for i, name in sorted(self.config.id2label.items())[:12])

    def _read_config(self) -> Any:
        try:
            config = AutoConfig.from_pretrained(self.options.model, **self._hub())
        except Exception as error:
            raise self._unreadable("model", self.options.model, error) from None
        heads = list(getattr(config, "architectures", None) or [])
        if heads and not any("ForSequenceClassification" in head for head in heads):
            raise RewardError(
                f"reward model {self.options.model!r} is a {heads[0]}: it has no head that gives a number. "
                "Train a reward model from it first."
            )
        return config

    def _read_tokenizer(self, tokenizer: Any) -> Any:
        name = self.options.tokenizer or self._source
        if tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, **self._hub())
            except Exception as error:
                raise self._unreadable("tokenizer", name, error) from None
            if is_hollow(tokenizer):
                raise RewardError(
                    f"reward model {self._source!r}: the tokenizer at {name!r} knows no words: its files are missing. "
                    "Save one there, or name another: options.tokenizer."
                )
        else:
            tokenizer = copy.deepcopy(tokenizer)  # what is set below must not change its owner's
        tokenizer.truncation_side = "left"
        self._truncation = tokenizer.backend_tokenizer.truncation if tokenizer.is_fast else None
        return tokenizer

    def _read_model(self) -> Any:
        dtype = getattr(torch, self.options.dtype)
        try:
            with quiet():
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    self.options.model,
                    config=self.config,
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                    **self._hub(),
                )
        except Exception as error:
            raise self._unreadable("weights", self.options.model, error) from None
        if missing := sorted(info["missing_keys"]):
            raise RewardError(
                f"reward model {self._source!r}: its files lack {missing[0]!r}; its numbers would be random"
            )
        return model.to(self._device)

    def _hub(self) -> dict[str, Any]:
        return {"revision": self.options.revision, "trust_remote_code": self.options.trust_remote_code}

    def _unreadable(self, what: str, name: str, error: Exception) -> RewardError:
        folder = Path(name).expanduser()
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            return RewardError(
                f"reward_funcs: a reward model must be whole; {name!r} is an adapter alone. Merge it into its base: "
                f"AutoPeftModelForSequenceClassification.from_pretrained({name!r}).merge_and_unload()"
                ".save_pretrained(FOLDER), save its tokenizer there too, and name that folder."
            )
        if folder.is_dir():
            return RewardError(f"reward_funcs: {name!r}: its {what} cannot be read: {why_not_loaded(error, name)}")
        return RewardError(
            f"reward_funcs: {name!r} is no built-in reward and no module:function, and as a model's folder or hub name "
            f"its {what} cannot be read: {hub_error(error)}. Check the name, or give a folder."
        )

    def _tokenizer_fingerprint(self) -> str:
        tokenizer = self._tokenizer
        if tokenizer.is_fast:  # a call leaves in it what it cut by: the fingerprint must be the same before and after
            cut, backend = self._truncation, tokenizer.backend_tokenizer
            backend.enable_truncation(**cut) if cut else backend.no_truncation()
        text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        return fingerprint.digest(text, tokenizer.chat_template, tokenizer.pad_token, tokenizer.eos_token)
