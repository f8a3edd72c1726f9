"""Hooks of mkdocs: generated pages, links to files outside docs/, and a check that public names are documented.

mkdocs.yml names this file. `python tools/docs_site.py` prints the configuration reference.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
API, CONFIGURATION, DECISIONS = "reference/api.md", "reference/configuration.md", "decisions/index.md"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?!https?:|#|mailto:)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


# -- the configuration -------------------------------------------------------------------------------------------------


def configuration() -> str:
    """The configuration reference as Markdown: one table of fields for each section of the schema."""
    sys.path.insert(0, str(ROOT))
    from raftune.config.run import RunConfig

    schema = RunConfig.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    sections = dict(titles(schema, definitions))
    lines = [
        "# Configuration",
        "",
        "Every field of `run.yaml`. On the command line a field is a flag: `--num_rounds 4`.",
        "`raftune schema` prints the same as JSON schema, by which editors check YAML.",
        "",
        "## The top level",
        "",
        *table(schema, sections),
    ]
    for name, title in sections.items():
        section = definitions[name]
        lines += ["", f"## {title} {{ #{name.lower()} }}", "", summary(section), "", *table(section, sections)]
    return "\n".join(lines) + "\n"


def titles(schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The definitions that are sections, depth first, each with the dotted path that leads to it."""
    for field, value in schema.get("properties", {}).items():
        for name in references(value):
            if "properties" in definitions[name]:
                label = definitions[name]["title"]
                variants = [other for other in references(value) if "properties" in definitions[other]]
                yield name, f"`{prefix}{field}`" + (f" ({label})" if len(variants) > 1 else "")
                yield from titles(definitions[name], definitions, f"{prefix}{field}.")


def references(value: Any) -> list[str]:
    """The names of all definitions that a field's schema refers to, in order."""
    if isinstance(value, dict):
        own = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
        nested = [name for key, item in value.items() if key != "discriminator" for name in references(item)]
        return list(dict.fromkeys([*own, *nested]))
    return [name for item in value for name in references(item)] if isinstance(value, list) else []


def table(section: Mapping[str, Any], sections: Mapping[str, str]) -> list[str]:
    """A table of the section's fields: name, type, default, meaning."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    required = section.get("required", [])
    for field, value in section.get("properties", {}).items():
        named = [name for name in references(value) if name in sections]
        words = {name: re.findall(r"\((.*)\)", sections[name]) or ["section"] for name in named}
        kind = " or ".join(f"[{words[name][0]}](#{name.lower()})" for name in named)
        default = "required" if field in required else code(value["default"]) if "default" in value else ""
        cells = (f"`{field}`", kind or type_of(value), "" if kind else default, summary(value))
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return lines


def type_of(value: Mapping[str, Any]) -> str:
    """A field's type in words."""
    if "enum" in value:
        return ", ".join(code(item) for item in value["enum"])
    if "const" in value:
        return code(value["const"])
    if options := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(dict.fromkeys(type_of(option) for option in options))
    if value.get("type") == "array":
        return f"list of {type_of(value.get('items', {}))}"
    names = {"string": "text", "boolean": "true or false", "object": "mapping", "null": "null"}
    kinds = value.get("type", "any")
    return " or ".join(names.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds))


def code(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def summary(value: Mapping[str, Any]) -> str:
    return " ".join(str(value.get("description", "")).split())


# -- the decisions -----------------------------------------------------------------------------------------------------


def decisions() -> str:
    """A list of the decisions by number."""
    pages = sorted((DOCS / "decisions").glob("[0-9]*.md"))
    heads = [path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for path in pages]
    lines = [f"- [{head}]({path.name})" for path, head in zip(pages, heads, strict=True)]
    return "\n".join(["# Decisions", "", "Design choices and their reasons.", "", *lines, ""])


# -- public names ------------------------------------------------------------------------------------------------------


def undocumented(page: str) -> list[str]:
    """What is wrong with the API reference: public names that it lacks, and names and methods without a docstring."""
    import griffe

    package = griffe.load("raftune", search_paths=[str(ROOT)])
    shown = re.findall(r"^::: ([\w.]+)", page, flags=re.MULTILINE)
    public = [f"raftune.{name}" for name in package.exports or ()]
    faults = [f"{name} is public and missing from {API}" for name in public if name not in shown]
    for name in shown:
        item: Any = package[name.removeprefix("raftune.")] if name != "raftune" else package
        item = item.final_target if item.is_alias else item
        members = item.members.values() if item.is_class else ()
        methods = [m for m in members if m.is_function and not m.name.startswith("_")]
        faults += [f"{each.path} has no docstring" for each in (item, *methods) if not each.has_docstring]
    return faults


# -- the hooks ---------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for path, content in ((CONFIGURATION, configuration()), (DECISIONS, decisions())):
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Checks the API reference. Turns links to files outside docs/ into links to the repository, if there is one."""
    from mkdocs.exceptions import PluginError

    if page.file.src_uri == API and (faults := undocumented(markdown)):
        raise PluginError("\n".join(faults))

    def outward(match: re.Match[str]) -> str:
        path = (DOCS / Path(page.file.src_uri).parent / match["path"]).resolve()
        if path.is_relative_to(DOCS) and not path.is_dir():
            return match[0]  # mkdocs follows these, and reports those that are broken
        if not path.exists():
            raise PluginError(f"{page.file.src_uri} links to {match['path']}, which does not exist")
        if not config.repo_url:
            return match["text"]
        url = f"{config.repo_url.rstrip('/')}/blob/main/{path.relative_to(ROOT).as_posix()}"
        return f"[{match['text']}]({url}{match['anchor'] or ''})"

    return LINK.sub(outward, markdown)


if __name__ == "__main__":
    print(configuration(), end="")
