"""The services of the mesh that users may call, and the protos that describe them.

The edge routes these services and reflection shows them. What the services call among themselves is
in files of its own, `*_internal.proto`, which are not listed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from headrace.cost.v1 import cost_pb2
from headrace.embedding.v1 import embedding_pb2
from headrace.inference.v1 import inference_pb2
from headrace.jobs.v1 import jobs_pb2
from headrace.registry.v1 import registry_pb2
from headrace.router.v1 import router_pb2

# The busiest first: the edge compares a path with one route after the other.
PUBLIC_FILES: tuple[FileDescriptor, ...] = (
    inference_pb2.DESCRIPTOR,
    embedding_pb2.DESCRIPTOR,
    jobs_pb2.DESCRIPTOR,
    cost_pb2.DESCRIPTOR,
    router_pb2.DESCRIPTOR,
    registry_pb2.DESCRIPTOR,
)


def public_services() -> Iterator[ServiceDescriptor]:
    """Yields the services that users may call."""
    for file in PUBLIC_FILES:
        yield from file.services_by_name.values()


def with_dependencies(
    files: Iterable[FileDescriptor],
) -> Iterator[descriptor_pb2.FileDescriptorProto]:
    """Yields files and all that they import, each once and after what it imports."""
    seen: set[str] = set()

    def walk(file: FileDescriptor) -> Iterator[descriptor_pb2.FileDescriptorProto]:
        if file.name in seen:
            return
        seen.add(file.name)
        for dependency in file.dependencies:
            yield from walk(dependency)
        proto = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(proto)
        yield proto

    for file in files:
        yield from walk(file)
