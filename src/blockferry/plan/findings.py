"""What is wrong with a domain: what the journal believes of it, what QEMU shows and what its files say, compared.

Pure: service.doctor looks, this judges. Each finding has what to type; nothing here is ever done by itself.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping

import msgspec

from blockferry.model.blockjob import BlockJob, Mirror
from blockferry.model.definition import Definition
from blockferry.model.domain import Observation
from blockferry.model.files import FileFact, ImageFact
from blockferry.model.graph import Disk, Image
from blockferry.model.snapshot import Snapshot
from blockferry.model.view import Finding
from blockferry.plan.disks import is_forgotten, job_on
from blockferry.plan.installed import can_do
from blockferry.plan.plan import Names, is_ours
from blockferry.plan.resting import lost_with_guest

# Under this an overlay that grows is soon out of room.
LITTLE_ROOM_BYTES = 1 << 30


class Belief(msgspec.Struct, frozen=True, kw_only=True):
    """The image that an operation left a disk on; `old`: the domain was attached anew since.

    `format` is the image's where the operation made it another than before.
    """

    file: str
    operation: int
    format: str | None = None
    old: bool = False


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """A file that an operation of ours created; `identity` as FileFact's."""

    path: str
    operation: int
    identity: str


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """An operation that is not over: what it is, whether it needs settling, and what can be typed."""

    operation: int
    text: str
    unsettled: bool
    next: tuple[str, ...] = ()


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known of one domain.

    Attributes:
        domain: its name.
        qmp: its QMP socket.
        tag: the state directory's, which our names in QEMU begin with.
        defined: whether we start it.
        seen: as observed; None when it is shut off, gone or can't be asked.
        gone: why its QEMU is known to have ended, for one that was not ended by us; None otherwise.
        problem: why it can't be asked; None when it could, or is shut off.
        definition: what is started next, of a domain that we start.
        closed: target -> its images as their headers say, of one that is shut off.
        refusal: why a start would be refused, as far as it can be told.
        dropped: target -> why a start would drop its mirror, of those that it would.
        beliefs: target -> the image that it was left on.
        operations: those that are not over.
        jobs: the newest of each disk.
        snapshots: oldest first.
        made: files that operations of ours created.
        mentioned: real paths and identities of all files in any chain, snapshot or mirror of any domain.
        facts: path -> what it is, of every file that is spoken of.
        headers: path -> what its header says, of every image in a chain that is open.
    """

    domain: str
    qmp: str
    tag: str
    defined: bool = False
    seen: Observation | None = None
    gone: str | None = None
    problem: str | None = None
    definition: Definition | None = None
    closed: Mapping[str, tuple[ImageFact, ...]] = {}
    refusal: str | None = None
    dropped: Mapping[str, str] = {}
    beliefs: Mapping[str, Belief] = {}
    operations: tuple[Open, ...] = ()
    jobs: tuple[BlockJob, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    made: tuple[Made, ...] = ()
    mentioned: frozenset[str] = frozenset()
    facts: Mapping[str, FileFact] = {}
    headers: Mapping[str, ImageFact] = {}

    def absent(self, path: str) -> bool:
        """Whether a file is known not to be there."""
        fact = self.facts.get(path)
        return fact is not None and fact.kind == "absent"


def examine(case: Case) -> tuple[Finding, ...]:
    """All findings of a domain, in the order in which they matter; a part that is in order says so in one."""
    parts = [_operations(case)]
    if case.seen is not None:
        parts = [_running(case, case.seen), *parts, _places(case, case.seen), _chains(case, case.seen)]
        parts += [_jobs(case, case.seen), _nodes(case, case.seen)]
    elif case.definition is not None and case.problem is None:
        parts = [_shut_off(case, case.definition), *parts, _resting(case)]
    else:
        parts = [_out_of_reach(case), *parts]
    parts += [_lost(case), _snapshots(case), _left_over(case)]
    found = (finding for part in parts for finding in part)
    return tuple(msgspec.structs.replace(finding, domain=case.domain) for finding in found)


def ok(code: str, text: str) -> Finding:
    """Something that is as it should be."""
    return Finding(severity="ok", code=code, text=text)


def note(code: str, text: str, *commands: str, disk: str | None = None) -> Finding:
    """Something to know."""
    return Finding(severity="note", code=code, text=text, disk=disk, next=commands)


def problem(code: str, text: str, *commands: str, disk: str | None = None) -> Finding:
    """Something to mend."""
    return Finding(severity="problem", code=code, text=text, disk=disk, next=commands)


# --- the guest ------------------------------------------------------------------------------------------------


def _running(case: Case, seen: Observation) -> Iterator[Finding]:
    text = f"QEMU {seen.capabilities.version}" + (f", pid {seen.pid}" if seen.pid is not None else "")
    resume = f"blockferry resume {case.domain}"
    if seen.status == "io-error":
        yield problem("io-error", f"{text}: the guest stands still because a disk failed or is full", resume)
    elif not seen.running and seen.status != "shutdown":
        yield note("paused", f"{text}: the guest is {seen.status}", resume)
    else:
        yield ok("reachable", f"{text}: the guest is {seen.status}")
    yield from can_do(f"QEMU {seen.capabilities.version}", seen.capabilities.commands)


def _out_of_reach(case: Case) -> Iterator[Finding]:
    attach = _attach(case)
    if case.gone is None:
        again = "blockferry recover" if case.defined else attach
        yield problem("unreachable", case.problem or "it could not be asked", again)
        return
    yield problem(
        "qemu-gone",
        f"{case.gone}. Start the guest on the images below, attach it again, or detach it",
        attach,
        f"blockferry detach {case.domain}",
    )
    for target, belief in sorted(case.beliefs.items()):
        words = f"{belief.file} holds what it held (operation {belief.operation})"
        if case.absent(belief.file):
            yield problem("image-missing", f"{words}, and it is not there", disk=target)
        else:
            yield note("start-on", words, disk=target)


def _attach(case: Case) -> str:
    return f"blockferry attach {case.domain} --qmp {_quoted(case.qmp)}"


def _operations(case: Case) -> Iterator[Finding]:
    for each in case.operations:
        words = f"operation {each.operation}, {each.text}"
        if each.unsettled:
            yield problem("unsettled", f"{words}, is not settled: nothing new is begun until it is", *each.next)
        elif case.definition is None:  # of one that is shut off the mirrors that rest are told
            yield note("in-progress", f"{words}, goes on", *each.next)


# --- one that is shut off -------------------------------------------------------------------------------------


def _shut_off(case: Case, definition: Definition) -> Iterator[Finding]:
    found: list[Finding] = []
    if case.gone is not None:
        start = f"blockferry start {case.domain}"
        found.append(problem("crashed", f"nobody ended it: {case.gone}", start))
    sources = {disk.target: disk.source for disk in definition.disks if disk.source is not None}
    for target, chain in case.closed.items():
        kind = "block device" if sources[target].kind == "block" else "image"
        for depth, image in enumerate(chain):
            if image.problem:
                text = f"{image.path}: {image.problem}: {target} can't be started on it"
                found.append(problem("image-unusable", text, *_mend_header(chain, depth), disk=target))
        fact = case.facts.get(sources[target].where)
        # Only of the top: images below may be shared.
        if fact is not None and fact.used:
            found.append(problem("image-in-use", f"{fact.path}: somebody has this {kind} open", disk=target))
        elif fact is not None and fact.problem and fact.kind == "block":
            found.append(problem("image-unusable", f"{fact.path}: {fact.problem}", disk=target))
    boot = definition.boot
    to_be_made = any(case.absent(path) for path in boot.templates)
    for what, path in (
        ("kernel", boot.kernel),
        ("initrd", boot.initrd),
        ("loader", boot.loader),
        ("nvram's template", boot.template) if to_be_made else ("nvram", boot.nvram),
    ):
        if path is not None and case.absent(path):
            found.append(problem("boot-file-missing", f"its {what} {path} is not there"))
    if not found and case.refusal is not None:
        found.append(problem("would-not-start", case.refusal))
    yield from found or [ok("startable", "it is shut off, and all that it is started on is there")]
    for path in definition.ignored:
        yield note("not-carried-out", f"<{path}> is kept, and not carried out")


def _mend_header(chain: tuple[ImageFact, ...], depth: int) -> tuple[str, ...]:
    """What names the right format in the header above an image whose format nobody says."""
    image = chain[depth]
    if depth == 0 or image.format:
        return ()
    above = chain[depth - 1]
    return (f"qemu-img rebase -u -f {above.format} -F FORMAT -b {_quoted(image.path)} {_quoted(above.path)}",)


def _resting(case: Case) -> Iterator[Finding]:
    for mirror in case.jobs:
        if not isinstance(mirror, Mirror) or mirror.state != "resting":
            continue
        why = case.dropped.get(mirror.target)
        words = f"its mirror to {mirror.file}"
        if why is None:
            start = f"blockferry start {case.domain}"
            yield note("mirror-resting", f"{words} rests, and goes on when it is started", start, disk=mirror.target)
        else:
            dropped = f"{words} is dropped when it is started: {why}"
            refuse = f"blockferry start {case.domain} --require-mirrors"
            yield problem("mirror-gone", dropped, refuse, disk=mirror.target)


# --- disks and chains of one that runs ------------------------------------------------------------------------


def _places(case: Case, seen: Observation) -> Iterator[Finding]:
    """Whether each disk is where the journal left it."""
    found = []
    sources = {job.target: job.source for job in case.jobs if isinstance(job, Mirror) and job.state == "active"}
    for target, belief in sorted(case.beliefs.items()):
        disk = seen.disk(target)
        if disk is None or not disk.chain:
            words = (
                f"operation {belief.operation} left {target} on {belief.file}, and it has no such disk, or no medium"
            )
            found.append(note("disk-missing", words, disk=target))
        elif not _same(case, disk.active.file, belief.file):
            found.append(_elsewhere(case, disk, belief))
    for target, source in sources.items():
        disk = seen.disk(target)
        if disk is not None and disk.chain and not _same(case, disk.active.file, source):
            text = f"{source} is mirrored, and the guest is on {disk.active.file}"
            found.append(
                problem("mirror-elsewhere", text, f"blockferry job cancel {case.domain} {target}", disk=target)
            )
    yield from found or [ok("graph-agrees", "every disk is on the image that the journal says")]


def _elsewhere(case: Case, disk: Disk, belief: Belief) -> Finding:
    words = f"it is on {disk.active.file}, and operation {belief.operation} left it on {belief.file}"
    if case.absent(belief.file) or belief.old:
        why = "which is not there any more" if case.absent(belief.file) else "before it was attached anew"
        return note("disk-elsewhere", f"{words}, {why}", disk=disk.target)
    lost = "what the guest wrote there it does not see now"
    return problem(
        "disk-elsewhere",
        f"{words}: somebody has moved it, or has started the guest on an old image, and {lost}",
        f"blockferry operations show {belief.operation}",
        disk=disk.target,
    )


def _chains(case: Case, seen: Observation) -> Iterator[Finding]:
    """Whether each chain would open again: its files are there, and their headers say what the graph says."""
    found: list[Finding] = []
    for disk in seen.disks:
        for depth, image in enumerate(disk.chain):
            below = disk.chain[depth + 1] if depth + 1 < len(disk.chain) else None
            if image.file.startswith("/"):
                found += _image(case, disk, image, below)
        fact = case.facts.get(disk.active.file) if disk.chain else None
        if fact is not None and fact.kind == "file" and fact.free < LITTLE_ROOM_BYTES:
            grows = disk.active.virtual_size - fact.allocated
            if grows > fact.free:
                text = f"{disk.active.file} may grow by {_size(grows)}, and {_size(fact.free)} are free"
                found.append(note("little-room", text, disk=disk.target))
    yield from found
    if not any(finding.severity == "problem" for finding in found):
        yield ok("chains-open", "every image is there, and its header says what the graph shows")


def _image(case: Case, disk: Disk, image: Image, below: Image | None) -> Iterator[Finding]:
    target = disk.target
    if case.absent(image.file):
        text = f"{image.file} was removed while QEMU has it open: its data is lost when QEMU ends"
        yield problem("image-deleted", text, f"blockferry copy {case.domain} {target} NEWFILE --pivot", disk=target)
        return
    header = case.headers.get(image.file)
    if header is None:
        return
    if header.problem is not None:
        yield problem("image-unusable", f"{image.file}: {header.problem}", disk=target)
        return
    named, shown = header.backing, below.file if below is not None else None
    if named is not None and shown is not None and header.real_backing == _real(case, shown):
        if below is not None and header.backing_format != below.format:
            text = f"{image.file}'s header says {header.backing_format or 'nothing'} of the format of {shown}"
            yield problem("header-format", f"{text}: it is {below.format}", *_rebase(image, below), disk=target)
        return
    if named == shown or (shown is not None and not shown.startswith("/")):
        return
    text = f"{image.file}'s header names {named or 'no backing'}, and QEMU has it on {shown or 'nothing'}"
    if named is None and _nameless(case, image.file):
        yield note("header-names-none", f"{text}: so it was asked for (mode none)", disk=target)
    else:
        mend = ": the chain does not open again as it is. It can be mended when the guest is shut off"
        yield problem("header-differs", f"{text}{mend}", *_rebase(image, below), disk=target)


def _rebase(image: Image, below: Image | None) -> tuple[str, ...]:
    onto = f"-F {below.format} -b {_quoted(below.file)}" if below is not None else "-b ''"
    return (f"qemu-img rebase -u -f {image.format} {onto} {_quoted(image.file)}",)


def _nameless(case: Case, file: str) -> bool:
    """Whether a snapshot's image was made with a header that names no backing, on request."""
    return any(
        disk.mode == "none" and file in (disk.file, disk.mirror) for each in case.snapshots for disk in each.disks
    )


