"""The library: a ferry, its domains, their snapshots, jobs and moves, over a service in this process or over HTTP.

The names are libvirt's, in snake_case; what comes back are the views of model.view.
"""

from blockferry.client.asking import Transport
from blockferry.client.domain import Domain
from blockferry.client.ferry import Ferry, connect
from blockferry.client.jobs import BlockJob
from blockferry.client.moves import StorageMove
from blockferry.client.snapshots import DomainSnapshot

__all__ = ["BlockJob", "Domain", "DomainSnapshot", "Ferry", "StorageMove", "Transport", "connect"]
