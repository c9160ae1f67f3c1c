"""libvirt's side: a libvirtd of the benchmark's own, driven with libvirt-python.

The daemon is a session daemon with every directory below the benchmark's: it touches no other libvirtd and no file of
the system's. Under root it is given another user, since root's daemon would use the system's directories. It has no
security driver, no cgroups and no namespaces: nothing is measured that is not storage.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree as ET

from sides import MEMORY_MIB, PROCESSORS, Boot, Image, Way, snapshot_xml

try:
    import libvirt
    import libvirt_qemu
except ImportError:
    libvirt = None

DAEMON = "libvirtd"
NOBODY = 65534
START_SECONDS = 30.0
READY_SECONDS = 300.0
CONFIG = 'security_driver = "none"\ncgroup_controllers = []\nnamespaces = []\nstdio_handler = "file"\n'


def missing() -> str | None:
    """What keeps libvirt from taking part, with what would help; None when nothing does."""
    if _daemon() is None:
        return f"no {DAEMON}: scripts/system-packages.sh bench installs it"
    if libvirt is None:
        return "no libvirt-python: make bench installs it where it can be built"
    return None


def _daemon() -> str | None:
    return shutil.which(DAEMON, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class LibvirtGuest:
    """A guest that libvirtd has started.

    Args:
        domain: libvirt's object.
        events: (disk, status) of every block job's event, as they come.
    """

    def __init__(self, domain: Any, events: queue.Queue[tuple[str, int]]) -> None:
        self._domain = domain
        self._events = events

    async def snapshot(self, overlays: dict[str, Path]) -> dict[str, float]:
        """See sides.Guest."""
        began = time.perf_counter()
        self._snapshot(overlays)
        took = _milliseconds(began)
        self._require_on(overlays)
        return {"snapshot": took}

    def _snapshot(self, overlays: dict[str, Path]) -> None:
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        self._domain.snapshotCreateXML(snapshot_xml("s", overlays), flags)

    async def mirrored(self, overlays: dict[str, Path], mirrors: dict[str, Path]) -> dict[str, float]:
        """See sides.Guest; libvirt has no such call: a snapshot, then a shallow copy of one disk after the other."""
        began = time.perf_counter()
        self._snapshot(overlays)
        for target, path in mirrors.items():
            self._copy(target, path, "qcow2", libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW)
        took = _milliseconds(began)
        self._wait_ready(set(mirrors))
        synced = _milliseconds(began)
        self._require_on(overlays)
        return {"mirrored": took, "mirrored-ready": synced}

    async def copy(self, image: Image, to: Path) -> dict[str, float]:
        """See sides.Guest."""
        began = time.perf_counter()
        self._copy(image.target, to, image.format)
        self._wait_ready({image.target})
        took = _milliseconds(began)
        self._domain.blockJobAbort(image.target)
        return {"copy": took}

    async def pivot(self, copies: dict[str, Path]) -> dict[str, float]:
        """See sides.Guest; `split` is from the first disk's return until the last's: some on copies, some not."""
        for target, to in copies.items():
            self._copy(target, to, "raw")
        self._wait_ready(set(copies))
        began = time.perf_counter()
        returned = []
        for target in copies:
            self._domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
            returned.append(_milliseconds(began))
        self._require_on(copies)
        return {"split": returned[-1] - returned[0], "pivot": returned[-1]}

    async def move(self, way: Way, images: list[Image], folder: Path, uri: str | None) -> dict[str, float]:
        """See sides.Guest: block copies of whole chains, then a pivot of each; `split` is as in `pivot`."""
        assert way == "blockcopy", way
        began = time.perf_counter()
        for image in images:
            if uri is not None:
                self._export(image.target, uri)
            else:
                self._copy(image.target, folder / image.path.name, image.format)
        self._wait_ready({image.target for image in images})
        returned = []
        for image in images:
            self._domain.blockJobAbort(image.target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
            returned.append(_milliseconds(began))
        if uri is None:
            self._require_on({image.target: folder / image.path.name for image in images})
        return {"move": returned[-1], **({"split": returned[-1] - returned[0]} if len(images) > 1 else {})}

    async def command(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """See sides.Guest."""
        words = json.dumps({"execute": name, "arguments": dict(arguments)})
        return json.loads(libvirt_qemu.qemuMonitorCommand(self._domain, words, 0))["return"]

    def _export(self, target: str, uri: str) -> None:
        parts = urlsplit(uri)
        (socket,) = parse_qs(parts.query)["socket"]
        source = (
            f"<source protocol='nbd' name='{parts.path.strip('/')}'><host transport='unix' socket='{socket}'/></source>"
        )
        flags = libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        self._domain.blockCopy(target, f"<disk type='network'>{source}<driver type='raw'/></disk>", flags=flags)

    def _copy(self, target: str, to: Path, image_format: str, flags: int = 0) -> None:
        xml = f"<disk type='file'><source file='{to}'/><driver type='{image_format}'/></disk>"
        self._domain.blockCopy(target, xml, flags=flags | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)

    def _wait_ready(self, waited: set[str]) -> None:
        while waited:
            target, status = self._events.get(timeout=READY_SECONDS)
            assert status != libvirt.VIR_DOMAIN_BLOCK_JOB_FAILED, f"the copy of {target} failed"
            if status == libvirt.VIR_DOMAIN_BLOCK_JOB_READY:
                waited.discard(target)

    def _require_on(self, files: dict[str, Path]) -> None:
        now = {}
        for disk in ET.fromstring(self._domain.XMLDesc()).iterfind("devices/disk"):  # noqa: S314 (our own daemon's)
            target, source = disk.find("target"), disk.find("source")
            if target is not None and source is not None:
                now[target.get("dev")] = source.get("file")
        wrong = {target: now.get(target) for target, path in files.items() if now.get(target) != str(path)}
        assert not wrong, f"not where they should be: {wrong}"


class LibvirtSide:
    """A connection to the daemon, warm.

    Args:
        connection: open.
        user: under whom QEMU runs, None for this process's.
        emulator: which QEMU.
    """

    name = "libvirt"

    def __init__(self, connection: Any, user: int | None, emulator: Path) -> None:
        self._connection = connection
        self._user = user
        self._emulator = emulator
        self._numbers = itertools.count()
        number = connection.getLibVersion()
        self.version = f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"

    def own(self, path: Path) -> None:
        """Give a file or folder to the user under whom QEMU runs."""
        if self._user is not None:
            os.chown(path, self._user, self._user)

    @contextlib.asynccontextmanager
    async def guest(self, images: list[Image], folder: Path, boot: Boot | None) -> AsyncIterator[LibvirtGuest]:
        """See sides.Side."""
        self.own(folder)
        events: queue.Queue[tuple[str, int]] = queue.Queue()

        def happened(_connection: Any, _domain: Any, disk: str, _type: int, status: int, _opaque: Any) -> None:
            events.put((disk, status))

        xml = _domain_xml(f"bench{next(self._numbers)}", images, self._emulator, boot)
        domain = self._connection.createXML(xml)
        watch = self._connection.domainEventRegisterAny(domain, libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, happened, None)
        try:
            yield LibvirtGuest(domain, events)
        finally:
            self._connection.domainEventDeregisterAny(watch)
            domain.destroy()


def _domain_xml(name: str, images: list[Image], emulator: Path, boot: Boot | None) -> str:
    disks = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='{image.format}'/><source file='{image.path}'/>"
        f"<target dev='{image.target}' bus='virtio'/></disk>"
        for image in images
    )
    start, ports = "", ""
    if boot is not None:
        start = f"<kernel>{boot.kernel}</kernel><initrd>{boot.initrd}</initrd><cmdline>{boot.append}</cmdline>"
        for number, path in enumerate((boot.console, boot.acks)):
            ports += f"<serial type='file'><source path='{path}'/><target port='{number}'/></serial>"
    return (
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>{MEMORY_MIB}</memory><vcpu>{PROCESSORS}</vcpu>"
        f"<os><type arch='x86_64' machine='pc'>hvm</type>{start}</os>"
        "<features><acpi/><apic/></features><cpu mode='maximum'/>"
        f"<devices><emulator>{emulator}</emulator>{disks}{ports}"
        "<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
    )


@contextlib.asynccontextmanager
async def libvirt_side(folder: Path, emulator: Path) -> AsyncIterator[LibvirtSide]:
    """A libvirtd of our own below `folder`, and a connection to it."""
    with _serving(folder) as (address, user):
        libvirt.registerErrorHandler(lambda *_words: None, None)  # what it would print is raised as well
        libvirt.virEventRegisterDefaultImpl()
        ended = threading.Event()
        loop = threading.Thread(target=_dispatch, args=(ended,), daemon=True)
        loop.start()
        connection = libvirt.open(address)
        try:
            yield LibvirtSide(connection, user, emulator)
        finally:
            connection.close()
            ended.set()
            loop.join(timeout=5)


def _dispatch(ended: threading.Event) -> None:
    # The loop looks at `ended` after every event: a timer is one.
    libvirt.virEventAddTimeout(1000, lambda _timer, _opaque: None, None)
    while not ended.is_set():
        libvirt.virEventRunDefaultImpl()


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[tuple[str, int | None]]:
    """Run a daemon while the block lasts; gives its address and the user that it was given, None for ours."""
    user = NOBODY if os.geteuid() == 0 else None
    places = {name: folder / name for name in ("config", "run", "cache", "data")}
    (places["config"] / "libvirt").mkdir(parents=True)
    (places["config"] / "libvirt/qemu.conf").write_text(CONFIG)
    for place in places.values():
        place.mkdir(exist_ok=True)
    for path in (folder, *folder.rglob("*")):
        if user is not None:
            os.chown(path, user, user)
    environment = {f"XDG_{name.upper()}_HOME": str(place) for name, place in places.items() if name != "run"}
    environment |= {"XDG_RUNTIME_DIR": str(places["run"]), "HOME": str(places["data"]), "PATH": os.environ["PATH"]}
    with (folder / "libvirtd.log").open("wb") as log:
        process = subprocess.Popen(
            [str(_daemon()), "--pid-file", str(places["run"] / "libvirtd.pid")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
    socket = places["run"] / "libvirt/libvirt-sock"
    try:
        _wait_for(socket, process, folder / "libvirtd.log")
        yield f"qemu+unix:///session?socket={socket}", user
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(socket: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"libvirtd did not start: {log.read_text()[-2000:]}")
        time.sleep(0.05)


def _milliseconds(began: float) -> float:
    return (time.perf_counter() - began) * 1000