def _real(case: Case, path: str) -> str:
    fact = case.facts.get(path)
    return fact.real if fact is not None else path


def _same(case: Case, one: str, other: str) -> bool:
    facts = case.facts.get(one), case.facts.get(other)
    return one == other or (facts[0] is not None and facts[1] is not None and facts[0].is_same(facts[1]))


# --- jobs and nodes in QEMU -----------------------------------------------------------------------------------


def _jobs(case: Case, seen: Observation) -> Iterator[Finding]:
    found = []
    working = {job.job: job for job in case.jobs if job.state == "active"}
    for name, job in working.items():
        now = seen.jobs.get(name)
        if now is None:
            text = f"the journal has a {job.type} that works, and QEMU has no job {name}"
            found.append(problem("job-missing", text, "blockferry recover", disk=job.target))
        elif now.error is not None or now.io_status != "ok":
            text = f"its {job.type} is {now.status}: {now.error or f'a destination says {now.io_status}'}"
            found.append(
                problem("job-stuck", text, f"blockferry job cancel {case.domain} {job.target}", disk=job.target)
            )
    for name in sorted(_foreign(case, seen.jobs)):
        command = _qmp("job-cancel" if not seen.jobs[name].over else "job-dismiss", id=name)
        text = f"QEMU has a job {name} of ours that the journal does not know; QMP ends it"
        found.append(problem("job-unknown", text, command))
    yield from found or [ok("jobs-agree", f"jobs that work: {', '.join(sorted(working)) or 'none'}")]


