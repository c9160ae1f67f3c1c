"""What the command makes of its arguments, and how values look; nothing is asked of anyone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from blockferry.interfaces.cli import render, text, wire
from blockferry.interfaces.cli.main import cli
from blockferry.interfaces.cli.session import Rate, Session, absolute, disk_name
from blockferry.model import request as requests
from blockferry.model.flags import SnapshotCreate, SnapshotDelete
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish

Run = Callable[..., requests.Request]


class Asked(Exception):
    """Raised in place of asking."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command up to the point where it asks, and give the request, decoded as the service would."""
    monkeypatch.chdir(tmp_path)

    def submit(_state: object, request: dict[str, Any]) -> None:
        raise Asked(msgspec.convert(request, requests.Request))

    monkeypatch.setattr(wire, "submit", submit)

    def run(*arguments: str, stdin: str | None = None) -> requests.Request:
        result = invoke(*arguments, stdin=stdin)
        assert isinstance(result.exception, Asked), result
        request: requests.Request = result.exception.args[0]
        return request

    return run


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(arguments), obj=Session(), input=stdin)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[("0", 0), ("1", 1), ("1048576", 1 << 20), ("50M", 50 << 20), ("50m", 50 << 20), ("1G", 1 << 30)],
        *[("1.5K", 1536), ("2T", 2 << 40), ("50MiB", 50 << 20), ("50MB/s", 50 << 20), (".5K", 512), (" 7k ", 7168)],
    ],
)
def test_rates(written: str, value: int) -> None:
    assert Rate().convert(written, None, None) == value


@pytest.mark.parametrize("written", ["", "M", "fast", "-1", "1X", "1.2.3", "50 M", "²", "1e3", "nan", "."])
def test_what_is_no_rate(written: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a rate"):
        Rate().convert(written, None, None)


def test_paths_are_made_absolute_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a/../b") == f"{tmp_path}/b"
    assert absolute("/b") == "/b"
    assert absolute("nbd://host/export") == "nbd://host/export"
    assert disk_name("vda") == "vda"
    assert disk_name("./vda") == f"{tmp_path}/vda"
    assert disk_name("/machine/peripheral-anon/device[0]") == "/machine/peripheral-anon/device[0]"


def test_attach(asked: Run, tmp_path: Path) -> None:
    assert asked("attach", "vm1", "--qmp", "q") == requests.Attach(domain="vm1", qmp=f"{tmp_path}/q")
    assert asked("attach", "vm1", "--qmp", "/q", "--timeout", "1.5") == requests.Attach(
        domain="vm1", qmp="/q", timeout=1.5
    )


def test_snapshot_of_everything(asked: Run) -> None:
    wish = SnapshotWish()
    assert asked("snapshot", "create", "vm1") == requests.CreateSnapshot(domain="vm1", wish=wish)


def test_snapshot_with_disks_and_mirrors(asked: Run, tmp_path: Path) -> None:
    request = asked(
        *["snapshot", "create", "vm1", "s1", "--atomic", "--description", "why", "--dry-run"],
        *["--disk", "vda=/src/a.img", "--disk", "vdb", "--mirror", "vda=/dest/a.img", "--mirror", "b/base.img=c=d"],
    )
    disks = (
        DiskWish(name="vda", file="/src/a.img", mirror=MirrorWish(file="/dest/a.img")),
        DiskWish(name="vdb"),
        DiskWish(name=f"{tmp_path}/b/base.img", mirror=MirrorWish(file=f"{tmp_path}/c=d")),
    )
    wish = SnapshotWish(name="s1", description="why", disks=disks, only_these=True)
    assert request == requests.CreateSnapshot(domain="vm1", wish=wish, flags=int(SnapshotCreate.ATOMIC), dry_run=True)


def test_a_mirror_alone_leaves_no_disk_out(asked: Run) -> None:
    disks = (DiskWish(name="vda", mirror=MirrorWish(file="/dest/a.img")),)
    request = asked("snapshot", "create", "vm1", "--mirror", "vda=/dest/a.img")
    assert request == requests.CreateSnapshot(domain="vm1", wish=SnapshotWish(disks=disks, only_these=False))


def test_snapshot_from_xml(asked: Run, tmp_path: Path) -> None:
    (tmp_path / "s.xml").write_text("<domainsnapshot/>")
    from_file = asked("snapshot", "create", "vm1", "--xml", "s.xml")
    from_stdin = asked("snapshot", "create", "vm1", "--xml", "-", stdin="<domainsnapshot/>")
    assert from_file == from_stdin == requests.CreateSnapshot(domain="vm1", xml="<domainsnapshot/>")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--disk", "vda", "--disk", "vda=/x"],
        ["--disk", "vda="],
        ["--disk", "=/x"],
        ["--mirror", "vda"],
        ["--mirror", "vda=/x", "--mirror", "vda=/y"],
        ["--xml", "-", "--disk", "vda"],
    ],
)
def test_snapshots_that_are_refused_here(arguments: list[str]) -> None:
    assert invoke("snapshot", "create", "vm1", *arguments).exit_code == 2


