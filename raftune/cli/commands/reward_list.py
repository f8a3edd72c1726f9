"""`raftune reward list`: lists the built-in rewards with their options and an example each."""

from __future__ import annotations

import dataclasses
import json as js
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from raftune.cli.output import PlainTable, echo
from raftune.errors import ConfigError
from raftune.sanitize import shell_command

if TYPE_CHECKING:
    from raftune.rewards.registry import BuiltinReward, RewardOption

MEDIA = {"text": "texts", "messages": "conversations", "image": "images"}
TYPES = {"str": "text", "int": "integer", "float": "number", "bool": "true | false"}
OTHERS = (
    ("FILE.py:FUNCTION", "A function of yours, with TRL's signature: completions in, a number each out."),
    ("MODULE:FUNCTION", "The same, of an installed package."),
    ("FOLDER or OWNER/NAME", "A reward model or a CLIPModel: what `raftune reward train` wrote, or one of the hub."),
    ("starter", "The bundled reward model of the bundled texts; for images the bundled CLIP score."),
    ("starter:judge", "The bundled judge of the same texts or images, by rules; `raftune demo` holds it out."),
)
PAGE = """\
# Built-in rewards

<!-- Written by `raftune reward list --markdown`. A test compares the two. -->

`raftune reward list` prints this page's contents, and `raftune reward check NAME` tries a reward before a run depends
on it. A reward is named in `rewards.reward_funcs`, by its name alone or with options. Several are added up by their
weights:

```yaml
rewards:
  reward_funcs:
    - {spec: length, options: {target: 20}}
    - {spec: repetition, weight: 0.5}
```

On the command line: `--rewards.reward_funcs '[{spec: length, options: {target: 20}}]'`.
"""


def list_rewards(
    name: Annotated[str | None, Parameter(help="Only this reward.")] = None,
    *,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print a JSON list.")] = False,
    markdown: Annotated[bool, Parameter(negative="", show_default=False, help="Print a page of Markdown.")] = False,
) -> None:
    """List the built-in rewards: what each measures, its options, and an example.

    raftune reward list
    raftune reward list length
    """
    from raftune.rewards.registry import BUILT_IN, nearest
    from raftune.rewards.resolve import SHORT_NAMES

    if name is not None and name not in BUILT_IN:
        near = nearest(name, list(BUILT_IN))
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(sorted(BUILT_IN))}."
        raise ConfigError(f"NAME must be a built-in reward; got {name!r}; {hint}")
    rewards = sorted(BUILT_IN.values(), key=lambda reward: (scored(reward), reward.name))
    rewards = rewards if name is None else [BUILT_IN[name]]
    if json:
        print(js.dumps([as_dict(reward) for reward in rewards]))
    elif markdown:
        print(page(rewards, SHORT_NAMES), end="")
    else:
        for reward in rewards:
            show(reward)
        if name is None:
            echo("Also taken as a reward", style="bold")
            show_pairs([*OTHERS, (", ".join(SHORT_NAMES), "Functions of trl.rewards.")])


def as_dict(reward: BuiltinReward) -> dict[str, Any]:
    return {
        "name": reward.name,
        "media": list(reward.media),
        "summary": reward.summary,
        "details": reward.details,
        "options": [dataclasses.asdict(option) | {"type": in_words(option.type)} for option in reward.option_list()],
        "example": {"spec": reward.name, "options": dict(reward.example)},
        "command": try_it(reward),
    }


def show(reward: BuiltinReward) -> None:
    echo(f"{reward.name} ({scored(reward)})", style="bold")
    for text in (reward.summary, *reward.details):
        echo(f"  {text}")
    show_pairs([(option.name, f"{option.meaning} {in_brackets(option)}") for option in reward.option_list()])
    echo(f"  example  {example(reward)}")
    echo(f"  try it   {try_it(reward)}")
    echo("")


def show_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    grid = PlainTable("", "", "")
    grid.rows.clear()
    for left, right in pairs:
        grid.add("", left, right)
    grid.show()


def page(rewards: Iterable[BuiltinReward], of_trl: Iterable[str]) -> str:
    """The built-in rewards as a page of Markdown."""
    parts = [PAGE]
    for reward in rewards:
        parts.append(f"\n## {reward.name}\n\nOf {scored(reward)}. {reward.summary}\n")
        parts += [f"\n{text}\n" for text in reward.details]
        if options := reward.option_list():
            parts.append("\n| option | type | default | meaning |\n|---|---|---|---|\n")
            for option in options:
                cells = (f"`{option.name}`", in_words(option.type), default(option), option.meaning)
                parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
        parts.append(f"\n```yaml\nreward_funcs: [{example(reward)}]\n```\n")
        parts.append(f"\n```sh\n{try_it(reward)}\n```\n")
    parts.append("\n## Others\n\n| spec | reward |\n|---|---|\n")
    others = [*OTHERS, *((short, "The function of trl.rewards.") for short in of_trl)]
    parts += [f"| `{spec}` | {meaning} |\n" for spec, meaning in others]
    return "".join(parts)


def scored(reward: BuiltinReward) -> str:
    """What it scores, in words."""
    words = [words for medium, words in MEDIA.items() if medium in reward.media]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def example(reward: BuiltinReward) -> str:
    """An entry of reward_funcs, as YAML on one line."""
    if not reward.example:
        return reward.name
    return f"{{spec: {reward.name}, options: {js.dumps(dict(reward.example), ensure_ascii=False)}}}"


def try_it(reward: BuiltinReward) -> str:
    """A command that tries the example."""
    words = ["raftune", "reward", "check", reward.name]
    if reward.name == "answer":
        words += ["--samples", "answers.jsonl"]  # it reads a column, which our own samples lack
    elif reward.media == ("image",):
        words += ["--images"]
    return shell_command(*words, *(["--options", js.dumps(dict(reward.example))] if reward.example else []))


def in_brackets(option: RewardOption) -> str:
    return f"[{in_words(option.type)}; {'required' if option.required else f'default {default(option)}'}]"


def default(option: RewardOption) -> str:
    return "required" if option.required else js.dumps(option.default).strip('"') or '""'


def in_words(kind: str) -> str:
    """The type as YAML has it: `number | null` for `float | None`."""
    return " | ".join(
        " of ".join(TYPES.get(word, word) for word in part.split(" of ")) for part in kind.split(" | ")
    ).replace("tuple of", "list of")