def _nodes(case: Case, seen: Observation) -> Iterator[Finding]:
    """Nodes of ours that nothing uses, the topmost of each tree: what is under it is closed with it."""
    edges = seen.graph.edges
    reached = {edge.child for edge in edges if edge.parent not in seen.graph.nodes}
    reached |= {disk.root for disk in seen.disks if disk.root is not None}
    waiting = list(reached)
    while waiting:
        name = waiting.pop()
        below = {edge.child for edge in edges if edge.parent == name} - reached
        reached |= below
        waiting += below
    found = []
    for disk in seen.disks:
        job = job_on(disk, seen)
        if job is not None and is_forgotten(job, seen):
            text = (
                f"{job}, the filter of a job that is no more, is above its image: QEMU starts no other job there until the "
                "guest is started anew"
            )
            found.append(problem("filter-left", text, disk=disk.target))
    for name in sorted(_foreign(case, seen.graph.nodes) - reached):
        if not seen.graph.parents(name):
            text = f"QEMU has a node {name} of ours on {seen.graph.nodes[name].filename}, and nothing uses it; QMP closes it"
            found.append(problem("node-left", text, _qmp("blockdev-del", node_name=name)))
    yield from found or [ok("nodes-used", "no node of ours is left over in QEMU")]


def _foreign(case: Case, names: Mapping[str, object]) -> set[str]:
    """Of these names those that are ours, and belong to nothing that goes on."""
    numbers = {job.operation for job in case.jobs if job.state == "active"}
    numbers |= {each.operation for each in case.operations}
    known = {job.job for job in case.jobs if job.state == "active"}
    for copy in (job.copy for job in case.jobs if job.state == "active"):
        known |= {copy.node, copy.file_node, copy.filter_node, copy.job} if copy is not None else set()
    stems = tuple(f"{Names(case.tag, number).stem}-" for number in numbers)
    ours = {name for name in names if is_ours(name, case.tag)}
    return {name for name in ours - known if not (stems and name.startswith(stems))}


