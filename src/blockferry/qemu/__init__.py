"""Everything that touches QEMU or image files."""
