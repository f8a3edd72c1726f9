"""`raftune init`, `raftune starter` and `raftune schema`: files to start from."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from raftune.cli.flags import Json, switch
from raftune.cli.output import echo
from raftune.config.run import RunConfig
from raftune.errors import ConfigError
from raftune.sanitize import shell_command

CONTENTS = {
    "preferences.jsonl": "prompt, chosen, rejected",
    "ratings.jsonl": "prompt, completion, score",
    "prompts.jsonl": "what the rounds generate completions to",
    "held_out.jsonl": "requests that none of the others has, with reference completions",
}


def init(
    file: Annotated[str, Parameter(help="Where to write it.")] = "run.yaml",
    *,
    images: Annotated[bool, switch("For a diffusion pipeline.")] = False,
) -> None:
    """Write a commented configuration that runs on the bundled model, as a template for yours.

    raftune init run.yaml
    raftune init images.yaml --images
    """
    path = Path(file)
    template = "init_images.yaml" if images else "init.yaml"
    text = (resources.files("raftune.cli") / template).read_text(encoding="utf-8")
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in path.stem).strip("._-") or "run"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text.replace("NAME", name))
    except FileExistsError as error:
        raise ConfigError(f"{path} exists already, and is not overwritten. Name another file.") from error
    echo(f"Wrote {path}. Next:", *(f"  {shell_command('raftune', command, path)}" for command in ("plan", "train")))


def starter(
    directory: Annotated[str, Parameter(help="An empty or new folder.")],
    *,
    rows: Annotated[int, Parameter(help="Number of preferences, and of ratings.", validator=Number(gte=10))] = 2000,
    seed: Annotated[int, Parameter(help="Seed of the rows.")] = 0,
    as_json: Json = False,
) -> None:
    """Write example preferences, ratings and prompts, and print the commands that use them.

    The replies of the bundled assistant are good, rude, curt or off topic. The simulated annotators err: one preference
    in twenty is swapped, and ratings are off by some tenths. No network.
    """
    from raftune.starters.text.preferences import write_starter

    folder = Path(directory)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"DIRECTORY must be empty, or not exist yet; {folder} is not. Choose another name.")
    counts = write_starter(folder, rows, seed)
    if as_json:
        print(json.dumps({"directory": str(folder), "rows": counts, "commands": commands(folder)}))
        return
    echo(f"Wrote {folder}:", *(f"  {name:<18}{count:>6,} rows   {CONTENTS[name]}" for name, count in counts.items()))
    echo(f"  {'run.yaml':<18}{'':>11}   the run that comes after", "", "Next, one after another:")
    echo(*(f"  {shell_command(*words)}" for words in commands(folder)))


def commands(folder: Path) -> list[list[str]]:
    preferences, run, before = (str(folder / name) for name in ("preferences.jsonl", "run", "before"))
    threads = ["--threads", "1"]  # with models this small more threads are slower
    training = ["--policy.model", "starter", "--training.learning_rate", "5e-4", *threads]
    reward = ["--model", "starter", "--output-dir", str(folder / "reward"), *threads]
    return [
        ["raftune", "sft", preferences, *training, "--output-dir", str(folder / "sft")],
        ["raftune", "reward", "train", preferences, *reward],
        ["raftune", "train", str(folder / "run.yaml")],
        ["raftune", "evaluate", "starter", str(folder / "run.yaml"), "--output-dir", before],
        ["raftune", "compare", run, before, "--show", "2"],
        ["raftune", "report", run],
    ]


def schema() -> None:
    """Print the JSON schema of the configuration: every field with type, default and description.

    raftune schema > raftune.schema.json     editors check YAML against it
    """
    print(json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False))
