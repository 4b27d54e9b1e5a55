"""Which deployment answers a request: the router's snapshot, laid out for lookups.

The router and whoever holds its snapshots decide with this one class, so they decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from headrace.common.v1.model_pb2 import Backend, ModelKind, ModelSchema
from headrace.router.v1.router_pb2 import ModelRoute, RouteTarget, WatchRoutesResponse

from libs.errors import InvalidArgument, NotFound, Unavailable
from libs.model_reference import at_version, version_of

Kind: TypeAlias = "ModelKind.ValueType"

NOT_READY_RETRY_SECONDS = 1.0
# Both travel in trailers, which libs.rpc.status would cut anywhere.
MAX_MODELS_TOLD = 30
MAX_NAME_TOLD_LENGTH = 130

_KIND_NAMES = {
    ModelKind.MODEL_KIND_CHAT: "chat",
    ModelKind.MODEL_KIND_EMBEDDING: "embedding",
}


class Choice(NamedTuple):
    """The deployment that answers, and why.

    Attributes:
        target: has at least one ready backend.
        reason: for people.
        model: the public name, without a version.
        revision: of the snapshot that decided.
        fallbacks: the other deployments that the name stands for, best first, each with a ready
            backend: where all backends of the target fail, the next one may answer.
    """

    target: RouteTarget
    reason: str
    model: str
    revision: int
    fallbacks: tuple[RouteTarget, ...] = ()


class RouteTable:
    """One snapshot of routes; never changes.

    A model is asked for as `name` (its highest ready version), as `name@semver`, or as
    `models/{name}/versions/{semver}`. Everything is decided when the table is made: `choose` is one
    dictionary lookup, since it stands before the first token of every request.
    """

    def __init__(self, *, revision: int, routes: Sequence[ModelRoute]) -> None:
        self.revision = revision
        self._routes = tuple(routes)
        self._models = sorted(route.model for route in routes)
        self._targets = dict(entry for route in routes for entry in _targets_by_name(route))
        self._choices = dict(
            entry
            for route in routes
            for name, targets in _targets_by_name(route)
            for entry in _choices(name, targets, route=route, revision=revision)
        )

    @classmethod
    def of(cls, snapshot: WatchRoutesResponse) -> RouteTable:
        """Makes the table of a snapshot."""
        return cls(revision=snapshot.revision, routes=snapshot.routes)

    def with_backends(self, keep: Callable[[Backend], bool]) -> RouteTable:
        """Returns these routes with only those backends for which `keep` returns True."""
        routes = []
        for route in self._routes:
            copy = ModelRoute()
            copy.CopyFrom(route)
            for target in copy.targets:
                kept = [backend for backend in target.backends if keep(backend)]
                del target.backends[:]
                target.backends.extend(kept)
            routes.append(copy)
        return RouteTable(revision=self.revision, routes=routes)

    def models(self) -> list[str]:
        """Returns the public names of all models that have a deployment, ready or not, sorted."""
        return list(self._models)

    def targets(self) -> Iterator[RouteTarget]:
        """Yields all deployments, ready or not; each once for every name that can mean it."""
        for targets in self._targets.values():
            yield from targets

    def backends(self) -> Iterator[Backend]:
        """Yields all ready backends, one that several models share several times."""
        for target in self.targets():
            yield from target.backends

    def choose(self, model: str, *, kind: Kind | None) -> Choice:
        """Returns where a request for this model goes.

        Args:
            model: as the user wrote it.
            kind: what the call needs; None takes any.

        Raises:
            NotFound: there is no such model, or no deployment of that version.
            InvalidArgument: the model does something else (`MODEL_KIND_MISMATCH`).
            Unavailable: no backend has it ready (`MODEL_NOT_READY`).
        """
        choice = self._choices.get((model, kind))
        return choice if choice is not None else self._refuse(model, kind)

    def _refuse(self, model: str, kind: Kind | None) -> Choice:
        if self is EMPTY:
            raise Unavailable(
                "no routes are known yet",
                reason="DEPENDENCY_UNAVAILABLE",
                metadata={"dependency": "router"},
                retry_after_seconds=NOT_READY_RETRY_SECONDS,
            )
        told = model[:MAX_NAME_TOLD_LENGTH]
        targets = self._targets.get(model)
        if targets is None:
            raise NotFound(
                f'no model "{told}" is deployed',
                reason="MODEL_NOT_FOUND",
                metadata={"model": told, "models": ",".join(self._models[:MAX_MODELS_TOLD])},
            )
        if kind is not None and all(target.schema.kind != kind for target in targets):
            actual = kind_name(targets[0].schema)
            raise InvalidArgument(
                f"{told} is of the kind {actual}, the call needs {_KIND_NAMES[kind]}",
                reason="MODEL_KIND_MISMATCH",
                metadata={"model": told, "kind": actual},
                field_violations=[("model", f"is of the kind {actual}")],
            )
        raise Unavailable(
            f"no backend has {told} ready",
            reason="MODEL_NOT_READY",
            metadata={"model": told},
            retry_after_seconds=NOT_READY_RETRY_SECONDS,
        )


# What is held before the first snapshot; it chooses nothing.
EMPTY = RouteTable(revision=0, routes=())


def kind_name(schema: ModelSchema) -> str:
    """Returns `chat` or `embedding`; `unspecified` for a kind of a newer registry."""
    return _KIND_NAMES.get(schema.kind, "unspecified")


def _version(target: RouteTarget) -> str:
    return version_of(target.model_version)


def _targets_by_name(route: ModelRoute) -> Iterator[tuple[str, Sequence[RouteTarget]]]:
    """Yields each name that users may write, with the targets it may mean, best first."""
    by_version: dict[str, list[RouteTarget]] = {}
    for target in route.targets:
        by_version.setdefault(target.model_version, []).append(target)
    yield route.model, route.targets
    for name, targets in by_version.items():
        yield name, targets
        yield at_version(route.model, _version(targets[0])), targets


def _choices(
    name: str, targets: Sequence[RouteTarget], *, route: ModelRoute, revision: int
) -> Iterator[tuple[tuple[str, Kind | None], Choice]]:
    """Yields what is chosen for one name, for any kind (None) and for each that there is."""
    ready = [target for target in targets if target.backends]
    for kind in {None, *(target.schema.kind for target in ready)}:
        fitting = [target for target in ready if kind in (None, target.schema.kind)]
        if not fitting:
            continue
        target, *fallbacks = fitting
        if name == route.model:
            reason = f"highest ready version: {_version(target)}"
        else:
            reason = f"version asked for: {_version(target)}"
        yield (name, kind), Choice(target, reason, route.model, revision, tuple(fallbacks))
