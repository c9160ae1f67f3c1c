"""What the command makes of its arguments, and how values look; nothing is asked of anyone."""

import itertools
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
from blockferry.interfaces.cli.session import Rate, Session, Size, absolute, disk_name
from blockferry.model import request as requests
from blockferry.model.flags import BlockCopy, SnapshotCreate, SnapshotDelete
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish

Run = Callable[..., requests.Request]
CHOICES = ["--children", "--children-only", "--reopen-mirror", "--remove-mirror", "--metadata"]


class Asked(Exception):
    """Raised in place of asking."""


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What should be refused here and is not must not reach the host process of whoever runs the tests."""

    def submit(_state: object, request: dict[str, Any]) -> None:
        raise Asked(request)

    monkeypatch.setattr(wire, "submit", submit)


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


@pytest.mark.parametrize(
    ("written", "value"), [("512", 512), ("64K", 65536), ("64KiB", 65536), ("1m", 1 << 20), ("1.5K", 1536)]
)
def test_numbers_of_bytes(written: str, value: int) -> None:
    assert Size().convert(written, None, None) == value


@pytest.mark.parametrize("written", ["", "K", "lots", "-1", "64X", "64K/s", "0x200"])
def test_what_is_no_number_of_bytes(written: str) -> None:
    with pytest.raises(click.BadParameter, match="is no number of bytes"):
        Size().convert(written, None, None)


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
    assert asked("attach", "vm1", "--qmp", "/q", "--agent", "a") == requests.Attach(
        domain="vm1", qmp="/q", agent=f"{tmp_path}/a"
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


@pytest.mark.parametrize("mode", ["existing", "absolute", "relative", "none"])
def test_snapshot_with_header_modes(asked: Run, mode: Any) -> None:
    """A disk that only has a mode takes part with the others: --mode leaves none out."""
    request = asked("snapshot", "create", "vm1", "--disk", "vda=/a", "--mode", f"vda={mode}", "--mode", "vdb=none")
    disks = (DiskWish(name="vda", file="/a", mode=mode), DiskWish(name="vdb", mode="none"))
    assert request == requests.CreateSnapshot(domain="vm1", wish=SnapshotWish(disks=disks, only_these=True))
    request = asked("snapshot", "create", "vm1", "--mode", f"vda={mode}")
    disks = (DiskWish(name="vda", mode=mode),)
    assert request == requests.CreateSnapshot(domain="vm1", wish=SnapshotWish(disks=disks, only_these=False))


def test_snapshot_with_a_backing_of_its_mirror(asked: Run, tmp_path: Path) -> None:
    request = asked(
        *["snapshot", "create", "vm1", "--mirror-backing", "./src/a.img=base.img"],
        *["--mirror", "src/a.img=/dest/a.img"],
    )
    mirror = MirrorWish(file="/dest/a.img", backing=f"{tmp_path}/base.img")
    disks = (DiskWish(name=f"{tmp_path}/src/a.img", mirror=mirror),)
    assert request == requests.CreateSnapshot(domain="vm1", wish=SnapshotWish(disks=disks))


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (["--reuse-ext"], SnapshotCreate.REUSE_EXT | SnapshotCreate.ATOMIC),
        (["--reuse-ext", "--atomic"], SnapshotCreate.REUSE_EXT | SnapshotCreate.ATOMIC),
        (["--no-metadata"], SnapshotCreate.NO_METADATA),
        (["--quiesce"], SnapshotCreate.QUIESCE),
        (["--no-metadata", "--atomic"], SnapshotCreate.NO_METADATA | SnapshotCreate.ATOMIC),
    ],
)
def test_snapshot_flags(asked: Run, options: list[str], flags: SnapshotCreate) -> None:
    request = asked("snapshot", "create", "vm1", *options)
    assert request == requests.CreateSnapshot(domain="vm1", wish=SnapshotWish(), flags=int(flags))


def test_snapshot_from_xml(asked: Run, tmp_path: Path) -> None:
    (tmp_path / "s.xml").write_text("<domainsnapshot/>")
    from_file = asked("snapshot", "create", "vm1", "--xml", "s.xml")
    from_stdin = asked("snapshot", "create", "vm1", "--xml", "-", stdin="<domainsnapshot/>")
    assert from_file == from_stdin == requests.CreateSnapshot(domain="vm1", xml="<domainsnapshot/>")


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (["--redefine"], SnapshotCreate.REDEFINE),
        (["--redefine", "--current"], SnapshotCreate.REDEFINE | SnapshotCreate.CURRENT),
    ],
)
def test_snapshot_that_is_redefined(asked: Run, options: list[str], flags: SnapshotCreate) -> None:
    request = asked("snapshot", "create", "vm1", "s1", "--xml", "-", *options, stdin="<domainsnapshot/>")
    assert request == requests.CreateSnapshot(domain="vm1", name="s1", xml="<domainsnapshot/>", flags=int(flags))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--redefine"],
        ["--redefine", "--disk", "vda"],
        ["--current"],
        ["--xml", "-", "--current"],
        ["--xml", "-", "--redefine", "--atomic"],
        ["--xml", "-", "--redefine", "--reuse-ext"],
        ["--xml", "-", "--redefine", "--no-metadata"],
        ["--xml", "-", "--redefine", "--disk", "vda"],
        ["--disk", "vda", "--disk", "vda=/x"],
        ["--disk", "vda="],
        ["--disk", "=/x"],
        ["--mirror", "vda"],
        ["--mirror", "vda=/x", "--mirror", "vda=/y"],
        ["--xml", "-", "--disk", "vda"],
        ["--xml", "-", "--mode", "vda=none"],
        ["--xml", "-", "--mirror-backing", "vda=/x"],
        ["--mode", "vda"],
        ["--mode", "vda="],
        ["--mode", "=none"],
        ["--mode", "vda=Absolute"],
        ["--mode", "vda=none", "--mode", "vda=absolute"],
        ["--mirror", "vda=/x", "--mirror-backing", "vda"],
        ["--mirror", "vda=/x", "--mirror-backing", "vda="],
        ["--mirror", "vda=/x", "--mirror-backing", "vda=/y", "--mirror-backing", "vda=/z"],
    ],
)
def test_snapshots_that_are_refused_here(arguments: list[str]) -> None:
    assert invoke("snapshot", "create", "vm1", *arguments).exit_code == 2


@pytest.mark.parametrize("others", [[], ["--disk", "vda"], ["--mirror", "vdb=/x"]])
def test_a_backing_needs_its_mirror(others: list[str]) -> None:
    result = invoke("snapshot", "create", "vm1", *others, "--mirror-backing", "vda=/base")
    assert result.exit_code == 2
    assert "vda has no --mirror" in result.output


def test_one_disk_under_two_names_of_its_image_is_one(asked: Run, tmp_path: Path) -> None:
    twice = ["--mirror", f"{tmp_path}/a.img=/x", "--mirror", "./a.img=/y"]
    assert invoke("snapshot", "create", "vm1", *twice).exit_code == 2


@pytest.mark.parametrize(
    ("option", "flags"),
    [
        ([], SnapshotDelete(0)),
        (["--merge"], SnapshotDelete(0)),
        (["--children"], SnapshotDelete.CHILDREN),
        (["--children-only"], SnapshotDelete.CHILDREN_ONLY),
        (["--merge", "--children"], SnapshotDelete.CHILDREN),
        (["--reopen-mirror"], SnapshotDelete.REOPEN_MIRROR),
        (["--remove-mirror"], SnapshotDelete.REMOVE_MIRROR),
        (["--metadata"], SnapshotDelete.METADATA_ONLY),
    ],
)
def test_snapshot_delete(asked: Run, option: list[str], flags: SnapshotDelete) -> None:
    request = asked("snapshot", "delete", "vm1", "s1", *option)
    assert request == requests.DeleteSnapshot(domain="vm1", snapshot="s1", flags=int(flags))


@pytest.mark.parametrize(
    "options",
    [
        *(list(pair) for pair in itertools.combinations(CHOICES, 2)),
        *(["--merge", choice] for choice in CHOICES if choice not in ("--children", "--children-only")),
    ],
    ids=" ".join,
)
def test_snapshot_delete_takes_one_choice(options: list[str]) -> None:
    result = invoke("snapshot", "delete", "vm1", "s1", *options)
    assert result.exit_code == 2
    assert "Only one of" in result.output


@pytest.mark.parametrize("choice", ["--reopen-mirror", "--remove-mirror", "--metadata"])
def test_only_a_merge_can_be_looked_at_before(choice: str) -> None:
    result = invoke("snapshot", "delete", "vm1", "s1", choice, "--dry-run")
    assert result.exit_code == 2
    assert "--dry-run is for a merge" in result.output


def test_looking_at_a_merge(asked: Run) -> None:
    assert asked("snapshot", "delete", "vm1", "s1", "--children", "--dry-run") == requests.DeleteSnapshot(
        domain="vm1", snapshot="s1", flags=int(SnapshotDelete.CHILDREN), dry_run=True
    )


def test_copy(asked: Run, tmp_path: Path) -> None:
    request = asked("copy", "vm1", "vda", "d.img", "--format", "raw", "--bandwidth", "50M")
    assert request == requests.StartCopy(
        domain="vm1", disk="vda", dest=f"{tmp_path}/d.img", format="raw", bandwidth=50 << 20
    )
    assert asked("copy", "vm1", "vda", "/d", "--dry-run") == requests.StartCopy(
        domain="vm1", disk="vda", dest="/d", dry_run=True
    )
    assert invoke("copy", "vm1", "vda", "/d", "--pivot", "--finish").exit_code == 2


def test_copy_onto_a_base_and_how(asked: Run, tmp_path: Path) -> None:
    request = asked(
        *["copy", "vm1", "vda", "/d", "--base", "base.img", "--reuse-ext", "--converge"],
        *["--granularity", "64K", "--buf-size", "16M"],
    )
    assert request == requests.StartCopy(
        domain="vm1",
        disk="vda",
        dest="/d",
        base=f"{tmp_path}/base.img",
        granularity=65536,
        buf_size=16 << 20,
        flags=int(BlockCopy.REUSE_EXT | BlockCopy.SYNCHRONOUS_WRITES),
    )


@pytest.mark.parametrize(
    "options", [["--granularity", "much"], ["--buf-size", "-1"], ["--bandwidth", "fast"], ["--format", "vmdk"]]
)
def test_copies_that_are_refused_here(options: list[str]) -> None:
    assert invoke("copy", "vm1", "vda", "/d", *options).exit_code == 2


def test_rebase(asked: Run, tmp_path: Path) -> None:
    assert asked("rebase", "vm1", "vda") == requests.Rebase(domain="vm1", disk="vda")
    assert asked("rebase", "vm1", "./a.img", "--base", "b.img", "--bandwidth", "1M") == requests.Rebase(
        domain="vm1", disk=f"{tmp_path}/a.img", base=f"{tmp_path}/b.img", bandwidth=1 << 20
    )
    assert asked("rebase", "vm1", "vda", "--dry-run", "--wait") == requests.Rebase(
        domain="vm1", disk="vda", dry_run=True
    )


def test_commit(asked: Run, tmp_path: Path) -> None:
    assert asked("commit", "vm1", "vda") == requests.Commit(domain="vm1", disk="vda")
    assert asked("commit", "vm1", "vda", "--top", "t.img", "--base", "/b.img", "--bandwidth", "50M") == requests.Commit(
        domain="vm1", disk="vda", top=f"{tmp_path}/t.img", base="/b.img", bandwidth=50 << 20
    )
    assert asked("commit", "vm1", "vda", "--dry-run") == requests.Commit(domain="vm1", disk="vda", dry_run=True)


@pytest.mark.parametrize("verb", ["rebase", "commit"])
def test_chain_jobs_that_are_refused_here(verb: str) -> None:
    assert invoke(verb, "vm1").exit_code == 2
    assert invoke(verb, "vm1", "vda", "--bandwidth", "fast").exit_code == 2
    assert invoke(verb, "vm1", "vda", "vdb").exit_code == 2


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
    disk = {"target": "vda", "bus": "virtio", "virtual_size": 1024, "qdev": "d0", "device": "disk", "read_only": False}
    disk["source"] = "/snap"
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


def snapshot_row(name: str, parent: str | None, *, current: bool = False) -> dict[str, Any]:
    return {"name": name, "parent": parent, "current": current, "created": 0, "state": "running", "disks": []}


def test_snapshots_are_drawn_as_a_tree() -> None:
    rows = [
        *[snapshot_row("a", None), snapshot_row("b", "a"), snapshot_row("lone", None), snapshot_row("c", "b")],
        *[snapshot_row("b2", "a", current=True), snapshot_row("orphan", "gone")],
    ]
    drawn = render.snapshots({"domain": "vm1", "snapshots": rows}).splitlines()
    assert [line.split("  1970")[0].split("  197")[0].rstrip()[:10].rstrip() for line in drawn] == [
        *["  NAME", "  a", "  └─ b", "     └─ c", "* └─ b2", "  lone", "  orphan"]
    ]
    assert render.snapshots({"domain": "vm1", "snapshots": []}) == "vm1 has no snapshots"


def test_internal_snapshots_come_last_and_write_nothing_but_text() -> None:
    """Their names are from an image's header, which may be anybody's."""
    inside = {"name": "in\x1b[2Jside\n", "target": "vda", "file": "/a", "id": "1", "created": 0, "memory": 0}
    view = {"domain": "vm1", "snapshots": [snapshot_row("a", None)], "internal": [inside]}
    _heading, first, last = render.snapshots(view).splitlines()
    assert first.startswith("  a ")
    assert "\x1b" not in last
    assert [last.split()[0], *last.split()[-4:]] == ["in\ufffd[2Jside\ufffd", "internal", "vda", "-", "-"]


@pytest.mark.parametrize(
    ("state", "total", "line"),
    [
        ("copying", 0, "vda  copying"),  # between the fill of a copy and its mirror
        ("done", 0, "vda  done"),
        ("done", 1024, "vda  done  100 %  1.0 KiB of 1.0 KiB"),
        ("ready", 0, "vda  ready  100 %  0 B of 0 B"),
    ],
)
def test_progress_says_no_figures_that_it_does_not_have(state: str, total: int, line: str) -> None:
    data = {"disk": "vda", "state": state, "current": total, "total": total, "reason": None}
    assert click.unstyle(render.progress(data)) == line


def test_json_of_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from blockferry.interfaces.cli.main import main

    monkeypatch.setattr("sys.argv", ["blockferry", "show", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["exit_status"]) == ("usage", 2)
