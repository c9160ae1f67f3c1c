"""What can be a name and what can be a path, whichever way a caller says it."""

from __future__ import annotations

import re

# Linux's PATH_MAX, less the zero at the end.
PATH_BYTES_MAX = 4095

# IANA's port for NBD, and QEMU's own limit of an export's name (include/block/nbd.h, NBD_MAX_STRING_SIZE).
NBD_PORT = 10809
NBD_EXPORT_NAME_MAX = 4096

# Names become parts of file names and of QEMU's node names, and words of a command line: hence no leading '-' or '.'.
_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]{0,59}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def valid_name(name: str) -> bool:
    """Whether `name` can be the name of a domain or a snapshot; `errors.InvalidName` has the rule in words."""
    return _NAME.fullmatch(name) is not None


def path_flaw(path: str) -> str | None:
    """Why `path` can't be the path of an image, in words that follow the path; None when it can."""
    if not path.startswith("/"):
        return "is not an absolute path"
    if _CONTROL.search(path):
        return "has a control character in it"
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        # QMP and the journal are UTF-8; a name of other bytes could not be said to QEMU.
        return "is not UTF-8"
    if length > PATH_BYTES_MAX:
        return f"is longer than {PATH_BYTES_MAX} bytes"
    if ".." in path.split("/"):
        return "has a '..' in it"
    if path.endswith("/"):
        return "is a directory"
    return None
