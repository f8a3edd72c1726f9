"""Makes the reward of a spec in this process: built-in, function or model."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from raftune.config.extensions import module_from_file
from raftune.config.rewards import RewardSpec
from raftune.config.secrets import expanded, masked
from raftune.errors import ConfigError, RewardError
from raftune.protocols import Reward
from raftune.rewards import fingerprint
from raftune.rewards.function import FunctionReward
from raftune.rewards.outcome import hub_error, one_line
from raftune.rewards.registry import BUILT_IN, BuiltinReward, nearest
from raftune.store.files import sha256_of

SHORT_NAMES = {
    name: f"trl.rewards:{name}" for name in ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
}


def resolve(spec: RewardSpec, device: str = "auto") -> Reward:
    """The reward of a spec, in this process."""
    if spec.spec in BUILT_IN:
        return _from_builtin(BUILT_IN[spec.spec], spec, spec.options, device)
    if is_function(spec.spec):
        return _from_function(spec)
    return _from_model(spec, device)


def _from_builtin(builtin: BuiltinReward, spec: RewardSpec, options: dict[str, Any], device: str) -> Reward:
    given = with_options(builtin.options, spec.spec, expanded(options, f"rewards.options of {spec.spec!r}"))
    if builtin.loads is not None:
        return cast(Reward, builtin.reward_class()(given, name=spec.derived_name, device=device))
    given.name = spec.derived_name
    return cast(Reward, given)


def is_function(spec: str) -> bool:
    """True of module:function, file.py:function, a TRL short name, and module.function where such a module exists."""
    if spec in SHORT_NAMES or spec.endswith(".py"):
        return True
    left, colon, right = spec.rpartition(":")
    if colon:
        return right.removesuffix("()").isidentifier() and len(left) > 1
    parts = spec.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts) or Path(spec).exists():
        return False
    here = Path(parts[0]).is_dir() or Path(f"{parts[0]}.py").is_file()  # a reward's own process looks here as well
    return here or importlib.util.find_spec(parts[0]) is not None


def _from_model(spec: RewardSpec, device: str) -> Reward:
    """The reward that a model's folder, file or hub name stands for."""
    source = _model_folder(spec.spec)
    if not Path(source).expanduser().exists():
        _refuse_slip(source)
    builtin = BUILT_IN[_kind_of(source, spec.options.get("revision"))]
    return _from_builtin(builtin, spec, {"model": source, **spec.options}, device)


