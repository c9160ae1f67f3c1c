"""The kernel and the initramfs of the tests' tiny Linux guest: Debian's cloud kernel, busybox and one script."""

import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blockferry.testing.launcher import REPO_ROOT
from blockferry.testing.missing import MissingComponentError

# Drivers of every bus that `blockdev_disk` knows; those that a kernel has built in or lacks are passed over.
# And the power button.
MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_scsi", "ata_piix", "ahci", "nvme", "xhci_pci", "usb_storage", "sd_mod"),
    *("button", "evdev"),
)

# What the guest agent speaks through; a guest without it boots without this.
AGENT_MODULES = ("virtio_console",)

INIT = Path(__file__).with_name("guest-init.sh")


@dataclass(frozen=True)
class GuestImages:
    """What QEMU boots."""

    kernel: Path
    initrd: Path


def build_guest(cache_dir: Path | None = None, *, agent: bool = False) -> GuestImages:
    """Find a kernel and assemble the initramfs, once for each kernel, busybox and script.

    The kernel is BLOCKFERRY_GUEST_KERNEL with the modules in BLOCKFERRY_GUEST_MODULES (a folder like
    ``/lib/modules/VERSION``), or else what scripts/guest-kernel.sh unpacked into .cache/kernel.

    Args:
        cache_dir: where initramfs files are kept; .cache/guest in the repository unless told.
        agent: with qemu-guest-agent, which scripts/guest-agent.sh unpacked into .cache/agent.

    Raises:
        MissingComponentError: there is no kernel, no modules, no static busybox or no agent; says what installs it.
    """
    kernel, modules = _find_kernel()
    busybox = _find_busybox()
    programs = [_find_agent()] if agent else []
    key = hashlib.sha256(INIT.read_bytes() + repr(MODULES).encode())
    for path in (kernel, busybox, *programs):
        status = path.stat()
        key.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    cache = cache_dir or REPO_ROOT / ".cache/guest"
    initrd = cache / f"initrd-{key.hexdigest()[:16]}.gz"
    if not initrd.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _write_atomically(initrd, gzip.compress(_initramfs(busybox, modules, programs), compresslevel=1))
    return GuestImages(kernel, initrd)


def _find_kernel() -> tuple[Path, Path]:
    remedy = "scripts/guest-kernel.sh"
    if named := os.environ.get("BLOCKFERRY_GUEST_KERNEL"):
        kernel, modules = Path(named), Path(os.environ.get("BLOCKFERRY_GUEST_MODULES", ""))
        remedy += " and point BLOCKFERRY_GUEST_KERNEL and BLOCKFERRY_GUEST_MODULES at what it unpacks"
    else:
        root = REPO_ROOT / ".cache/kernel"
        kernel = max(root.glob("boot/vmlinuz-*"), default=root / "boot/vmlinuz")
        modules = root / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
    if not kernel.is_file():
        raise MissingComponentError(f"the guest's kernel ({kernel})", remedy)
    if not (modules / "kernel").is_dir():
        raise MissingComponentError(f"the guest kernel's modules ({modules})", remedy)
    return kernel, modules


def _find_busybox() -> Path:
    remedy = "apt-get install busybox-static"
    found = shutil.which("busybox")
    if found is None:
        raise MissingComponentError("busybox", remedy)
    listing = subprocess.run([found, "--list"], capture_output=True, text=True, check=True)
    if b"ld-linux" in Path(found).read_bytes()[:4096] or "insmod" not in listing.stdout.split():
        raise MissingComponentError(f"a statically linked busybox with insmod ({found} is not)", remedy)
    return Path(found)


def _initramfs(busybox: Path, modules: Path, programs: Iterable[Path]) -> bytes:
    files = {"init": INIT.read_bytes(), "bin/busybox": busybox.read_bytes()}
    for program in programs:
        files |= _with_libraries(program)
    # Numbered in the order in which they can be loaded: the shell's glob sorts them.
    for number, path in enumerate(_in_load_order((*MODULES, *(AGENT_MODULES if programs else ())), modules)):
        files[f"modules/{number:02}-{path.name.split('.')[0]}.ko"] = _module_bytes(path)
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    return newc_archive(files, directories=sorted(folders | {"dev", "proc"}))


# --- the guest agent ------------------------------------------------------------------------------------------


def _find_agent() -> Path:
    agent = REPO_ROOT / ".cache/agent/usr/sbin/qemu-ga"
    if not agent.is_file():
        raise MissingComponentError(f"the guest's agent ({agent})", "scripts/guest-agent.sh")
    return agent


def _with_libraries(program: Path) -> dict[str, bytes]:
    """A program as bin/NAME, and the shared libraries that it needs under the host's names for them."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    missing = re.findall(r"(\S+) => not found", listing)
    if missing:
        raise MissingComponentError(
            f"what {program.name} is linked with ({', '.join(missing)})", "ldd on it, and install these"
        )
    libraries = (Path(found) for found in re.findall(r"(/\S+) \(0x", listing))
    return {f"bin/{program.name}": program.read_bytes(), **{str(each)[1:]: each.read_bytes() for each in libraries}}


# --- modules and the archive ----------------------------------------------------------------------------------


def _in_load_order(names: Iterable[str], folder: Path) -> list[Path]:
    """Return the module files of `names` and of all that they depend on, dependencies first."""
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in folder.rglob("*.ko*")}
    order: dict[str, Path] = {}

    def visit(name: str) -> None:
        if name in files and name not in order:
            # Every module says in its .modinfo section what it needs, as "depends=a,b"; modules.dep may not exist yet.
            found = re.search(rb"\0depends=([^\0]*)\0", _module_bytes(files[name]))
            for needed in found[1].decode().split(",") if found else ():
                visit(needed.replace("-", "_"))
            order[name] = files[name]

    for name in names:
        visit(name)
    return list(order.values())


def _module_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def newc_archive(files: Mapping[str, bytes], directories: Iterable[str]) -> bytes:
    """Return a cpio archive in the "newc" format that Linux unpacks as an initramfs; every file is executable."""
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in directories]
    entries += [(name, stat.S_IFREG | 0o755, data) for name, data in files.items()]
    entries.append(("TRAILER!!!", 0, b""))
    archive = bytearray()
    for inode, (name, mode, data) in enumerate(entries, start=1):
        encoded = name.encode() + b"\0"
        links, owner, time, device, checksum = 1, 0, 0, 0, 0
        fields = [inode, mode, owner, owner, links, time, len(data)]
        fields += [device, device, device, device, len(encoded), checksum]
        archive += b"070701" + "".join(f"{value:08X}" for value in fields).encode() + encoded
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _write_atomically(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)
