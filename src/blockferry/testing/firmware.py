"""Firmware that does nothing: a guest that runs and costs no processor time.

Without a system to boot, QEMU's own firmware keeps a processor busy for a second and more, in every test.
"""

from pathlib import Path

ROM_BYTES = 1 << 16  # the least that a PC maps below 4 GiB
RESET_VECTOR = ROM_BYTES - 16  # where an x86 processor begins, with its interrupts disabled
HALT = b"\xf4\xeb\xfd"  # hlt; jmp to it


def idle_firmware(folder: Path) -> Path:
    """A ROM whose guest halts at its first instruction and never wakes up; made in the folder when it is not there."""
    path = folder / "idle.rom"
    if not path.exists():
        rom = bytearray(b"\xff" * ROM_BYTES)
        rom[RESET_VECTOR : RESET_VECTOR + len(HALT)] = HALT
        path.write_bytes(rom)
    return path
