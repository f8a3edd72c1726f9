"""Reward `classifier`: a sequence-classification model, by its scalar head or by one of its labels."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from raftune.config.rewards import derived_name
from raftune.data.classifier_inputs import NOTES, ClassifierInputs, is_hollow, longest, read_notes, tokens
from raftune.errors import RewardError
from raftune.rewards import fingerprint
from raftune.rewards.builtin.models import Dtype, HeldWeights, Revision, weights_fingerprint
from raftune.rewards.outcome import hub_error
from raftune.rewards.registry import BuiltInReward, builtin
from raftune.training.load_errors import why_not_loaded


@builtin(
    "classifier",
    media=("text", "messages"),
    example={"model": "cardiffnlp/twitter-roberta-base-sentiment-latest", "label": "positive"},
)
@dataclass
class ClassifierReward(HeldWeights, BuiltInReward):
    """A sequence-classification model: a reward model's number, or the log-odds of one label of a text classifier.

    Options that are null are those of the model's training, if `raftune reward train` made it. A folder or hub name as
    the spec stands for this reward with that model.
    """

    model: Annotated[str, Field(description="Folder or hub name of the model.")] = ""
    tokenizer: Annotated[str | None, Field(description="Folder or hub name; null: the model's own.")] = None
    label: Annotated[
        int | str | None, Field(description="Index or name of the rewarded label; only for models with several.")
    ] = None
    output: Annotated[
        Literal["log_odds", "probability"],
        Field(description="log_odds: a reward model's plain number; probability: in [0, 1]."),
    ] = "log_odds"
    normalize: Annotated[
        bool,
        Field(description="Return (r - mean) / std, with the model's scores of held-out completions of its training."),
    ] = False
    include_prompt: Annotated[
        bool | None,
        Field(description="Whether the prompt is an input, too; if not, a message's content only. null: it is."),
    ] = None
    append_eos: Annotated[
        bool | None, Field(description="End plain texts with the EOS token, as TRL's RewardTrainer does. null: not.")
    ] = None
    add_special_tokens: Annotated[
        bool | None, Field(description="null: added to plain texts of tokenizers that have a [CLS] token.")
    ] = None
    max_length: Annotated[
        int | None, Field(description="Tokens; longer texts lose their beginning. null: the model's own limit.")
    ] = None
    batch_size: Annotated[int, Field(description="Texts in a forward pass, grouped by length.")] = 16
    dtype: Dtype = "float32"
    revision: Revision = None
    trust_remote_code: Annotated[bool, Field(description="Run code from the model's repository.")] = False

    def load(self, name: str | None = None, device: str = "auto", model: Any = None, tokenizer: Any = None) -> Self:
        """Reads configuration and tokenizer, or takes a model and its tokenizer as objects. Raises RewardError."""
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import cached_file

        from raftune.training.devices import choose_device

        self._device = str(choose_device(device, "rewards.device"))
        self._given = model
        self._hub = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        self.config = model.config if model is not None else self._read("model", AutoConfig, self.model, **self._hub)
        heads = list(getattr(self.config, "architectures", None) or []) if model is None else []
        if heads and not any("ForSequenceClassification" in head for head in heads):
            raise RewardError(
                f"reward model {self.model!r} is a {heads[0]}: it has no head that gives a number. "
                "Train a reward model from it first."
            )
        self._source = self.model or str(getattr(self.config, "_name_or_path", "") or type(model).__name__)
        self.name = name or derived_name(self._source)
        count, labels = self.config.num_labels, self.config.id2label
        names = ", ".join(f"{i}: {name}" for i, name in sorted(labels.items())[:12])
        if self.label is None and count != 1:
            raise RewardError(
                f"reward model {self._source!r} has {count} labels ({names}), and a reward model has one. "
                "Name the one to be rewarded: options.label: 1."
            )
        numbers = {name: i for i, name in labels.items()} | {str(i): i for i in range(count)}
        if self.label is not None and str(self.label) not in numbers:
            raise RewardError(f"reward model {self._source!r} has no label {self.label!r}; there are: {names}")
        self._label = 0 if self.label is None else int(numbers[str(self.label)])
        if tokenizer is None:
            source = self.tokenizer or self._source
            self._tokenizer = self._read("tokenizer", AutoTokenizer, source, **self._hub)
            if is_hollow(self._tokenizer):
                raise RewardError(
                    f"reward model {self._source!r}: the tokenizer at {source!r} knows no words: its files are "
                    "missing. Save one there, or name another: options.tokenizer."
                )
        else:
            self._tokenizer = copy.deepcopy(tokenizer)  # what is set below must not change its owner's
        self._tokenizer.truncation_side = "left"
        self._truncation = self._tokenizer.backend_tokenizer.truncation if self._tokenizer.is_fast else None
        path: Any = Path(self._source).expanduser() / NOTES
        if not path.parent.is_dir():
            quietly = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
            path = cached_file(self._source, NOTES, revision=self.revision, **quietly) if model is None else None
        self._notes = read_notes(Path(path) if path else None)
        special, usual = self._trained_with("add_special_tokens"), self._tokenizer.cls_token_id is not None
        self._inputs = ClassifierInputs(
            include_prompt=self._trained_with("include_prompt") is not False,
            append_eos=bool(self._trained_with("append_eos")),
            special_tokens=usual if special is None else special,
            special_in_messages=bool(self.add_special_tokens),
            limit=longest(self._tokenizer, self.config, self._trained_with("max_length")),
        )
        self._mean, self._std = self._find_scale()
        return self

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        pairs = zip(prompts, completions, strict=True)
        texts = [tokens(self._tokenizer, prompt, completion, self._inputs) for prompt, completion in pairs]
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        values: list[float | None] = [None] * len(texts)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for i, value in zip(rows, self._forward([texts[i] for i in rows]), strict=True):
                values[i] = value
        return values

    @cached_property
    def fingerprint(self) -> str:
        """Over the options and the weights: a folder's files, a hub model's commit, the numbers of a model object."""
        inputs = {"include_prompt": self._inputs.include_prompt, "append_eos": self._inputs.append_eos}
        options = {**asdict(self), **inputs, "max_length": self._trained_with("max_length")}
        for key in ("model", "tokenizer", "normalize"):
            del options[key]
        notes = [self._notes["reading"]] if self._notes else []
        if (pad := self._padding_token()) != self._tokenizer.pad_token_id:
            notes = [*notes, ["pad", pad]]
        scale = [self._mean, self._std] if self.normalize else []
        weights = weights_fingerprint(self.model, self.config, self.revision, self._given)
        tokenizer = self._tokenizer
        if tokenizer.is_fast:  # a call leaves in it what it cut by: the fingerprint must be the same before and after
            cut, backend = self._truncation, tokenizer.backend_tokenizer
            backend.enable_truncation(**cut) if cut else backend.no_truncation()
            words = backend.to_str()
        else:
            words = sorted(tokenizer.get_vocab().items())
        words_hash = fingerprint.digest(words, tokenizer.chat_template, tokenizer.pad_token, tokenizer.eos_token)
        return fingerprint.digest("classifier", 1, options, weights, words_hash, *notes, *scale)

    # -- forward ----------------------------------------------------------------------------------------------------

    def _forward(self, rows: list[list[int]]) -> list[float]:
        self.prepare()
        pad = self._padding_token()
        vocabulary = range(self._model.get_input_embeddings().num_embeddings)
        if pad is not None and pad in vocabulary:
            return self._forward_padded(rows, pad)
        # Without a padding token in the configuration a decoder's head reads the last token, whichever it is: for as
        # long as the batch takes, the padding token is one that no row has.
        used = {token for row in rows for token in row}
        pad = next((token for token in (self._tokenizer.pad_token_id, *vocabulary) if token not in (None, *used)), None)
        if pad is None:
            return [value for row in rows for value in self._forward_padded([row], 0)]
        configs = [self._model.config, self._model.config.get_text_config()]
        before = [config.pad_token_id for config in configs]
        try:
            for config in configs:
                config.pad_token_id = pad
            return self._forward_padded(rows, pad)
        finally:
            for config, value in zip(configs, before, strict=True):
                config.pad_token_id = value

    def _padding_token(self) -> int | None:
        """The token that the model's head takes for padding."""
        text = self.config.get_text_config().pad_token_id
        pad: int | None = self.config.pad_token_id if text is None else text
        return pad

    def _forward_padded(self, rows: list[list[int]], pad: int) -> list[float]:
        import torch

        device = next(self._model.parameters()).device
        width = max(len(row) for row in rows)
        ids_BS = torch.full((len(rows), width), pad)
        mask_BS = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids_BS[i, : len(row)] = torch.tensor(row)
            mask_BS[i, : len(row)] = 1
        with torch.inference_mode():
            logits_BL = self._model(input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device)).logits
        logits_BL = logits_BL.double().cpu()
        # The label's log-odds against all others, or its probability; one output is a log-odds already.
        values_B = logits_BL[:, self._label]
        if logits_BL.shape[1] > 1 and self.config.problem_type != "multi_label_classification":
            others = [i for i in range(logits_BL.shape[1]) if i != self._label]
            values_B = values_B - torch.logsumexp(logits_BL[:, others], dim=1)
        if self.output == "probability":
            return [float(value) for value in torch.sigmoid(values_B)]
        return [float(value) for value in (values_B - self._mean) / self._std]

    # -- reading ----------------------------------------------------------------------------------------------------

    def _trained_with(self, field: str) -> Any:
        """The option, else what the model was trained with."""
        value = getattr(self, field)
        return self._notes.get("reading", {}).get(field) if value is None else value

    def _find_scale(self) -> tuple[float, float]:
        """The mean and the standard deviation that scores are normalised by; 0 and 1 if they are not."""
        if not self.normalize:
            return 0.0, 1.0
        if self.output != "log_odds":
            raise RewardError(
                f"reward model {self._source!r}: options.normalize must come with output: log_odds; got "
                f"{self.output!r}, which is normalised already. Leave one of them out."
            )
        scale = self._notes.get("distribution", {})
        if not scale.get("std"):
            raise RewardError(
                f"reward model {self._source!r}: options.normalize needs the distribution of its scores, and there is "
                f"none in {NOTES} beside it. `raftune reward train` writes one; leave normalize out for other models."
            )
        return float(scale["mean"]), float(scale["std"])

    def _read_model(self) -> Any:
        from transformers import AutoModelForSequenceClassification as Model

        label = f"reward model {self._source!r}"
        return self._read_weights(Model, self.model, self.dtype, label, **self._hub).to(self._device)

    def _unreadable(self, part: str, source: str, error: Exception) -> RewardError:
        folder = Path(source).expanduser()
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            return RewardError(
                f"reward_funcs: a reward model must be whole; {source!r} is an adapter alone. Merge it into its base: "
                f"AutoPeftModelForSequenceClassification.from_pretrained({source!r}).merge_and_unload()"
                ".save_pretrained(FOLDER), save its tokenizer there too, and name that folder."
            )
        if folder.is_dir():
            return RewardError(f"reward_funcs: {source!r}: its {part} cannot be read: {why_not_loaded(error, source)}")
        return RewardError(
            f"reward_funcs: {source!r} is no built-in reward and no module:function, and as a model's folder or hub "
            f"name its {part} cannot be read: {hub_error(error)}. Check the name, or give a folder."
        )
