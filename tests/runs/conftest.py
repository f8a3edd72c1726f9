"""Fixtures of several files of tests on whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.runs.report_pages import Opened


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    from tests.runs import report_pages

    with report_pages.browser() as started:
        yield started


@pytest.fixture
def opened(chromium: Browser, file: Path) -> Iterator[Opened]:
    """The module's page; what it complains of fails the test."""
    from tests.runs.report_pages import Opened

    with Opened(chromium, file) as page:
        yield page
        assert page.complaints == []