def _model_folder(source: str) -> str:
    """The folder itself, or the model in it where `raftune reward train` wrote the folder."""
    folder = Path(source).expanduser()
    if not (folder / "config.json").exists() and (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    return source


def _kind_of(source: str, revision: str | None) -> str:
    """The built-in reward that reads this folder, file or hub model; a classifier says itself what it cannot read."""
    if source.endswith(".safetensors"):
        return "aesthetic"
    place = Path(source).expanduser()
    try:
        if place.is_dir():
            told = json.loads((place / "config.json").read_text(encoding="utf-8"))
        else:
            from transformers import PretrainedConfig

            told, _ = PretrainedConfig.get_config_dict(source, revision=revision)
        kinds = {builtin.model_type: name for name, builtin in BUILT_IN.items() if builtin.model_type}
        return kinds.get(told["model_type"], "classifier")
    except Exception as error:
        if not place.exists():
            raise _no_such_reward(source, error) from None
        return "classifier"


def _no_such_reward(spec: str, error: Exception) -> RewardError:
    """What to say of a name that is nothing here, and that the hub does not know or cannot be asked about."""
    return RewardError(
        f"reward_funcs: no reward {spec!r}: it is no built-in (`raftune reward list` shows them), no FILE.py:FUNCTION "
        f"and no folder, and as a hub name: {hub_error(error)}."
    )


def _refuse_slip(spec: str) -> None:
    """A misspelt built-in must not be looked for on the hub, nor a missing folder."""
    if near := nearest(spec, [*BUILT_IN, *SHORT_NAMES], cutoff=0.75):
        raise ConfigError(f"reward_funcs: no reward {spec!r}; did you mean {near!r}? `raftune reward list` shows all.")
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or "\\" in spec:
        raise ConfigError(
            f"reward_funcs: no folder {spec!r}; give a folder that save_pretrained wrote, FILE.py:FUNCTION, or a name "
            "that `raftune reward list` shows"
        )


def with_options(cls: type[Any], spec: str, options: dict[str, Any]) -> Any:
    """The dataclass with these options. Raises ConfigError for an option that is unknown or cannot be meant."""
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in options:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
            raise ConfigError(f"rewards.options: {spec!r} has no option {key!r}; {hint}")
    try:
        return TypeAdapter(cls).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "options"
        raise ConfigError(
            f"rewards.options.{where} of {spec!r}: {first['msg'].lower()}; got {masked(repr(first['input']))}"
        ) from None


def _from_function(spec: RewardSpec) -> Reward:
    target = SHORT_NAMES.get(spec.spec, spec.spec)
    left, colon, right = target.rpartition(":")
    if not colon:
        left, _, right = (target, "", "") if target.endswith(".py") else target.rpartition(".")
    makes, attribute = right.endswith("()"), right.removesuffix("()")
    module, code = _from_file(left, spec.spec) if left.endswith(".py") else (_import(left, spec.spec), None)
    found = _attribute(module, attribute, spec.spec)
    if makes or inspect.isclass(found):
        try:
            made = found(**expanded(spec.options, f"rewards.options of {spec.spec!r}"))
        except Exception as error:
            raise RewardError(f"reward {spec.spec!r}: {attribute}(…) failed: {one_line(error)}") from error
        if not callable(made):
            raise ConfigError(f"reward_funcs: {spec.spec!r} gives a {type(made).__name__}, which is not callable")
        code = fingerprint.digest(
            code or fingerprint.of_module_function(found, module), attribute, fingerprint.describe(spec.options)
        )
        return FunctionReward(made, spec.derived_name, code=code)
    if not callable(found):
        raise ConfigError(
            f"reward_funcs: {spec.spec!r} is {type(found).__name__} {found!r}, not a function{_there_are(module)}"
        )
    code = fingerprint.digest(code or fingerprint.of_module_function(found, module), attribute)
    return FunctionReward(found, spec.derived_name, spec.options, code)


def _from_file(left: str, spec: str) -> tuple[ModuleType, str]:
    path = Path(left).expanduser()
    if not path.is_file():
        near = (
            difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
            if path.parent.is_dir()
            else []
        )
        hint = f"did you mean {str(path.with_name(near[0]))!r}?" if near else f"looked in {path.resolve().parent}"
        raise ConfigError(f"reward_funcs: no file {left!r} (of {spec!r}); {hint}")
    code = sha256_of(path)[:16]
    try:
        return module_from_file(path, "reward"), code
    except BaseException as error:
        raise RewardError(f"reward {spec!r}: {left} cannot be run: {one_line(error)}") from error


def _import(left: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(left)
    except ModuleNotFoundError as error:
        if error.name and (left == error.name or left.startswith(error.name + ".")):
            raise ConfigError(
                f"reward_funcs: no module {left!r} (of {spec!r}); give a file as {left.split('.')[-1]}.py:function, "
                "or install the package"
            ) from None
        raise RewardError(f"reward {spec!r}: importing {left} failed: {one_line(error)}") from error
    except BaseException as error:
        raise RewardError(f"reward {spec!r}: importing {left} failed: {one_line(error)}") from error


def _attribute(module: ModuleType, attribute: str, spec: str) -> Any:
    if attribute and hasattr(module, attribute):
        return getattr(module, attribute)
    near = difflib.get_close_matches(attribute, dir(module), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else _there_are(module)
    asked = (
        f"no function {attribute!r} in {spec!r}" if attribute else f"{spec!r} names no function: write {spec}:function"
    )
    raise ConfigError(f"reward_funcs: {asked}{hint}")


def _there_are(module: ModuleType) -> str:
    own = [
        n
        for n, v in vars(module).items()
        if callable(v) and not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
    ]
    return f"; there are: {', '.join(sorted(own)[:8])}" if own else "; it defines no function"
