"""The section `rewards`: one entry for each reward, how they are combined, and what happens on failure."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from raftune.config.base import ConfigSection, OneOrMore


class RewardSpec(ConfigSection):
    """One reward. A plain string stands for a spec with every other field at its default."""

    shorthand: ClassVar[str] = "spec"
    spec: str = Field(min_length=1)
    """A built-in reward (`raftune reward list`), module:function, file.py:function, 'starter', or a folder or hub name
    of a sequence-classification model or a CLIPModel."""
    name: str | None = Field(None, pattern=r"^[\w.\-]+$")
    """Name of the column rewards/NAME; None derives it from the spec."""
    weight: float = Field(1.0, description="Weight of this reward in the score; a negative one makes it a penalty.")
    at_least: float | None = Field(None, allow_inf_nan=False)
    """Threshold: the reward counts its weight if the value is at least this, otherwise 0."""
    at_most: float | None = Field(None, allow_inf_nan=False)
    """Threshold: the reward counts its weight if the value is at most this, otherwise 0."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of a built-in reward, or keyword arguments of a function. ${NAME} is replaced by an environment variable,
    such as a key."""
    timeout: float | None = Field(None, gt=0, le=1e7)
    """Time limit of a call in seconds; None: rewards.timeout."""

    @model_validator(mode="after")
    def _thresholds_can_be_kept(self) -> RewardSpec:
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(
                f"at_least must not exceed at_most; got {self.at_least:g} and {self.at_most:g} for {self.spec!r}. No "
                "value would count: swap them, or leave one out."
            )
        return self

    @property
    def derived_name(self) -> str:
        """The given name, else the function's name, else the model's folder or the last part of its hub name."""
        return self.name or derived_name(self.spec)


class RewardsConfig(ConfigSection):
    """The rewards of a run. A sample that a reward fails to score is never selected."""

    reward_funcs: Annotated[tuple[RewardSpec, ...], OneOrMore()] = ()
    """The rewards; the score is the weighted sum of their parts."""
    combine: Literal["sum", "rank"] = "sum"
    """The score: the weighted sum of the parts (sum), or of each part's rank among the prompt's candidates, from 0
    (lowest) to 1 (highest), which is independent of scale (rank). Evaluations always use the sum."""
    batch_size: int = Field(64, ge=1, description="Samples per call of a reward; a failed call fails all of them.")
    timeout: float = Field(120.0, gt=0, le=1e7, description="Time limit of one call in seconds.")
    retries: int = Field(0, ge=0, description="Retries after an error or a timeout.")
    max_failure_fraction: float = Field(0.5, ge=0, le=1)
    """Share of failed samples above which a round stops with examples."""
    device: str = Field("auto", description="Device of reward models: auto, cpu, cuda, cuda:N or mps.")

    @model_validator(mode="after")
    def _names_differ(self) -> RewardsConfig:
        names = [spec.name for spec in self.reward_funcs if spec.name is not None]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"reward_funcs must bear different names; got {twice[0]!r} twice. Each names a column: rename one."
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """One name for each reward, in order, all different: a derived name that is taken gets _2, _3, …"""
        return unique_names([(spec.derived_name, spec.name is not None) for spec in self.reward_funcs])


def derived_name(spec: str) -> str:
    """The last part of a spec, in letters that a column name may have: `file.py:polite` gives `polite`."""
    last = spec.removesuffix("()").rstrip("/\\").replace("\\", "/").split("/")[-1].rsplit(":", 1)[-1]
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in last) or "reward"


def unique_names(names: list[tuple[str, bool]]) -> tuple[str, ...]:
    """The names, made different: those marked True stay, another that is taken gets the next free number."""
    taken = {name for name, fixed in names if fixed}
    result = []
    for name, fixed in names:
        free, number = name, 2
        while not fixed and free in taken:
            free, number = f"{name}_{number}", number + 1
        taken.add(free)
        result.append(free)
    return tuple(result)
