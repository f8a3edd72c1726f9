"""The pages of the site that are generated: the configuration reference, and the check of public names."""

from __future__ import annotations

import re

import yaml

from raftune.config.run import RunConfig
from tools.docs_site import DOCS, ROOT, configuration, decisions

PAGE = configuration()


def test_every_section_and_every_field_of_the_configuration_is_on_the_page() -> None:
    schema = RunConfig.model_json_schema()
    fields = {name for section in (schema, *schema["$defs"].values()) for name in section.get("properties", {})}
    assert fields <= set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE))


def test_every_link_of_the_page_leads_to_one_of_its_sections() -> None:
    anchors = re.findall(r"\{ #(\w+) \}", PAGE)
    assert len(anchors) == len({*anchors})
    assert {*re.findall(r"\]\(#(\w+)\)", PAGE)} <= {*anchors}


def test_rows_of_the_tables_have_four_cells() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_every_decision_is_listed() -> None:
    assert decisions().count("](0") == len([*DOCS.glob("decisions/0*.md")])


def test_every_page_has_a_place_in_the_navigation() -> None:
    def paths(nav: object) -> list[str]:
        items = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else []
        return [nav] if isinstance(nav, str) else [path for item in items for path in paths(item)]

    listed = {*paths(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])}
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert {page for page in pages if not page.startswith("decisions/")} <= listed