@pytest.mark.parametrize(
    ("option", "flags"),
    [
        ([], SnapshotDelete(0)),
        (["--reopen-mirror"], SnapshotDelete.REOPEN_MIRROR),
        (["--remove-mirror"], SnapshotDelete.REMOVE_MIRROR),
        (["--metadata"], SnapshotDelete.METADATA_ONLY),
    ],
)
def test_snapshot_delete(asked: Run, option: list[str], flags: SnapshotDelete) -> None:
    request = asked("snapshot", "delete", "vm1", "s1", *option)
    assert request == requests.DeleteSnapshot(domain="vm1", snapshot="s1", flags=int(flags))


def test_snapshot_delete_takes_one_choice() -> None:
    assert invoke("snapshot", "delete", "vm1", "s1", "--metadata", "--reopen-mirror").exit_code == 2


def test_copy(asked: Run, tmp_path: Path) -> None:
    request = asked("copy", "vm1", "vda", "d.img", "--format", "raw", "--bandwidth", "50M")
    assert request == requests.StartCopy(
        domain="vm1", disk="vda", dest=f"{tmp_path}/d.img", format="raw", bandwidth=50 << 20
    )
    assert asked("copy", "vm1", "vda", "/d", "--dry-run") == requests.StartCopy(
        domain="vm1", disk="vda", dest="/d", dry_run=True
    )
    assert invoke("copy", "vm1", "vda", "/d", "--pivot", "--finish").exit_code == 2


def test_jobs(asked: Run) -> None:
    assert asked("job", "list", "vm1") == requests.ListJobs(domain="vm1")
    assert asked("job", "pivot", "vm1", "vda", "vdb", "--timeout", "5") == requests.PivotJobs(
        domain="vm1", disks=("vda", "vdb"), timeout=5.0
    )
    assert asked("job", "finish", "vm1", "vda") == requests.FinishJobs(domain="vm1", disks=("vda",))
    assert asked("job", "cancel", "vm1", "vda") == requests.CancelJobs(domain="vm1", disks=("vda",))
    assert asked("job", "speed", "vm1", "vda", "1G") == requests.SetJobSpeed(
        domain="vm1", disk="vda", bandwidth=1 << 30
    )


def test_history(asked: Run) -> None:
    assert asked("events", "vm1", "--since", "4") == requests.ListEvents(domain="vm1", since=4)
    assert asked("operations") == requests.ListOperations()
    assert asked("operations", "--json") == requests.ListOperations()
    assert asked("operations", "vm1") == requests.ListOperations(domain="vm1")
    assert asked("operations", "show", "7", "--json") == requests.ShowOperation(operation=7)
    assert asked("recover") == requests.Recover()


@pytest.mark.parametrize(
    ("count", "words"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (10 << 30, "10.0 GiB"), (3 << 50, "3.0 PiB")],
)
def test_sizes(count: int | None, words: str) -> None:
    assert text.size(count) == words


@pytest.mark.parametrize(("seconds", "words"), [(None, "-"), (0.4, "0:00"), (31, "0:31"), (3720, "1:02:00")])
def test_durations(seconds: float | None, words: str) -> None:
    assert text.duration(seconds) == words


def test_percent_is_100_only_at_the_end() -> None:
    assert [text.percent(*pair) for pair in [(0, 0), (999, 1000), (1000, 1000), (1, 3)]] == [
        "100 %",
        "99 %",
        "100 %",
        "33 %",
    ]


def test_a_table_lines_up_in_colour_too() -> None:
    drawn = text.table([["a", text.paint("running"), "x"], ["bbb", text.paint("gone"), "y"]], ("N", "STATE", ""))
    assert click.unstyle(drawn).splitlines() == ["N    STATE", "a    running  x", "bbb  gone     y"]
    assert text.table([], ("N",)) == ""


def test_a_chain_is_drawn_from_the_active_image_down() -> None:
    images = [{"file": f"/{name}", "format": "qcow2"} for name in ("snap", "mid", "base")]
    mirror = {"file": "/dest", "format": "qcow2", "state": "copying", "current": 1, "total": 4, "snapshot": "s1"}
    disk = {"target": "vda", "bus": "virtio", "virtual_size": 1024, "qdev": "d0", "read_only": False, "source": "/snap"}
    view = {"name": "vm1", "state": "running", "pid": 42, "qemu": "7.2", "current_snapshot": None, "qmp": "/q"}
    view |= {"reason": None, "disks": [{**disk, "chain": images, "mirror": {**mirror, "reason": None}}]}
    assert click.unstyle(render.domain(view)).splitlines()[2:] == [
        "",
        "vda  virtio  1.0 KiB  d0",
        "  /snap  qcow2",
        "  <- /mid  qcow2",
        "     <- /base  qcow2",
        "  => /dest  qcow2  mirror  copying  25 %  of snapshot s1",
    ]


def test_json_of_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from blockferry.interfaces.cli.main import main

    monkeypatch.setattr("sys.argv", ["blockferry", "show", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["exit_status"]) == ("usage", 2)
