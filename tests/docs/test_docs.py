"""What the docs show is what the programs print and what the tables say."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def test_generated_parts_are_up_to_date() -> None:
    """Runs every lesson, and compares its output, its listing and the diagrams with the pages."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=lambda path: path.name)
def test_a_recorded_picture_is_shown_has_a_title_and_suits_dark_pages(picture: Path) -> None:
    svg = ET.parse(picture).getroot()
    assert svg.findtext("{http://www.w3.org/2000/svg}title")
    style = svg.findtext("{http://www.w3.org/2000/svg}style", "")
    assert "prefers-color-scheme: dark" in style
    # Both sets of colours have all of them.
    light, dark = (set(re.findall(r"(--\w+):", colours)) for colours in re.findall(r"svg \{(.*?)\}", style, re.DOTALL))
    assert light == dark == set(re.findall(r"var\((--\w+)\)", style))
    assert any(f"images/{picture.name}" in page.read_text() for page in PAGES), f"{picture.name} is in no page"
