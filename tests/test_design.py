"""docs/design.md names every file of the code, once, and nothing else."""

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"^( *)(\S+?)(/?)(?:  +(\S.*))?$")


def test_the_tree_in_the_design_document_is_the_tree_of_the_code() -> None:
    listed = listed_files((REPO / "docs" / "design.md").read_text())
    there = {str(file.relative_to(REPO)) for file in (REPO / "forge").rglob("*.py") if file.name != "__init__.py"}
    there |= {"forge/__init__.py", "forge.py"}
    assert sorted(set(listed) - there) == []
    assert sorted(there - set(listed)) == []
    assert [file for file in listed if listed.count(file) > 1] == []


def test_a_tree_is_read_by_its_indentation() -> None:
    text = "# Design\n\n```tree\na.py  first\nb/\n  c.py  second file\n  d/\n    e.py  third\n  f.py  fourth\n```\n"
    assert listed_files(text) == ["a.py", "b/c.py", "b/d/e.py", "b/f.py"]


def listed_files(text: str) -> list[str]:
    """The files of the block `tree`, each of which has a few words."""
    block = text.split("```tree\n")[1].split("```")[0]
    files: list[str] = []
    folders: list[str] = []
    for line in block.splitlines():
        found = ENTRY.match(line)
        assert found, line
        indent, name, is_folder, words = found.groups()
        folders = folders[: len(indent) // 2]
        if is_folder:
            folders.append(name)
        else:
            assert words, f"{line}: a few words are missing"
            files.append("/".join([*folders, name]))
    return files
