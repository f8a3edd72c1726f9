"""The run directory: layout, atomic commits, verification, lock."""

from raftune.store.commit import Commit, stage_key
from raftune.store.files import sha256_of, stage_file, write_json
from raftune.store.run import RunFolder

__all__ = ["Commit", "RunFolder", "sha256_of", "stage_file", "stage_key", "write_json"]
