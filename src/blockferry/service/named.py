"""The files that callers have named, as the journal has them: what an image's header may lead to is near one of these."""

from __future__ import annotations

from collections.abc import Iterator

from blockferry.formats.definition import parse_definition
from blockferry.journal.journal import Journal
from blockferry.model.blockjob import Mirror


def named_files(journal: Journal) -> Iterator[str]:
    """Images of definitions, snapshots, mirrors, copies and moves of all domains; some are URIs, or not there any more."""
    for record in journal.domains():
        defined = journal.definition(record.name)
        if defined is not None:
            yield from parse_definition(defined.xml).images
            yield from (file for file, _format in defined.images.values())
        for snapshot in journal.snapshots(record.name):
            for disk in snapshot.disks:
                files = (disk.file, disk.backing, disk.mirror, disk.mirror_backing)
                yield from (file for file in files if file is not None)
        for move in journal.moves(record.name):
            yield from move.images
        for job in journal.jobs(record.name):
            if isinstance(job, Mirror):
                yield from (file for file in (job.file, job.source, job.backing) if file is not None)
