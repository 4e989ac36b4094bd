"""Every flag of every command may be written with `-` or with `_` between its words."""

import argparse
import re
from collections.abc import Iterator

import pytest

from forge.cli.main import _parser, main


def leaf_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands, those within `forge config` too."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield parser
    for action in nested:
        for below in action.choices.values():
            yield from leaf_parsers(below)


def flags() -> list[tuple[str, str]]:
    """(command, flag) of every flag of more than one word."""
    return [
        (parser.prog, flag)
        for parser in leaf_parsers(_parser())
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--") and re.search("[-_]", flag[2:])
    ]


@pytest.mark.parametrize(("command", "flag"), flags())
@pytest.mark.parametrize("separator", ["-", "_"])
@pytest.mark.parametrize("equals", [True, False])
def test_a_flag_takes_both_separators_of_words(command: str, flag: str, separator: str, equals: bool) -> None:
    parser = next(parser for parser in leaf_parsers(_parser()) if parser.prog == command)
    action = parser._option_string_actions[flag]
    for other in [*parser._actions, *parser._mutually_exclusive_groups]:
        other.required = False
    parser._actions = [other for other in parser._actions if other.option_strings]  # the flag alone is judged
    words = re.split("[-_]", flag.removeprefix("--"))
    spelt = f"--{separator.join(words)}"
    value = [] if action.nargs == 0 else ["keep_this-value"]
    given = [f"{spelt}={value[0]}"] if equals and value else [spelt, *value]
    found = getattr(parser.parse_args(given), action.dest)
    assert found == (True if not value else value if isinstance(action, argparse._AppendAction) else value[0])


def test_flags_of_two_words_are_there_to_be_tested() -> None:
    assert {("forge train", "--run_name"), ("forge resume", "--allow-change"), ("forge launch", "--take-over")} <= set(
        flags()
    )


@pytest.mark.parametrize("given", ["--run-nam=x", "--max__steps=1", "-run-name=x"])
def test_an_unknown_flag_is_shown_as_it_was_given(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--config", "x.yaml", given])
    assert left.value.code == 2
    assert given.partition("=")[0] in capsys.readouterr().err
