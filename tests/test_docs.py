"""The pages for people keep to the width, link to what exists, and use the current names and words."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])
WIDTH = 120
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
FORMER_NAMES = ("evaluation.max_samples", "evaluation.samples", "samples_per_second", "split/samples")
FORMER_WORDS = ("go on with", "goes on", "gone on", "likeliest", "anew", "afresh", "begun", "whoever")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_wider_than_120_characters(page: Path) -> None:
    lines = page.read_text().splitlines()
    wide = [f"{number}: {len(line)}" for number, line in enumerate(lines, start=1) if len(line) > WIDTH]
    assert wide == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading_in_it(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_uses_a_former_name(page: Path) -> None:
    # The list of changes has to say what was renamed.
    former = FORMER_WORDS if page.name == "CHANGELOG.md" else (*FORMER_WORDS, *FORMER_NAMES)
    text = " ".join(page.read_text().lower().split())  # a line break may be in the middle of `go on with`
    assert [name for name in former if re.search(rf"\b{re.escape(name)}\b", text)] == []


def test_every_page_is_in_the_reading_order() -> None:
    listed = {target for target in LINK.findall((REPO / "docs" / "README.md").read_text()) if target.endswith(".md")}
    assert listed >= {page.name for page in (REPO / "docs").glob("*.md")} - {"README.md"}


def test_a_link_to_a_file_or_a_heading_that_does_not_exist_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A title\n\n## The KL, of `x`\n")
    page = tmp_path / "page.md"
    good = "[a](other.md) [b](other.md#the-kl-of-x) [c](#page) [d](https://x.org/y)"
    page.write_text(f"# Page\n{good}\n[e](none.md) [f](other.md#no)\n")
    assert broken_links(page) == ["none.md", "other.md#no"]


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page whose file, or whose heading in that file, does not exist."""
    broken = []
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (heading and heading not in anchors(file)):
            broken.append(target)
    return broken


def anchors(file: Path) -> list[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    titles = HEADING.findall(file.read_text())
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
