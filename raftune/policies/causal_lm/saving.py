"""Saves language models. Equal models give equal bytes.

A folder holds either full weights with configuration and tokenizer, which plain transformers loads, or a LoRA adapter,
which plain peft loads onto the base that its adapter_config.json names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from raftune.policies.causal_lm.loading import ADAPTER
from raftune.protocols import ModelUsage
from raftune.store.files import dump_json
from raftune.training.quiet import quiet

OPTIMIZER = "optimizer.safetensors"
# One key only: with two or more, safetensors writes them in an order that varies from process to process.
METADATA = {"format": "pt"}


def write_model(
    model: Any,
    tokenizer: Any,
    out: Path,
    base: tuple[str, str | None],
    optimizer: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes the model into `out`: the adapter alone if it has one, whose base is `base` (name, revision).

    `optimizer` is the state that the next round's training carries on (`parameter/entry` → tensor).
    """
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        save_file(plain, out / "adapter_model.safetensors", metadata=METADATA)
        config = model.peft_config["default"].to_dict()
        config |= {"base_model_name_or_path": base[0], "revision": base[1], "inference_mode": True}
        dump_json(out / ADAPTER, _sorted_sets(config))
    else:
        with quiet():
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    if optimizer:
        save_file(dict(sorted(optimizer.items())), out / OPTIMIZER, metadata=METADATA)


def _sorted_sets(value: Any) -> Any:
    """The value with its sets as sorted lists: their own order depends on the process."""
    if isinstance(value, dict):
        return {key: _sorted_sets(item) for key, item in value.items()}
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def read_optimizer(folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer's state in a round's model folder; empty where there is none."""
    path = folder / OPTIMIZER
    return load_file(path) if path.is_file() else {}


def model_usage(adapter: bool, note: str = "") -> ModelUsage:
    """Use of a published language model, for its card."""
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if adapter:
        imports = f"from peft import {kind}\nfrom transformers import AutoTokenizer\n"
    code = f'{imports}\nmodel = {kind}.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    return ModelUsage("peft" if adapter else "transformers", "text-generation", code, note)