def _qmp(command: str, **arguments: str) -> str:
    sent = {name.replace("_", "-"): value for name, value in arguments.items()}
    return json.dumps({"execute": command, "arguments": sent})


# --- what the journal remembers -------------------------------------------------------------------------------


def _lost(case: Case) -> Iterator[Finding]:
    alive = {snapshot.name for snapshot in case.snapshots}
    for job in case.jobs:
        if job.state != "lost" or not isinstance(job, Mirror):
            continue
        text = f"its {job.type} to {job.file} was lost: {job.reason or 'no reason is known'}"
        goes_on = _goes_on(case, job)
        if job.snapshot in alive:
            remove = f"blockferry snapshot delete {case.domain} {job.snapshot} --remove-mirror"
            text += ". What was written since is on its source alone"
            yield problem("mirror-lost", text, *goes_on, remove, disk=job.target)
        else:
            anew = f"blockferry copy {case.domain} {job.target} NEWFILE"
            yield note("mirror-lost", text, *goes_on or (anew,), disk=job.target)


def _goes_on(case: Case, job: Mirror) -> tuple[str, ...]:
    """What goes on with a mirror that ended before its time; nothing where it can't be gone on with."""
    if not case.defined and lost_with_guest(job):
        return (f"{_attach(case)} --resume-mirrors",)
    disk = case.seen.disk(job.target) if case.seen is not None else None
    if disk is None or not disk.chain or job.state not in ("lost", "cancelled") or job.bitmap is None:
        return ()
    resumable = disk.active.node == job.source_node and not case.absent(job.file)
    return (f"blockferry copy {case.domain} {job.target} {_quoted(job.file)} --resume",) if resumable else ()


