"""A definition: what a guest is made of when it is started. Read from libvirt's domain XML; frozen values, no I/O."""

from __future__ import annotations

from typing import Literal

import msgspec

SourceKind = Literal["file", "block", "network"]


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a device is plugged in, as libvirt says it.

    Attributes:
        type: `pci` or `drive`.
        bus: the PCI bus, or the drive's bus on its controller.
        slot: the PCI slot.
        function: the PCI function.
        multifunction: whether other functions share the slot.
        controller: the drive's controller, by index.
        target: the drive's SCSI target.
        unit: the drive's unit.
    """

    type: Literal["pci", "drive"]
    bus: int = 0
    slot: int = 0
    function: int = 0
    multifunction: bool = False
    controller: int = 0
    target: int = 0
    unit: int = 0


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """An image as a definition names it: `where` is a path, or an `nbd:` URI; `format` qcow2 or raw."""

    kind: SourceKind
    where: str
    format: str


class DiskDef(msgspec.Struct, frozen=True, kw_only=True):
    """A disk of a definition.

    Attributes:
        target: its name in the guest, `vda`.
        bus: `virtio`, `scsi`, `sata`, `ide`, `nvme`, `usb`.
        device: `disk` or `cdrom`.
        source: its active image; None for an empty cdrom.
        backings: the files that its `<backingStore>` names: what its headers say is the chain, and these may be in it.
        read_only: whether the guest may not write to it.
        cache: libvirt's cache mode.
        io: `native`, `threads`, `io_uring`.
        discard: `unmap` or `ignore`.
        detect_zeroes: `off`, `on`, `unmap`.
        iothread: the number of its iothread.
        serial: what the guest reads as its serial number.
        boot: its place in the boot order, from 1.
        limits: of `<iotune>`, libvirt's names, such as `total_bytes_sec`.
        blocks: the sizes of its blocks, by QEMU's names for them: the guest's partitions are counted in them.
        address: where it is plugged in.
    """

    target: str
    bus: str
    device: Literal["disk", "cdrom"] = "disk"
    source: Source | None = None
    backings: tuple[str, ...] = ()
    read_only: bool = False
    cache: str | None = None
    io: str | None = None
    discard: str | None = None
    detect_zeroes: str | None = None
    iothread: int | None = None
    serial: str | None = None
    boot: int | None = None
    limits: dict[str, int] = {}
    blocks: dict[str, int] = {}
    address: Address | None = None

    @property
    def id(self) -> str:
        """The device's id in QEMU, by which the target is known again."""
        return f"disk-{self.target}"

    @property
    def backend(self) -> str:
        """Where in QEMU its block backend is: of some devices in another inside of them (libvirt knows the same)."""
        inside = {"virtio": "virtio-backend", "usb": f"{self.id}.0/legacy[0]"}.get(self.bus)
        return f"/machine/peripheral/{self.id}/{inside}" if inside is not None else self.id


class Controller(msgspec.Struct, frozen=True, kw_only=True):
    """A controller: `type` scsi, sata, ide, usb, pci or virtio-serial."""

    type: str
    index: int
    model: str | None = None
    iothread: int | None = None
    address: Address | None = None
    chassis: int | None = None
    port: int | None = None


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface: `type` user, ethernet (a tap that is there) or bridge; `source` the tap's or bridge's name."""

    type: Literal["user", "ethernet", "bridge"]
    model: str = "virtio"
    mac: str | None = None
    source: str | None = None
    boot: int | None = None
    address: Address | None = None


class Character(msgspec.Struct, frozen=True, kw_only=True):
    """A serial port, a console or a channel.

    Attributes:
        role: `serial`, `console` (a virtio console) or `channel`.
        type: where the other end is: pty, file, unix, null.
        path: of the file or socket.
        listen: whether QEMU listens on the socket.
        name: a channel's, such as org.qemu.guest_agent.0.
    """

    role: Literal["serial", "console", "channel"]
    type: str
    path: str | None = None
    listen: bool = True
    name: str | None = None


class Graphics(msgspec.Struct, frozen=True, kw_only=True):
    """A VNC server: on a TCP port of `listen` (0 finds one), or on a socket."""

    listen: str = "127.0.0.1"
    port: int = 0
    socket: str | None = None


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest starts from.

    Attributes:
        order: `hd`, `cdrom`, `network`, in their order.
        kernel: a kernel to start instead of a boot loader.
        initrd: its initramfs.
        cmdline: its command line.
        loader: the firmware's image.
        loader_type: `rom` or `pflash`.
        secure: whether only code in system management mode may write to the flash.
        smm: whether there is that mode; None for QEMU's own choice.
        nvram: the firmware's variables, the guest's own.
        template: what they are made from where they are not there.
        menu: whether the firmware shows a menu.
    """

    order: tuple[str, ...] = ()
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str | None = None
    loader: str | None = None
    loader_type: Literal["rom", "pflash"] = "rom"
    secure: bool = False
    smm: bool | None = None
    nvram: str | None = None
    template: str | None = None
    menu: bool = False

    @property
    def templates(self) -> dict[str, str]:
        """Files that are made where they are not there -> what from."""
        return {self.nvram: self.template} if self.nvram is not None and self.template is not None else {}


