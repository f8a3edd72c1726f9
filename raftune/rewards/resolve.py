"""Makes the reward of a spec in this process: built-in, function or model."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from raftune.config.extensions import module_from_file, with_options
from raftune.config.rewards import RewardSpec, derived_name
from raftune.config.secrets import expanded
from raftune.errors import ConfigError, RewardError
from raftune.protocols import Reward
from raftune.rewards import fingerprint
from raftune.rewards.batch import IMAGE_MEDIA, PASSED, TEXT_MEDIA, is_image
from raftune.rewards.outcome import hub_error, one_line
from raftune.rewards.registry import built_in
from raftune.sanitize import did_you_mean
from raftune.store.files import sha256_of

SHORT_NAMES = {
    name: f"trl.rewards:{name}" for name in ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
}


def resolve(spec: RewardSpec, device: str = "auto") -> Reward:
    """The reward of a spec, in this process. Raises ConfigError for a wrong spec, RewardError if it does not load."""
    if is_function(spec.spec):
        return _from_function(spec)
    if spec.spec in built_in():
        cls, options = built_in()[spec.spec], spec.options
    else:
        name, source = _model_reward(spec)
        cls, options = built_in()[name], {"model": source, **spec.options}
    options = expanded(options, f"rewards.options of {spec.spec!r}")
    reward: Reward = with_options(cls, spec.spec, "rewards.options", options).load(spec.derived_name, device)
    return reward


def is_function(spec: str) -> bool:
    """True of module:function, file.py:function, a TRL short name, and module.function where such a module exists."""
    if spec in SHORT_NAMES or spec.endswith(".py"):
        return True
    module_name, colon, function_name = spec.rpartition(":")
    if colon:
        return function_name.removesuffix("()").isidentifier() and len(module_name) > 1
    parts = spec.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts) or Path(spec).exists():
        return False
    here = Path(parts[0]).is_dir() or Path(f"{parts[0]}.py").is_file()  # a reward's own process looks here as well
    return here or importlib.util.find_spec(parts[0]) is not None


def _model_reward(spec: RewardSpec) -> tuple[str, str]:
    """The built-in reward that reads this folder, file or hub model, and the model's folder, file or hub name."""
    source = spec.spec
    path = Path(source).expanduser()
    if not (path / "config.json").exists() and (path / "model" / "config.json").is_file():
        path = path / "model"  # as `raftune reward train` writes it
        source = str(path)
    if not path.exists():  # a misspelt built-in must not be looked for on the hub, nor a missing folder
        if near := did_you_mean(source.casefold(), [*built_in(), *SHORT_NAMES], "", 0.75):
            raise ConfigError(f"reward_funcs: no reward {source!r}; {near} `raftune reward list` shows all.")
        if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
            raise ConfigError(
                f"reward_funcs: no folder {source!r}; give a folder that save_pretrained wrote, FILE.py:FUNCTION, or a "
                "name that `raftune reward list` shows"
            )
    if source.endswith(".safetensors"):
        return "aesthetic", source
    try:
        if path.is_dir():
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        else:
            from transformers import PretrainedConfig

            config, _ = PretrainedConfig.get_config_dict(source, revision=spec.options.get("revision"))
        names = {reward.model_type: name for name, reward in built_in().items() if reward.model_type}
        return names.get(config["model_type"], "classifier"), source
    except Exception as error:
        if path.exists():
            return "classifier", source
        raise RewardError(
            f"reward_funcs: no reward {source!r}: it is no built-in (`raftune reward list` shows them), no "
            f"FILE.py:FUNCTION and no folder, and as a hub name: {hub_error(error)}."
        ) from None


def _from_function(spec: RewardSpec) -> Reward:
    target = SHORT_NAMES.get(spec.spec, spec.spec)
    source, colon, name = target.rpartition(":")
    if not colon:
        source, _, name = (target, "", "") if target.endswith(".py") else target.rpartition(".")
    attribute = name.removesuffix("()")
    module, code = _import(source, spec.spec)
    if not attribute or not hasattr(module, attribute):
        missing = f"no function {attribute!r} in {spec.spec!r}"
        if not attribute:
            missing = f"{spec.spec!r} names no function: write {spec.spec}:function"
        raise ConfigError(f"reward_funcs: {missing}; {did_you_mean(attribute, dir(module), _functions_in(module))}")
    function = getattr(module, attribute)
    if name.endswith("()") or inspect.isclass(function):
        try:
            instance = function(**expanded(spec.options, f"rewards.options of {spec.spec!r}"))
        except Exception as error:
            raise RewardError(f"reward {spec.spec!r}: {attribute}(…) failed: {one_line(error)}") from error
        if not callable(instance):
            raise ConfigError(f"reward_funcs: {spec.spec!r} gives a {type(instance).__name__}, which is not callable")
        code = code or fingerprint.of_module_function(function, module)
        code = fingerprint.digest(code, attribute, fingerprint.describe(spec.options))
        return FunctionReward(instance, spec.derived_name, code=code)
    if not callable(function):
        raise ConfigError(
            f"reward_funcs: {spec.spec!r} is {type(function).__name__} {function!r}, not a function; "
            f"{_functions_in(module)}"
        )
    code = fingerprint.digest(code or fingerprint.of_module_function(function, module), attribute)
    return FunctionReward(function, spec.derived_name, spec.options, code)


