"""`raftune init`: writes a commented configuration."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from raftune.cli.flags import switch
from raftune.cli.output import echo
from raftune.errors import ConfigError
from raftune.sanitize import shell_command


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
