"""Small C libraries that are preloaded into the programs of a test."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from blockferry.testing.launcher import REPO_ROOT
from blockferry.testing.missing import MissingComponentError


def compiled(source: Path) -> Path:
    """The library that is made from a C file, once for each version of it.

    Raises:
        MissingComponentError: there is no compiler.
    """
    key = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    built = REPO_ROOT / f".cache/preload/{source.stem}-{key}.so"
    if not built.exists():
        compiler = shutil.which("gcc")
        if compiler is None:
            raise MissingComponentError("gcc", "scripts/system-packages.sh tests")
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            fresh = Path(folder) / built.name
            command: list[str | Path] = [
                compiler,
                "-shared",
                "-fPIC",
                "-O2",
                "-Wall",
                "-Wextra",
                "-o",
                fresh,
                source,
                "-ldl",
            ]
            subprocess.run(command, check=True, timeout=60)
            fresh.replace(built)
    return built
