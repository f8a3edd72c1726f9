"""`raftune schema`: prints the JSON schema of the configuration."""

from __future__ import annotations

import json

from raftune.config.run import RunConfig


def schema() -> None:
    """Print the JSON schema of the configuration: every field with type, default and description.

    raftune schema > raftune.schema.json     editors check YAML against it
    """
    print(json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False))
