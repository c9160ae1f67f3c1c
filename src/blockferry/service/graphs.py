"""The block graph, to be drawn: as QEMU shows it, or as a guest that is shut off would be started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from blockferry import errors
from blockferry.answers import OVER
from blockferry.engine.progress import state_of
from blockferry.formats.definition import parse_definition
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.blockjob import BlockJob, Mirror
from blockferry.model.definition import Definition
from blockferry.model.domain import Observation
from blockferry.model.files import ImageFact
from blockferry.model.graph import FILTERS, Graph, Node
from blockferry.model.job import Job
from blockferry.service.desk import Desk

# Filters of jobs that are not ours, and of debugging, are drawn as what they are.
_DRAWN_AS_FILTERS = FILTERS | {"copy-before-write", "compress", "preallocate", "blkdebug", "blklogwrites"}
# An end that leaves nothing to draw; a job that was lost is drawn, as `show` shows it.
_OVER = OVER | {"done"}


class Graphs:
    """The room where graphs are drawn.

    Args:
        desk: what the rooms share.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def show(self, request: ask.ShowGraph) -> view.GraphView:
        """One domain's graph."""
        keeper = self._desk.keeper(request.domain)
        try:
            seen = await keeper.observe()
        except errors.NotRunning:
            definition = parse_definition(await self._desk.inactive(keeper.name))
            chains = await self._desk.chains(definition)
            return shut_off_graph(keeper.name, definition, chains, self._desk.journal.jobs(keeper.name))
        return graph_view(keeper.name, seen, self._desk.journal.jobs(keeper.name))


def graph_view(domain: str, seen: Observation, jobs: tuple[BlockJob, ...]) -> view.GraphView:
    """The graph of a guest that runs.

    Args:
        domain: its name.
        seen: as observed.
        jobs: the newest job of ours of each disk.
    """
    graph = seen.graph
    edges = sorted(edge for edge in graph.edges if edge.parent in graph.nodes)
    users, used = {edge.parent for edge in edges}, {edge.child for edge in graph.edges}
    nodes = tuple(_node(node, bottom=node.name not in users) for node in graph.nodes.values())
    ours = tuple(_our_job(job, seen) for job in jobs if _is_drawn(job, seen))
    others = tuple(_their_job(graph, job) for job in seen.jobs.values() if job.id not in {each.id for each in ours})
    return view.GraphView(
        domain=domain,
        state=seen.status,
        devices=tuple(
            view.GraphDevice(
                target=disk.target,
                bus=disk.bus,
                device=disk.device,
                qdev=disk.qdev,
                read_only=disk.read_only,
                root=disk.root,
            )
            for disk in seen.disks
        ),
        nodes=tuple(sorted(nodes, key=lambda node: node.id)),
        edges=tuple(view.GraphEdge(parent=each.parent, role=each.role, child=each.child) for each in edges),
        jobs=ours + others,
        users=tuple(_users(seen)),
        unused=tuple(sorted(graph.nodes.keys() - used)),
    )


def _node(node: Node, *, bottom: bool) -> view.GraphNode:
    kind = "filter" if node.driver in _DRAWN_AS_FILTERS else "protocol" if bottom else "format"
    return view.GraphNode(
        id=node.name,
        kind=kind,
        driver=node.driver,
        # What QEMU calls the file of a format is the protocol's, or a `json:{...}` of all that is under it.
        file=(node.filename or None) if kind == "protocol" else None,
        virtual_size=node.virtual_size,
        read_only=node.read_only,
    )


def _is_drawn(job: BlockJob, seen: Observation | None) -> bool:
    return state_of(job, seen.jobs.get(job.job) if seen is not None else None) not in _OVER


def _our_job(ours: BlockJob, seen: Observation | None) -> view.GraphJob:
    job = seen.jobs.get(ours.job) if seen is not None else None
    source, dest, file = _ends(ours, seen.graph if seen is not None else None)
    return view.GraphJob(
        id=ours.job,
        type=ours.type,
        state=state_of(ours, job),
        disk=ours.target,
        source=source,
        dest=dest,
        file=file,
        current=job.current if job is not None else 0,
        total=job.total if job is not None else 0,
        base=_base(ours, seen) if seen is not None and isinstance(ours, Mirror) and dest is not None else None,
        operation=ours.operation,
        snapshot=ours.snapshot if isinstance(ours, Mirror) else None,
        reason=ours.reason or (job.error if job is not None else None),
    )


