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
from raftune.policies.causal_lm.loading import model_usage, write_model
from raftune.policies.model_files import ADAPTER, ground_adapter
from raftune.results.model_card import best_of, card, publish_model, remove_published
from raftune.sanitize import first_line
from raftune.store.committed import check_folder, signatures, write_manifest
from raftune.store.files import explaining, set_usual_mode
from raftune.store.run import RunFolder
from raftune.training.devices import choose_device
from raftune.training.quiet import quiet

# Options of push_to_hub that go into the model card.
_FACTS = ("model_name", "dataset_name", "dataset", "dataset_tags", "tags", "language", "license", "finetuned_from")


def load_round(policy: CausalLMPolicy, run: RunFolder, round_: int) -> Any:
    """The model of a committed round in eval mode; a PeftModel where the run trains an adapter."""
    folder, start = check_folder(run.folder(round_, "model")), check_folder(run.folder(0, "model"))
    device = choose_device(policy.device)
    if (folder / ADAPTER).is_file():
        with quiet():
            return PeftModel.from_pretrained(loading.load_start(policy, start, device), str(folder)).eval()
    if policy.adapter is not None:  # the start, or a copy of it where a round had nothing to learn from
        return loading.fresh_adapter(loading.load_start(policy, start, device), policy.adapter, seed=0).eval()
    return loading.load_round(policy, folder, start, device)


def publish(run: RunFolder, policy: CausalLMPolicy, out: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Writes the best round's model into `out`, with its tokenizer and a model card.

    A run of an adapter whose best round is the start writes an adapter of zero effect, which loads like the others.
    """
    if policy.adapter is None or (run.folder(best_of(run), "model") / ADAPTER).is_file():
        publish_model(run.root, out)
    else:
        start = check_folder(run.folder(0, "model"))
        exact = policy.model_copy(update={"load_in_4bit": False})
        base = loading.load_start(exact, start, torch.device("cpu"))
        model = loading.fresh_adapter(base, policy.adapter, seed=0).eval()
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
    """Writes README.md; `facts` are the model's name, data set, tags, language and license."""
    text = card(run.root, best_of(run), model_usage(policy.adapter is not None))
    _, head, body = text.split("---\n", 2)
    data = yaml.safe_load(head)
    extra = {name: value for name, value in facts.items() if value is not None}
    tags = extra.pop("tags", ())
    data["tags"] = [*dict.fromkeys([*data["tags"], *([tags] if isinstance(tags, str) else tags)])]
    if sets := extra.pop("dataset_name", None) or extra.pop("dataset", None):
        data["datasets"] = [sets] if isinstance(sets, str) else list(sets)
    data |= extra
    with explaining(out):
        out.mkdir(parents=True, exist_ok=True)
        head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        (out / "README.md").write_text(f"---\n{head}---\n{body}", encoding="utf-8")


def push(run: RunFolder, policy: CausalLMPolicy, name: str, message: str, options: dict[str, Any]) -> Any:
    """Uploads the best round's model to the hub. Raises StoreError with the reason where that fails."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if HF_HUB_OFFLINE:
        raise StoreError("push_to_hub needs the hub, and HF_HUB_OFFLINE is set. Unset it, or use save_model(folder).")
    facts = {fact: options.pop(fact) for fact in _FACTS if fact in options}
    api, private = HfApi(token=options.pop("token", None)), options.pop("private", None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            publish(run, policy, model, facts)
            repo = api.create_repo(name, private=private, exist_ok=True).repo_id
            return api.upload_folder(repo_id=repo, folder_path=str(model), commit_message=message, **options)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise StoreError(
            f"push_to_hub could not reach {name!r}: {first_line(error)}. Check the name, the token and the network; "
            f"the model is in {run.root}, and save_model(folder) writes it."
        ) from error
