"""The best round's model in other hands: loaded here, written as a folder, or pushed to the hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel

from raftune.config.policy import CausalLMPolicy
from raftune.errors import StoreError
from raftune.policies.causal_lm import loading
from raftune.policies.devices import choose_device
from raftune.quiet import quiet
from raftune.store.run import RunFolder


def load_named(policy: CausalLMPolicy) -> Any:
    """The model of this name, in eval mode on its device."""
    device = choose_device(policy.device)
    return loading.load_weights(policy, policy.model, policy.revision, device)


def load_round(policy: CausalLMPolicy, run: RunFolder, round_: int) -> Any:
    """The model of a committed round in eval mode; a PeftModel where the round has an adapter."""
    folder, start = run.folder(round_, "model"), run.folder(0, "model")
    device = choose_device(policy.device)
    if not (folder / loading.ADAPTER).is_file():
        return loading.load_round(policy, folder, start, device)
    with quiet():
        return PeftModel.from_pretrained(loading.load_start(policy, start, device), str(folder)).eval()


def publish(run: RunFolder, out: Path) -> None:
    """Writes the best round's model into `out`, with its tokenizer and a model card."""
    from raftune.card import publish_model

    publish_model(run.root, out)


def push(run: RunFolder, name: str, message: str, options: dict[str, Any]) -> Any:
    """Uploads the best round's model to the hub. Raises StoreError, saying why, where that fails."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if HF_HUB_OFFLINE:
        raise StoreError("push_to_hub needs the hub, and HF_HUB_OFFLINE is set. Unset it, or use save_model(folder).")
    api = HfApi(token=options.pop("token", None))
    private = options.pop("private", None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            publish(run, Path(folder) / "model")
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
