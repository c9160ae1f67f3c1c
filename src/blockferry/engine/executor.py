"""Carrying out one step. Every step looks before it acts, so that it can be done twice."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from blockferry.engine import readback
from blockferry.engine.jobsteps import JobSteps, StepFailed
from blockferry.model.domain import Observation
from blockferry.model.graph import Graph
from blockferry.plan import files, steps, tracking
from blockferry.plan.destinations import cache_of
from blockferry.qemu.agent import Agent, AgentRefused, AgentSilent
from blockferry.qemu.bounded import apart
from blockferry.qemu.images import Images
from blockferry.qemu.launch import AlreadyRuns, Home, LaunchFailed, launch
from blockferry.qemu.nbd import flushes, reachable
from blockferry.qemu.observe import Observer
from blockferry.qemu.process import born, ends, kill
from blockferry.qemu.session import CommandRefused, LostReply, Session
from blockferry.qemu.sharing import share
from blockferry.qemu.tool import ImageError

# A file that QEMU has just let go of may still be locked for a moment (tried: gone with the job's dismissal).
LOCK_TRIES, LOCK_PAUSE_SECONDS = 20, 0.01
# A guest that writes all the time leaves the next pass what it wrote during this one: each is a part of the one before.
SYNC_PASSES, SHORT_SYNC_SECONDS = 4, 0.01
# To flush again and again what a guest is writing costs it more than to wait for so much, while its disks get overlays.
SHORT_FLUSH_SECONDS = 0.1
# QEMU closes its images within this time, or is ended without.
QUIT_SECONDS = 10.0
# blockdev-del of a name that no node has, also of one that was closed with what stood on it (block.c, bdrv_lookup_bs); a
# QEMU with other words is looked at.
NO_SUCH_NODE = "Failed to find node"
# Of the outcomes of a freeze and its thaw.
FROZEN_FROM, FROZEN_UNTIL = "frozen_from", "frozen_until"


async def until_short(
    sync: Callable[[], Awaitable[None]], short: float, clock: Callable[[], float] = time.monotonic
) -> None:
    """Write files out, and again while that takes long: what is written meanwhile is left to the guest's pause.

    Args:
        sync: does it once.
        short: seconds.
        clock: seconds.
    """
    for _pass in range(SYNC_PASSES):
        began = clock()
        await sync()
        if clock() - began < short:
            break


class Executor:
    """Carries steps out on one domain.

    Args:
        domain: its name.
        session: to its QEMU; None when QEMU is gone: then only files are left to be dealt with.
        observer: of the same QEMU.
        images: the host's image files.
        home: where the QEMU of a defined domain lives.
        agent: the guest's; None where its socket is not known.
    """

    def __init__(
        self,
        domain: str,
        session: Session | None,
        observer: Observer | None,
        images: Images,
        home: Home,
        *,
        agent: Agent | None = None,
    ) -> None:
        self._domain = domain
        self._agent = agent
        self._home = home
        self._maybe_session = session
        self._maybe_observer = observer
        self._images = images
        # When the window that is being passed has to be over, by the loop's clock.
        self.deadline: float | None = None

    @property
    def _session(self) -> Session:
        if self._maybe_session is None:
            raise StepFailed("QEMU is gone")
        return self._maybe_session

    def _within(self, seconds: float) -> float:
        """So long, or until the window's deadline."""
        left = seconds if self.deadline is None else self.deadline - asyncio.get_running_loop().time()
        return max(0.0, min(seconds, left))

    async def observe(self) -> Observation:
        """The domain now."""
        if self._maybe_observer is None:
            raise StepFailed("QEMU is gone")
        return await self._maybe_observer.observe(self._domain)

    async def graph(self) -> Graph:
        """The graph now."""
        if self._maybe_observer is None:
            raise StepFailed("QEMU is gone")
        return await self._maybe_observer.graph()

    async def do(self, step: steps.Step, claims: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Carry a step out.

        Args:
            step: what to do.
            claims: per path, what `ClaimFile` answered when it was done in this operation.

        Returns:
            What undo and recovery need of it.

        Raises:
            CommandRefused, ImageError, StepFailed: it was not done, with the reason.
            LostReply: nobody knows.
        """
        match step:
            case files.ClaimFile():
                return await self._images.claim(step.path, step.like)
            case files.CreateImage():
                onto = (step.backing, step.backing_format)
                made = await self._images.create(step.path, step.format, step.size, *onto, claim=claims.get(step.path))
                return {"blank": made}
            case files.RemoveFile():
                return {"removed": await self._images.remove(step.path, claims.get(step.path))}
            case files.SyncFiles():
                await self._flush(step.nodes)
                await self._sync(step)
            case files.FlushFiles():
                await until_short(lambda: self._images.flush(step.paths), SHORT_FLUSH_SECONDS)
            case steps.CheckServers():
                for target, uri in step.uris.items():
                    words = await (flushes(uri) if target in step.flush else reachable(uri))
                    if words:
                        raise StepFailed(f"the server of {target}'s destination does not answer: {words}")
            case files.DropFile():
                return {"removed": await self._images.drop(step.path)}
            case files.NameBacking():
                await self._images.name_backing(step.path, step.format, step.backing, step.backing_format)
            case files.MendBacking():
                return {"mended": await self._images.mend_backing(step.header)}
            case files.ShareBlocks():
                await apart(share, step.source, step.file, claims.get(step.file))
            case files.RemoveCopy():
                claimed = {"device": step.device, "inode": step.inode}
                return {"removed": await self._images.remove(step.path, claimed)}
            case steps.Launch():
                return await self._launch(step)
            case steps.EndQemu():
                await self._end_qemu()
            case steps.SetLimits():
                await self._session.execute("block_set_io_throttle", **_limits(step))
            case steps.Stop():
                await self._session.execute("stop")
            case steps.Resume():
                await self._resume(step)
            case steps.Freeze() | steps.Thaw():
                return await self._quiesce(step)
            case _:
                return await self._do_node(step)
        return {}

    async def _do_node(self, step: steps.Step) -> dict[str, Any]:
        match step:
            case steps.AddNode() | tracking.OpenAgain():
                await self._add_node(step)
            case steps.RemoveNode():
                await self._remove_node(step.node, if_unused=step.if_unused)
            case tracking.LeaveDestination():
                return await self._leave(step)
            case steps.RequireSize():
                size = (await self.graph()).nodes[step.node].virtual_size
                if size != step.size:
                    raise StepFailed(f"the destination has {size} bytes, the disk {step.size}")
            case steps.SetBacking():
                await self._set_backing(step)
            case steps.TakeSnapshots():
                actions: list[dict[str, Any]] = [
                    {"type": "blockdev-snapshot", "data": {"node": pair.node, "overlay": pair.overlay}}
                    for pair in step.pairs
                ]
                if step.together:
                    await self._session.execute("transaction", actions=actions)
                elif (await self.graph()).child(step.pairs[0].overlay, "backing") is None:
                    await self._session.execute("blockdev-snapshot", **actions[0]["data"])
            case steps.RequireBacking():
                found = (await self.graph()).child(step.node, "backing")
                if found != step.backing:
                    raise StepFailed(f"the graph shows {step.node} on {found}, not on {step.backing}")
            case steps.RequireRoots():
                await self._require_roots(step)
            case tracking.AddBitmap():
                await self._add_bitmap(step.node, step.bitmap)
            case tracking.RemoveBitmap():
                await self._remove_bitmap(step)
            case tracking.CountAsWritten():
                await self._count(step)
            case tracking.RequireNothingWritten():
                left = await self._counted(step.node, step.bitmap)
                if left:
                    raise StepFailed(f"{left} bytes of {step.node} are not on the destination yet")
            case steps.ReadBack():
                for target, words in (await self.read_back(step.disks)).items():
                    raise StepFailed(f"the destination of {target} does not answer: {words}")
            case _:
                return await JobSteps(self._session, self.graph, self._within).do(step)
        return {}

    # --- nodes ------------------------------------------------------------------------------------------------

    async def _add_node(self, step: steps.AddNode | tracking.OpenAgain) -> None:
        """Open it; looked at only when QEMU refuses: a look costs more than all else here."""
        for attempt in range(LOCK_TRIES):
            try:
                await self._session.execute("blockdev-add", **{"node-name": step.node, **step.options})
            except CommandRefused as refusal:
                if step.node in (await self.graph()).nodes:
                    return  # done before
                if " lock" not in refusal.words or attempt == LOCK_TRIES - 1:
                    raise
                await asyncio.sleep(LOCK_PAUSE_SECONDS)
            else:
                return

    async def _remove_node(self, node: str, *, if_unused: bool = False) -> bool:
        """Close it, and say whether it was there; looked at only when QEMU refuses, which it does for one in use as well."""
        try:
            await self._session.execute("blockdev-del", node_name=node)
        except CommandRefused as refusal:
            if NO_SUCH_NODE not in refusal.words:
                graph = await self.graph()
                if node in graph.nodes and not (if_unused and graph.parents(node)):
                    raise
            return False
        return True

    async def _leave(self, step: tracking.LeaveDestination) -> dict[str, Any]:
        """Its stamp, if it was closed by this very step and all that was written is on disk."""
        if not await self._remove_node(step.node):
            return {}
        try:
            await self._images.sync((step.file,))
        except ImageError:
            return {}
        return {"left": await self._images.stamps((step.file,))}

    async def _set_backing(self, step: steps.SetBacking) -> None:
        graph = await self.graph()
        if step.node not in graph.nodes or graph.child(step.node, "backing") == step.backing:
            return
        node = graph.nodes[step.node]
        options = {
            "driver": step.format,
            "node-name": step.node,
            "file": step.file_node,
            "backing": step.backing,
            **cache_of(node),
            "discard": "unmap",
        }
        try:
            await self._session.execute("blockdev-reopen", options=[options])
        except CommandRefused:
            if not step.if_possible:
                raise

    async def _add_bitmap(self, node: str, name: str) -> None:
        try:
            await self._session.execute("block-dirty-bitmap-add", node=node, name=name, granularity=tracking.CHUNK)
        except CommandRefused:
            found = (await self.graph()).nodes.get(node)
            if found is None or name not in found.bitmaps:
                raise

    async def _remove_bitmap(self, step: tracking.RemoveBitmap) -> None:
        try:
            await self._session.execute("block-dirty-bitmap-remove", node=step.node, name=step.bitmap)
        except CommandRefused:
            found = (await self.graph()).nodes.get(step.node)
            if found is not None and step.bitmap in found.bitmaps:
                raise

    async def _count(self, step: tracking.CountAsWritten) -> None:
        """Write to the scratch node, whose bitmap counts it, and merge that one."""
        await self._add_bitmap(step.scratch, step.bitmap)
        for offset, length in step.extents:
            await self._qemu_io(step.scratch, f"write -q -z {offset} {length}")
        counted = await self._counted(step.scratch, step.bitmap)
        wanted = sum(length for _offset, length in step.extents)
        if counted < wanted:
            raise StepFailed(f"QEMU counts {counted} of {wanted} bytes")
        counts = [{"node": step.scratch, "name": step.bitmap}]
        await self._session.execute("block-dirty-bitmap-merge", node=step.node, target=step.bitmap, bitmaps=counts)

    async def _counted(self, node: str, bitmap: str) -> int:
        found = (await self.graph()).nodes.get(node)
        if found is None or bitmap not in found.bitmaps:
            raise StepFailed(f"{node} has no bitmap {bitmap} any more")
        return found.bitmaps[bitmap].count

    async def _require_roots(self, step: steps.RequireRoots) -> None:
        # A node with a filter on top is under it: that takes a look at the whole graph.
        if self._maybe_observer is not None and step.roots.items() <= (await self._maybe_observer.roots()).items():
            return
        graph = await self.graph()
        for backend, node in step.roots.items():
            root = graph.child(backend, "root")
            if root is None or graph.below_filters(root) != node:
                raise StepFailed(f"the graph shows {backend} on {root}, not on {node}")

    async def read_back(self, disks: Mapping[str, str]) -> dict[str, str]:
        """Those of these disks (target -> drive) that do not answer a read, with the reason."""
        return await readback.read_back(self._session, disks, self._within(readback.READ_BACK_SECONDS))

    async def _sync(self, step: files.SyncFiles) -> None:
        # In a window nobody writes meanwhile: again would only be longer.
        running = self.deadline is None

        def sync() -> Awaitable[None]:
            return self._images.sync(step.paths, step.readable, in_use=running)

        await (until_short(sync, SHORT_SYNC_SECONDS) if running else sync())

    async def _flush(self, nodes: tuple[str, ...]) -> None:
        for node in nodes:
            if words := await self._qemu_io(node, "flush"):
                raise StepFailed(f"flush {node}: {words}")

    async def _qemu_io(self, where: str, command: str) -> str:
        """An access that QMP has no command for. HMP says when there is nothing of that name, not when the access fails."""
        answer = await self._session.execute("human-monitor-command", command_line=f'qemu-io {where} "{command}"')
        return str(answer).strip()

    # --- QEMU itself ------------------------------------------------------------------------------------------

    async def _launch(self, step: steps.Launch) -> dict[str, Any]:
        try:
            launched = await launch(
                self._home,
                step.program,
                step.arguments,
                step.environment,
                templates=step.templates,
                run_as=step.run_as,
            )
        except (LaunchFailed, AlreadyRuns) as failure:
            raise StepFailed(str(failure)) from failure
        return {"pid": launched.pid, "born": launched.born}

    async def _end_qemu(self) -> None:
        session = self._maybe_session
        if session is None or session.pid is None:
            return
        started = born(session.pid)
        # It closes its connections before it has answered, now and then.
        with contextlib.suppress(CommandRefused, LostReply):
            await session.execute("quit", seconds=QUIT_SECONDS)
        if not await ends(session.pid, started, QUIT_SECONDS):
            kill(session.pid, started)
            await ends(session.pid, started, QUIT_SECONDS)

    # --- the guest --------------------------------------------------------------------------------------------

    async def _resume(self, step: steps.Resume) -> None:
        """Let the guest run if it is paused; a guest that is stopped for another reason (io-error) is not ours."""
        status = await self._session.execute("query-status")
        if status["status"] == "paused" or (step.first and status["status"] == "prelaunch"):
            await self._session.execute("cont")

    async def _quiesce(self, step: steps.Freeze | steps.Thaw) -> dict[str, Any]:
        """Freeze or thaw; when, by the clock that goes on whatever is set, and the same in every process."""
        if self._agent is None:
            raise StepFailed("the socket of the guest's agent is not known")
        try:
            if isinstance(step, steps.Freeze):
                asked = time.monotonic()
                return {"file_systems": await self._agent.freeze(), FROZEN_FROM: asked}
            held = await self._agent.thaw()
        except (AgentSilent, AgentRefused) as failure:
            raise StepFailed(f"the guest's agent: {failure}") from failure
        if step.held and not held:
            raise StepFailed("they did not stay frozen until then: the guest, or somebody else, has thawed them")
        return {FROZEN_UNTIL: time.monotonic()}


def _limits(step: steps.SetLimits) -> dict[str, Any]:
    """The arguments of block_set_io_throttle, of libvirt's `<iotune>` names; the first six have to be there."""
    names = {"total_bytes": "bps", "read_bytes": "bps_rd", "write_bytes": "bps_wr"}
    names |= {"total_iops": "iops", "read_iops": "iops_rd", "write_iops": "iops_wr"}
    said: dict[str, Any] = {"id": step.device, **dict.fromkeys(names.values(), 0)}
    for name, number in step.limits.items():
        what, _, more = name.partition("_sec")
        said["iops_size" if what == "size_iops" else names[what] + more] = number
    return said