def _ends(ours: BlockJob, graph: Graph | None) -> tuple[str | None, str | None, str]:
    """The nodes that data comes from and goes to, and the file that it goes to."""
    if isinstance(ours, Mirror):
        return _first(graph, ours.filter_node, ours.device, ours.source_node), _first(graph, ours.node), ours.file
    pulls = ours.type in ("rebase", "fill")
    into = ours.top if pulls or ours.base is None else ours.base
    read = ours.leaving[0] if pulls and ours.leaving else ours.top
    main = graph.child(ours.job, "main node") if graph is not None else None
    # Above what a fill writes to is the stream's own filter, which nothing else uses.
    above = main if graph is not None and main is not None and ours.type == "fill" else None
    return _first(graph, read.node), _first(graph, above, into.node), into.file


def _first(graph: Graph | None, *names: str | None) -> str | None:
    return next((name for name in names if name is not None and graph is not None and name in graph.nodes), None)


def _base(ours: Mirror, seen: Observation) -> str | None:
    """What a mirror's destination is joined to in the window: an image of its disk's chain."""
    disk = seen.disk(ours.target)
    if ours.backing is None or disk is None or seen.graph.child(ours.node, "backing") is not None:
        return None
    return next((image.node for image in disk.chain if image.file == ours.backing), None)


def _their_job(graph: Graph, job: Job) -> view.GraphJob:
    """A job that somebody else has started: QEMU's words, and where it stands in the graph."""
    main, target = graph.child(job.id, "main node"), graph.child(job.id, "target")
    return view.GraphJob(
        id=job.id,
        type=job.type,
        state=job.status,
        disk=None,
        source=main,
        dest=target,
        file=graph.nodes[graph.protocol(target)].filename or None if target is not None else None,
        current=job.current,
        total=job.total,
        reason=job.error,
    )


def _users(seen: Observation) -> Iterator[view.GraphUser]:
    """What is neither a node, a disk nor a job, and uses one. A job's target is held without a name as well."""
    graph = seen.graph
    known = {*graph.nodes, *seen.jobs, *(disk.backend for disk in seen.disks)}
    targets = {edge.child for edge in graph.edges if edge.parent in seen.jobs}
    for edge in sorted(graph.edges):
        if edge.parent not in known and (edge.parent or edge.child not in targets):
            yield view.GraphUser(name=edge.parent, node=edge.child)


def shut_off_graph(
    domain: str, definition: Definition, chains: Mapping[str, tuple[ImageFact, ...]], jobs: tuple[BlockJob, ...]
) -> view.GraphView:
    """The graph that a guest would be started with: its images, which are no nodes yet.

    Args:
        domain: its name.
        definition: what is started.
        chains: each disk's images, top first.
        jobs: the newest job of ours of each disk.
    """
    nodes: dict[str, view.GraphNode] = {}
    edges: set[tuple[str, str]] = set()
    for disk in definition.disks:
        for depth, image in enumerate(chains.get(disk.target, ())):
            nodes.setdefault(
                image.path,
                view.GraphNode(
                    id=image.path,
                    kind="image",
                    driver=image.format,
                    file=image.path,
                    virtual_size=image.virtual_size or None,
                    read_only=disk.read_only or depth > 0,
                ),
            )
            if depth:
                edges.add((chains[disk.target][depth - 1].path, image.path))
    return view.GraphView(
        domain=domain,
        state="shut off",
        devices=tuple(
            view.GraphDevice(
                target=disk.target,
                bus=disk.bus,
                device=disk.device,
                qdev=disk.id,
                read_only=disk.read_only,
                root=chains[disk.target][0].path if chains.get(disk.target) else None,
            )
            for disk in definition.disks
        ),
        nodes=tuple(nodes.values()),
        edges=tuple(view.GraphEdge(parent=above, role="backing", child=below) for above, below in sorted(edges)),
        jobs=tuple(_our_job(job, None) for job in jobs if _is_drawn(job, None)),
    )