def _snapshots(case: Case) -> Iterator[Finding]:
    found = []
    open_files = {image.file for disk in case.seen.disks for image in disk.chain} if case.seen is not None else set()
    for snapshot in case.snapshots:
        for disk in snapshot.disks:
            for what, path in (("image as of it", disk.backing), ("overlay", disk.file)):
                # What QEMU still has open is told with the chains, with how to save it.
                left = what == "overlay" and disk.target in snapshot.reverted
                if case.absent(path) and path not in open_files and not left:
                    text = f"{path}, snapshot {snapshot.name}'s {what}, is not there"
                    forget = f"blockferry snapshot delete {case.domain} {snapshot.name} --metadata"
                    found.append(problem("snapshot-image-missing", text, forget, disk=disk.target))
    if found or case.snapshots:
        whole = f"the images of {len(case.snapshots)} snapshot{'s' if len(case.snapshots) != 1 else ''} are there"
        yield from found or [ok("snapshots-whole", whole)]


def _left_over(case: Case) -> Iterator[Finding]:
    """Files of ours that nothing mentions any more; they are named, and stay until somebody removes them."""
    seen = set()
    goes_on = {job.file: _goes_on(case, job) for job in case.jobs if isinstance(job, Mirror)}
    if case.seen is None and case.definition is None:
        return  # nobody knows what the guest stands on
    for made in case.made:
        fact = case.facts.get(made.path)
        if fact is None or fact.kind != "file" or fact.identity != made.identity or fact.identity in seen:
            continue
        if fact.identity in case.mentioned or fact.real in case.mentioned:
            continue
        seen.add(fact.identity)
        text = f"{made.path} ({_size(fact.allocated)}) was made by operation {made.operation}, and is in no chain now"
        if fact.used:
            yield note("file-left", f"{text}; somebody has it open")
        else:
            again = goes_on.get(made.path, ())
            yield note("file-left", f"{text}, and in no snapshot or mirror", *again, f"rm {_quoted(made.path)}")


def _size(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def _quoted(path: str) -> str:
    return shlex.quote(path)