def _import(source: str, spec: str) -> tuple[ModuleType, str | None]:
    """The module, and the hash of its code if it is a file."""
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source), None
        except BaseException as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and missing.partition(".")[0] == "trl":
                raise ConfigError(
                    f"reward_funcs: {spec!r} needs TRL. Install it: pip install 'raftune[trl]'."
                ) from None
            if missing and (source == missing or source.startswith(missing + ".")):
                raise ConfigError(
                    f"reward_funcs: no module {source!r} (of {spec!r}); give a file as "
                    f"{source.split('.')[-1]}.py:function, or install the package"
                ) from None
            raise RewardError(f"reward {spec!r}: importing {source} failed: {one_line(error)}") from error
    path = Path(source).expanduser()
    if not path.is_file():
        names = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"did you mean {str(path.with_name(near[0]))!r}?" if near else f"looked in {path.resolve().parent}"
        raise ConfigError(f"reward_funcs: no file {source!r} (of {spec!r}); {hint}")
    code = sha256_of(path)[:16]
    try:
        return module_from_file(path, "reward"), code
    except BaseException as error:
        raise RewardError(f"reward {spec!r}: {source} cannot be run: {one_line(error)}") from error


def _functions_in(module: ModuleType) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    return f"there are: {', '.join(sorted(names)[:8])}" if names else "it defines no function"


class FunctionReward(Reward):
    """Calls the function as TRL does, by keyword; one that takes no `**kwargs` gets only the keywords it names.

    `options` are further keyword arguments; they win over columns of the same name. A callable object
    with `name`, `media` and `fingerprint` keeps these.
    """

    def __init__(
        self,
        function: Any,
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        code: str | None = None,
    ) -> None:
        if not callable(function):
            raise ConfigError(
                f"reward_funcs must hold callables, models or specs; got {type(function).__name__} {function!r}. "
                "Give a function that takes prompts and completions by keyword and returns a list of numbers."
            )
        inner = function
        while isinstance(inner, partial):
            inner = inner.func
        declared = all(hasattr(function, attribute) for attribute in ("name", "media", "fingerprint"))
        if name is None:
            full = getattr(inner, "__name__", None) or type(inner).__name__
            name = derived_name("lambda" if full == "<lambda>" else full)
        self.name, self.function = function.name if declared else name, function
        self.options = expanded(dict(options or {}), f"rewards.options of {name!r}")
        self.media = frozenset(getattr(function, "media", TEXT_MEDIA | IMAGE_MEDIA))
        code = code or (function.fingerprint if declared else fingerprint.of_callable(function))
        self.fingerprint = code if declared else fingerprint.digest(code, fingerprint.describe(dict(options or {})))
        call = getattr(inner, "__call__", None)  # noqa: B004, an object's is asked for
        self.is_async = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(call)
        try:
            parameters = list(inspect.signature(function).parameters.values())
            takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        except (TypeError, ValueError):  # it does not say
            parameters, takes_all = [], True
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._required = [p.name for p in named if p.default is p.empty]
        self.needs = frozenset(self._required) - PASSED - self.options.keys()
        accepts = frozenset(p.name for p in named if p.kind is not p.POSITIONAL_ONLY)
        self.accepts = None if takes_all else accepts  # the keywords that the function takes; None: all

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        copies = [value.copy() if is_image(value) else value for value in completions]  # images can be changed
        arguments = {**columns, "prompts": prompts, "completions": copies, **self.options}
        if missing := [name for name in self._required if name not in arguments]:
            have = ", ".join(sorted(arguments))
            raise ConfigError(f"reward {self.name!r} needs {missing[0]!r}, which is not passed; there are: {have}")
        if self.accepts is not None:
            names = self.accepts | self.options.keys()
            arguments = {name: value for name, value in arguments.items() if name in names}
        return self.function(**arguments)
