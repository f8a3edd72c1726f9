"""Under which configuration a run was made, from what, with what, and how long it took."""

from __future__ import annotations

from raftune.report.collect import Collected
from raftune.report.markup import block, text


def configuration(found: Collected) -> str:
    """The configuration as it was written."""
    path = found.reader.run.root / "config.yaml"
    written = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "(missing)"
    return block("config", "Configuration", f"<pre><code>{text(written)}</code></pre>")
