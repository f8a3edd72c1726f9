"""Loads, saves and publishes the best round's model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel

from raftune.config.policy import CausalLMPolicy
from raftune.errors import StoreError
from raftune.policies.causal_lm import loading
from raftune.policies.causal_lm.saving import model_usage, write_model
from raftune.policies.publishing import ground_adapter
from raftune.results.model_card import (
    best_of,
    card,
    publish_model,
    remove_published,
)
from raftune.store.committed import check_folder, signatures, write_manifest
from raftune.store.files import explaining, set_usual_mode
from raftune.store.run import RunFolder
from raftune.training.devices import choose_device
from raftune.training.quiet import quiet

# What push_to_hub may be told that goes into the model card.
_FACTS = ("model_name", "dataset_name", "dataset", "dataset_tags", "tags", "language", "license", "finetuned_from")


def load_named(policy: CausalLMPolicy) -> Any:
    """The model of this name, in eval mode on its device."""
    device = choose_device(policy.device)
    return loading.load_weights(policy, policy.model, policy.revision, device)


def with_fresh_adapter(base: Any, policy: CausalLMPolicy) -> Any:
    """The model under a new adapter, whose effect is zero."""
    assert policy.adapter is not None
    return loading.fresh_adapter(base, policy.adapter, seed=0).eval()


def load_round(policy: CausalLMPolicy, run: RunFolder, round_: int) -> Any:
    """The model of a committed round in eval mode; a PeftModel where the run trains an adapter."""
    folder, start = run.folder(round_, "model"), run.folder(0, "model")
    for place in (folder, start):
        check_folder(place)
    device = choose_device(policy.device)
    if (folder / loading.ADAPTER).is_file():
        with quiet():
            return PeftModel.from_pretrained(loading.load_start(policy, start, device), str(folder)).eval()
    if policy.adapter is not None:  # the start, or a copy of it where a round had nothing to learn from
        return with_fresh_adapter(loading.load_start(policy, start, device), policy)
    return loading.load_round(policy, folder, start, device)


def publish(run: RunFolder, policy: CausalLMPolicy, out: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Writes the best round's model into `out`, with its tokenizer and a model card.

    Where a run of an adapter has none yet, one of zero effect: what loads the others' adapters loads it.
    """
    if policy.adapter is None or (run.folder(best_of(run), "model") / loading.ADAPTER).is_file():
        publish_model(run.root, out)
    else:
        start = check_folder(run.folder(0, "model"))
        exact = policy.model_copy(update={"load_in_4bit": False})
        model = with_fresh_adapter(loading.load_start(exact, start, torch.device("cpu")), policy)
        with explaining(out):
            out.mkdir(parents=True, exist_ok=True)
            remove_published(out)
            before = signatures(out)
            write_model(model, None, out, loading.base_of_adapters(start))
            ground_adapter(start, out, policy.tokenizer)
            write_manifest(out, before)
            set_usual_mode(*(out / name for name in signatures(out).keys() - before.keys()))
    if facts is not None or not (out / "README.md").is_file():
        write_card(run, policy, out, facts or {})


def write_card(run: RunFolder, policy: CausalLMPolicy, out: Path, facts: Mapping[str, Any]) -> None:
    """Writes README.md, with what else is said of the model: its name, data set, tags, language, license."""
    text = card(run.root, best_of(run), model_usage(policy.adapter is not None))
    _, head, body = text.split("---\n", 2)
    data = yaml.safe_load(head)
    said = {name: value for name, value in facts.items() if value is not None}
    tags = said.pop("tags", ())
    data["tags"] = [*dict.fromkeys([*data["tags"], *([tags] if isinstance(tags, str) else tags)])]
    if sets := said.pop("dataset_name", None) or said.pop("dataset", None):
        data["datasets"] = [sets] if isinstance(sets, str) else list(sets)
    data |= said
    with explaining(out):
        out.mkdir(parents=True, exist_ok=True)
        head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        (out / "README.md").write_text(f"---\n{head}---\n{body}", encoding="utf-8")


def push(run: RunFolder, policy: CausalLMPolicy, name: str, message: str, options: dict[str, Any]) -> Any:
    """Uploads the best round's model to the hub. Raises StoreError, saying why, where that fails."""
    facts = {fact: options.pop(fact) for fact in _FACTS if fact in options}
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if HF_HUB_OFFLINE:
        raise StoreError("push_to_hub needs the hub, and HF_HUB_OFFLINE is set. Unset it, or use save_model(folder).")
    api = HfApi(token=options.pop("token", None))
    private = options.pop("private", None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            publish(run, policy, Path(folder) / "model", facts)
            repo = api.create_repo(name, private=private, exist_ok=True).repo_id
            return api.upload_folder(
                repo_id=repo, folder_path=str(Path(folder) / "model"), commit_message=message, **options
            )
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StoreError(
            f"push_to_hub could not reach {name!r}: {first}. Check the name, the token and the network; the model is "
            f"in {run.root}, and save_model(folder) writes it."
        ) from error
