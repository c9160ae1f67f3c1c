"""The docs are complete: every command, option, error and view is in them, and what they show is true."""

import dataclasses
import json
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner

import blockferry
from blockferry import errors
from blockferry.interfaces.api.status import http_status
from blockferry.interfaces.cli import wire
from blockferry.interfaces.cli.history import LISTING
from blockferry.interfaces.cli.main import VERBS, cli
from blockferry.interfaces.cli.session import Session
from blockferry.model import view as views

DOCS = Path(__file__).parents[2] / "docs"


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by its words: `snapshot create`."""

    def below(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        if not isinstance(command, click.Group):
            yield words, command
            return
        for name in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), name)
            assert found is not None
            yield from below(words if name == LISTING else f"{words} {name}".strip(), found)

    return below("", cli)


COMMANDS = dict(commands())
KINDS = {cls.__struct_config__.tag: cls for cls in typing.get_args(views.View)}


def examples() -> dict[str, list[dict[str, object]]]:
    """The JSON blocks of json.md by their kind."""
    found: dict[str, list[dict[str, object]]] = {}
    for block in re.findall(r"```json\n(.*?)```", (DOCS / "json.md").read_text(), re.DOTALL):
        value = json.loads(block)
        found.setdefault(value["kind"], []).append(value)
    return found


# --- commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_a_page(words: str) -> None:
    page = (DOCS / "commands" / f"{words.replace(' ', '-')}.md").read_text()
    assert page.startswith(f"# blockferry {words}\n")
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## Example", "## The guest", "## Errors"]
    for parameter in COMMANDS[words].params:
        if isinstance(parameter, click.Option):
            assert f"`{parameter.opts[0]}" in page, "every option is explained"
    shown = page.split("## Example")[1].split("## The guest")[0]
    assert "blockferry " in shown
    for code in re.findall(r"`([a-z-]+)`", page.split("## Errors")[1]):
        assert code in errors.BY_CODE


def test_every_page_has_a_command() -> None:
    assert {page.stem.replace("-", " ") for page in (DOCS / "commands").iterdir()} == set(COMMANDS)


@pytest.mark.parametrize("words", ["", "snapshot", "job", "operations", *COMMANDS])
def test_every_help_text_has_an_example(words: str) -> None:
    command: click.Command = cli
    for word in words.split():
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None
        command = found
    context = click.Context(command, info_name=f"blockferry {words}".strip())
    text = command.get_help(context)
    assert "Example:\n    blockferry" in text or 'Example:\n    eval "$(blockferry' in text
    assert all(parameter.help for parameter in command.params if isinstance(parameter, click.Option))


def test_every_command_takes_json() -> None:
    for words, command in COMMANDS.items():
        assert any("--json" in parameter.opts for parameter in command.params), words


def test_the_list_of_verbs_says_what_they_say_themselves() -> None:
    for verb, (_module, summary) in VERBS.items():
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        assert (command.help or "").splitlines()[0] == summary


class Asked(Exception):
    """Raised in place of asking the host process."""


def test_examples_in_help_texts_are_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ask(*_arguments: object) -> None:
        raise Asked

    monkeypatch.chdir(tmp_path)
    for name in ("snapshot.xml", "vm1.xml"):
        (tmp_path / name).touch()
    for function in (wire, "submit"), (wire, "events"), (os, "execv"):
        monkeypatch.setattr(*function, ask)
    for command in [cli, *COMMANDS.values()]:
        for line in (command.epilog or "").splitlines():
            if line.startswith("  blockferry"):
                words = line.split("|")[0].split()[1:]
                result = CliRunner().invoke(cli, words, obj=Session())
                assert isinstance(result.exception, Asked) or result.exit_code == 0, result.output


# --- errors ---------------------------------------------------------------------------------------------------


def tree(cls: type[errors.BlockferryError]) -> Iterator[type[errors.BlockferryError]]:
    for below in cls.__subclasses__():
        yield below
        yield from tree(below)


LEAVES = [cls for cls in tree(errors.BlockferryError) if not cls.__subclasses__()]


def test_error_codes_and_exit_statuses_are_unique() -> None:
    assert len({cls.code for cls in LEAVES}) == len(LEAVES) == len(errors.BY_CODE)
    statuses = {cls.exit_status for cls in LEAVES}
    assert len(statuses) == len(LEAVES)
    # 0 is done, 1 Python's own, 2 a usage error, from 125 on the shell's.
    assert all(2 < status < 125 for status in statuses)


@pytest.mark.parametrize("cls", LEAVES, ids=lambda cls: cls.code)
def test_every_error_is_documented(cls: type[errors.BlockferryError]) -> None:
    assert cls.__doc__
    assert cls.outcome in {"refused", "failed", "unknown"}
    error = cls(**{field.name: 0 for field in dataclasses.fields(cls)})
    assert error.message, "the template has no other names than the fields"
    assert errors.from_dict(error.to_dict()).to_dict() == error.to_dict()
    row = f"| `{cls.code}` | {cls.exit_status} | {cls.outcome} | {http_status(error)} | {cls.template} |"
    (line,) = [line for line in (DOCS / "errors.md").read_text().splitlines() if line.startswith(f"| `{cls.code}`")]
    assert line.startswith(row)
    assert len(line) > len(row) + 10, "what to do"


def test_no_error_is_documented_that_is_none() -> None:
    rows = re.findall(r"^\| `([a-z-]+)`", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert set(rows) == set(errors.BY_CODE)


# --- JSON -----------------------------------------------------------------------------------------------------


def test_every_kind_is_documented() -> None:
    assert set(examples()) == set(KINDS) | {"error", "serving", "completion", "health"}


@pytest.mark.parametrize("kind", KINDS)
def test_examples_of_json_are_true(kind: str) -> None:
    for example in examples()[kind]:
        value = msgspec.convert(example, views.View)
        # Every member is shown: encoded again, it is the same object.
        assert json.loads(msgspec.json.encode(value)) == example
        assert example["version"] == views.VERSION


def test_the_error_example_is_one() -> None:
    (example,) = examples()["error"]
    error = example["error"]
    assert isinstance(error, dict)
    assert errors.from_dict(error).to_dict() == error


# --- public names ---------------------------------------------------------------------------------------------


def test_public_names_are_documented() -> None:
    assert len(blockferry.__all__) <= 15
    for name in blockferry.__all__:
        public = getattr(blockferry, name)
        assert public.__doc__, name
        if isinstance(public, type):
            for attribute, value in vars(public).items():
                if callable(value) and not attribute.startswith("_"):
                    assert value.__doc__, f"{name}.{attribute}"
