"""`raftune demo`: aligns a bundled model; `demo hacking` shows what a flawed reward does."""

from __future__ import annotations

import json as js
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from raftune.cli.demo_text import by_round, show_typical, typical_by_round
from raftune.cli.output import echo
from raftune.cli.run_command import go, outcome_json, outcome_words
from raftune.config.load import merge, read_yaml, validate
from raftune.config.run import RunConfig, held_out_names
from raftune.errors import ConfigError
from raftune.results.summary import rows_of
from raftune.runtime.run import root_of

Which = Literal["text", "hacking", "image"]
RECIPES: dict[Which, str] = {"text": "text/demo.yaml", "hacking": "text/hacking.yaml", "image": "image/image.yaml"}


def demo(
    which: Annotated[
        Which,
        Parameter(
            name="WHICH",
            help="text; hacking: a flawed reward, and the alarm; image: with images.",
        ),
    ] = "text",
    *,
    output_dir: Annotated[
        str | None, Parameter(show_default=False, help="The run's directory; default: runs/demo, hacking or image.")
    ] = None,
    fresh: Annotated[
        bool, Parameter(negative="", show_default=False, help="Start a new run beside an earlier one.")
    ] = False,
    num_rounds: Annotated[
        int | None, Parameter(show_default=False, help="Rounds, at least 1; default: the demo's own number.")
    ] = None,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the result as JSON.")] = False,
) -> None:
    """Align the bundled model and show the result: under a minute on two CPU cores, no network.

    raftune demo
    raftune demo hacking
    raftune demo image

    A tiny assistant, rude and unhelpful half of the time, is trained with a small reward model; a judge that is never
    trained on evaluates it. With `hacking` the reward counts courteous phrases, and the policy exploits it. With
    `image` a tiny diffusion pipeline that was trained on wrong captions learns to follow captions, in two to three
    minutes. Each demo is a normal run: every command works on it.
    """
    place = output_dir or f"runs/{Path(RECIPES[which]).stem}"
    config = recipe(unused(place) if fresh else place, which)
    if num_rounds is not None:
        if num_rounds < 1:
            raise ConfigError(f"--num-rounds must be at least 1; got {num_rounds}. Leave it out for the whole demo.")
        config = config.model_copy(update={"num_rounds": num_rounds})
    outcome, worked = go(config)
    root = root_of(config)
    if which == "hacking":
        from raftune.cli.demo_hacking import tell

        tell(root, config, outcome, worked, as_json=json)
        return
    if which == "image":
        from raftune.cli.demo_images import tell

        tell(root, config, outcome, worked, as_json=json)
        return
    shown = typical_by_round(root, config, {"before": 0, "after": outcome.best})
    if json:
        print(js.dumps(outcome_json(root, outcome, worked) | {"by_round": rows_of(root), "shown": shown}))
        return
    by_round(root, held_out_names(config))
    show_typical(shown, ("before", "after"))
    echo("")
    for line in [*outcome_words(root, outcome, worked), "  again     raftune demo --fresh"]:
        echo(line)


def recipe(output_dir: str, which: Which = "text") -> RunConfig:
    """A demonstration's configuration, from the file that the package brings along."""
    with resources.as_file(resources.files("raftune.starters") / RECIPES[which]) as path:
        return validate(merge([read_yaml(path), {"output_dir": output_dir}]))


def unused(output_dir: str) -> str:
    """The directory, or the first of DIR-2, DIR-3, … that does not exist."""
    path, number = Path(output_dir), 1
    while path.exists():
        number += 1
        path = Path(f"{output_dir}-{number}")
    return str(path)