class RunAs(msgspec.Struct, frozen=True, kw_only=True):
    """Another user that QEMU runs as.

    Attributes:
        words: the option, as this QEMU has it.
        uid: the user's number.
        gid: the group's.
        relabel: whether the images that the guest writes to become the user's.
        written: those images.
        read: those that it only reads, which stay whose they are: others may stand on them.
    """

    words: tuple[str, ...]
    uid: int
    gid: int
    relabel: bool = False
    written: tuple[str, ...] = ()
    read: tuple[str, ...] = ()


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """A guest.

    Attributes:
        name: its name.
        uuid: its UUID; None to be given one.
        kvm: whether the host's processor runs it, rather than TCG.
        memory: bytes.
        vcpus: how many processors.
        topology: sockets, cores and threads.
        cpu: QEMU's `-cpu`: a model and features; None for QEMU's own choice.
        emulator: the QEMU program; None finds it.
        arch: such as x86_64.
        machine: the machine type; None for QEMU's default.
        acpi: whether the guest has ACPI, which a clean shutdown needs.
        localtime: whether its clock shows the host's time zone, rather than UTC.
        boot: what it starts from.
        iothreads: how many.
        disks: in the document's order.
        controllers: those that the document names.
        interfaces: of the network.
        characters: serial ports, consoles, channels.
        graphics: VNC servers.
        video: QEMU's device for a screen; None for none.
        rng: the host's source of the guest's random numbers.
        balloon: whether the guest has a memory balloon.
        user: whom QEMU runs as, of `<seclabel model='dac'>`, as libvirt writes it: USER or USER:GROUP; None for our own.
        relabel: whether the images that the guest writes to become the user's.
        arguments: what `qemu:commandline` adds.
        environment: what it adds to QEMU's environment.
        ignored: elements that are kept and do nothing, each as a path in the document.
    """

    name: str
    uuid: str | None = None
    kvm: bool = False
    memory: int
    vcpus: int = 1
    topology: tuple[int, int, int] | None = None
    cpu: str | None = None
    emulator: str | None = None
    arch: str = "x86_64"
    machine: str | None = None
    acpi: bool = False
    localtime: bool = False
    boot: Boot = Boot()
    iothreads: int = 0
    disks: tuple[DiskDef, ...] = ()
    controllers: tuple[Controller, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    characters: tuple[Character, ...] = ()
    graphics: tuple[Graphics, ...] = ()
    video: str | None = None
    rng: str | None = None
    balloon: bool = False
    user: str | None = None
    relabel: bool = False
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    ignored: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """The images that it names, paths and URIs: of each disk its active one, and what it says that is in its chain."""
        named = ((disk.source.where if disk.source is not None else "", *disk.backings) for disk in self.disks)
        return tuple(file for files in named for file in files if file)

    @property
    def agent(self) -> bool:
        """Whether it has the guest agent's channel."""
        return any(each.name == AGENT_CHANNEL for each in self.characters)


AGENT_CHANNEL = "org.qemu.guest_agent.0"
