"""Error messages for models, adapters and tokenizers that cannot be loaded."""

from __future__ import annotations

import re
from pathlib import Path

from raftune.sanitize import first_line, one_line

UNTRUSTED = "trust_remote_code"  # what transformers asks for where a model needs code of its own
LFS = b"version https://git-lfs"
# A word in an error about a missing package: the package, and an alternative to installing it.
UNQUANTIZED = "or name a model that is not quantized"
PACKAGES = {
    **dict.fromkeys(
        ("flash_attn", "flash-attn", "flashattention"), ("flash-attn", "or set policy.attn_implementation: sdpa")
    ),
    "bitsandbytes": ("bitsandbytes", UNQUANTIZED),
    **dict.fromkeys(("gptqmodel", "auto-gptq"), ("gptqmodel", UNQUANTIZED)),
    "optimum": ("optimum", UNQUANTIZED),
    "autoawq": ("autoawq", UNQUANTIZED),
    **dict.fromkeys(("compressed_tensors", "compressed-tensors"), ("compressed-tensors", UNQUANTIZED)),
    **{name: (name, "or save a tokenizer.json beside the model") for name in ("sentencepiece", "tiktoken")},
    "mamba_ssm": ("mamba-ssm", "or name another model"),
}
MISMATCH = re.compile(
    r"size mismatch for (\S+?):.*?torch\.Size\(\[([^\]]*)\]\).*?torch\.Size\(\[([^\]]*)\]\)", re.DOTALL
)


def why_not_loaded(error: BaseException, source: str | Path) -> str:
    """The cause, and the fix, as sentences. `source` is the folder or hub name that was read."""
    if UNTRUSTED in str(error):
        return "it needs Python code that comes with it. Read that code, then set trust_remote_code: true."
    folder = Path(source).expanduser()
    weights = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".bin") and p.is_file())
    cause, fix = (
        _damaged(weights) or _mismatched(error) or _missing_package(error) or _pickled(error, weights) or ("", "")
    )
    return f"{cause}. {fix}." if cause else f"{one_line(first_line(error), 300)}."


def _damaged(weights: list[Path]) -> tuple[str, str] | None:
    """The first file of weights that is not what its name says."""
    from safetensors import SafetensorError, safe_open

    for path in weights:
        with path.open("rb") as file:
            head = file.read(len(LFS))
        if head == LFS:
            return f"{path.name} is a git-lfs pointer and not the weights", f"Run `git lfs pull` in {path.parent}"
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="np") as tensors:
                    tensors.keys()
            except (SafetensorError, OSError) as error:
                size, fault = path.stat().st_size, first_line(error)
                return f"{path.name} ({size} bytes) is cut short or damaged ({fault})", "Copy or download it again"
    return None


def _mismatched(error: BaseException) -> tuple[str, str] | None:
    if not (match := MISMATCH.search(str(error))):
        return None
    name, saved, expected = match.groups()
    fix = "Use the model that it was made for; a vocabulary that was resized must be resized and saved there too"
    return f"{name} is [{saved}] in the files and [{expected}] in the model", fix


def _missing_package(error: BaseException) -> tuple[str, str] | None:
    text = str(error)
    if not isinstance(error, ImportError) and "pip install" not in text and "not installed" not in text:
        return None
    for word, (package, other) in PACKAGES.items():
        if word in text.lower():
            cause = f"it needs the package {package}, which is not installed or does not work here"
            return cause, f"Install {package}, {other}"
    if match := re.search(r"pip install (?:-\S+ )*[\"']?([A-Za-z0-9_.-]+)", text):
        return f"it needs the package {match[1]}", f"Install {match[1]}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"it needs the module {error.name}, which is not installed", f"Install the package that has {error.name}"
    return None


def _pickled(error: BaseException, weights: list[Path]) -> tuple[str, str] | None:
    text, kinds = str(error), {path.suffix: path.name for path in weights}
    refused = type(error).__name__ == "UnpicklingError" or "weights_only" in text or "torch.load" in text
    if not refused and (".bin" not in kinds or ".safetensors" in kinds):
        return None
    name = f" ({kinds['.bin']})" if ".bin" in kinds else ""
    fix = "Load it with transformers where you trust it, and save it again: save_pretrained writes safetensors"
    return f"its weights{name} are pickled, which may run code, and were not read", fix
