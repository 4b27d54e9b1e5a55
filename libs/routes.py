"""Chooses the deployment that answers a request, from a snapshot of the router.

The router and the services that watch its snapshots use the same class, so they choose the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from headrace.common.v1.backend_pb2 import Backend
from headrace.common.v1.model_pb2 import ModelKind, ModelSchema
from headrace.common.v1.route_pb2 import RouteDecision
from headrace.router.v1.router_internal_pb2 import ModelRoute, RouteTarget, WatchRoutesResponse

from libs.errors import InvalidArgument, NotFound, Unavailable
from libs.model_reference import at_version, version_of

Kind: TypeAlias = "ModelKind.ValueType"

NOT_READY_RETRY_SECONDS = 1.0
# Both are sent in trailers, which libs.rpc.status would cut at an arbitrary character.
MAX_MODELS_IN_ERRORS = 30
MAX_NAME_LENGTH_IN_ERRORS = 130

_KIND_NAMES = {
    ModelKind.MODEL_KIND_CHAT: "chat",
    ModelKind.MODEL_KIND_EMBEDDING: "embedding",
}


class Choice(NamedTuple):
    """The deployment that answers, and the reason.

    Attributes:
        target: has at least one ready backend.
        reason: text for people.
        model: public name, without a version.
        epoch: epoch of the snapshot.
        revision: revision of the snapshot.
        fallbacks: other deployments for the same reference, best first, each with a ready backend;
            they may answer if all backends of the target fail.
    """

    target: RouteTarget
    reason: str
    model: str
    epoch: str
    revision: int
    fallbacks: tuple[RouteTarget, ...] = ()

    def decision(self) -> RouteDecision:
        """Returns the choice as a proto for users."""
        return RouteDecision(
            deployment=self.target.deployment,
            reason=self.reason,
            epoch=self.epoch,
            revision=self.revision,
        )


class RouteTable:
    """An immutable snapshot of routes.

    The choices for all forms of `libs.model_reference` are made in advance, so that `choose` is one
    dictionary look-up.
    """

    def __init__(self, *, epoch: str, revision: int, routes: Sequence[ModelRoute]) -> None:
        self.epoch = epoch
        self.revision = revision
        self._routes = tuple(routes)
        self._models = sorted(route.model for route in routes)
        self._targets: dict[str, Sequence[RouteTarget]] = {}
        self._choices: dict[tuple[str, Kind | None], Choice] = {}
        for route in routes:
            for name, targets in _targets_by_name(route):
                self._targets[name] = targets
                self._choices.update(self._choices_of(name, targets, model=route.model))

    @classmethod
    def of(cls, snapshot: WatchRoutesResponse) -> RouteTable:
        """Makes the table of a snapshot."""
        return cls(epoch=snapshot.epoch, revision=snapshot.revision, routes=snapshot.routes)

    def is_replaced_by(self, snapshot: WatchRoutesResponse) -> bool:
        """Returns whether a snapshot is newer: of another epoch, or of a higher revision."""
        return snapshot.epoch != self.epoch or snapshot.revision > self.revision

    def with_backends(self, keep: Callable[[Backend], bool]) -> RouteTable:
        """Returns these routes with only those backends for which `keep` returns True.

        Readers remove the backends whose kind of target they do not know.
        """
        routes = []
        for route in self._routes:
            copy = ModelRoute()
            copy.CopyFrom(route)
            for target in copy.targets:
                kept = [backend for backend in target.backends if keep(backend)]
                del target.backends[:]
                target.backends.extend(kept)
            routes.append(copy)
        return RouteTable(epoch=self.epoch, revision=self.revision, routes=routes)

    def models(self) -> list[str]:
        """Returns the public names of all models that have a deployment, ready or not, sorted."""
        return list(self._models)

    def targets(self) -> Iterator[RouteTarget]:
        """Yields all deployments, ready or not, once for each model reference that matches it."""
        for targets in self._targets.values():
            yield from targets

    def backends(self) -> Iterator[Backend]:
        """Yields all ready backends, once for each model reference that matches it."""
        for target in self.targets():
            yield from target.backends

    def choose(self, model: str, *, kind: Kind | None) -> Choice:
        """Returns where a request for a model is sent.

        Args:
            model: the model reference of the request.
            kind: the kind of model that the call needs; None accepts any.

        Raises:
            NotFound: the model, or a deployment of that version, does not exist.
            InvalidArgument: the model is of another kind (`MODEL_KIND_MISMATCH`).
            Unavailable: no backend has it ready (`MODEL_NOT_READY`).
        """
        choice = self._choices.get((model, kind))
        return choice if choice is not None else self._refuse(model, kind)

    def _choices_of(
        self, name: str, targets: Sequence[RouteTarget], *, model: str
    ) -> Iterator[tuple[tuple[str, Kind | None], Choice]]:
        """Yields the choices for one name: for any kind (None), and for each kind of a target."""
        ready = [target for target in targets if target.backends]
        for kind in {None, *(target.schema.kind for target in ready)}:
            fitting = [target for target in ready if kind in (None, target.schema.kind)]
            if not fitting:
                continue
            target, *fallbacks = fitting
            if name == model:
                reason = f"highest ready version: {_version(target)}"
            else:
                reason = f"version asked for: {_version(target)}"
            choice = Choice(target, reason, model, self.epoch, self.revision, tuple(fallbacks))
            yield (name, kind), choice

    def _refuse(self, model: str, kind: Kind | None) -> Choice:
        if self is EMPTY:
            raise Unavailable(
                "no routes are known yet",
                reason="DEPENDENCY_UNAVAILABLE",
                metadata={"dependency": "router"},
                retry_after_seconds=NOT_READY_RETRY_SECONDS,
            )
        shown = model[:MAX_NAME_LENGTH_IN_ERRORS]
        targets = self._targets.get(model)
        if targets is None:
            raise NotFound(
                f'no model "{shown}" is deployed',
                reason="MODEL_NOT_FOUND",
                metadata={
                    "model": shown,
                    "models": ",".join(self._models[:MAX_MODELS_IN_ERRORS]),
                },
            )
        if kind is not None and all(target.schema.kind != kind for target in targets):
            actual = kind_name(targets[0].schema)
            raise InvalidArgument(
                f"{shown} is of the kind {actual}, the call needs {_KIND_NAMES[kind]}",
                reason="MODEL_KIND_MISMATCH",
                metadata={"model": shown, "kind": actual},
                field_violations=[("model", f"is of the kind {actual}")],
            )
        raise Unavailable(
            f"no backend has {shown} ready",
            reason="MODEL_NOT_READY",
            metadata={"model": shown},
            retry_after_seconds=NOT_READY_RETRY_SECONDS,
        )


# The table before the first snapshot; it has no models.
EMPTY = RouteTable(epoch="", revision=0, routes=())


def kind_name(schema: ModelSchema) -> str:
    """Returns `chat` or `embedding`; `unspecified` for a kind that only newer registries know."""
    return _KIND_NAMES.get(schema.kind, "unspecified")


def _version(target: RouteTarget) -> str:
    return version_of(target.model_version)


def _targets_by_name(route: ModelRoute) -> Iterator[tuple[str, Sequence[RouteTarget]]]:
    """Yields each model reference to these targets, with the matching ones, best first."""
    by_version: dict[str, list[RouteTarget]] = {}
    for target in route.targets:
        by_version.setdefault(target.model_version, []).append(target)
    yield route.model, route.targets
    for name, same_version in by_version.items():
        yield name, same_version
        yield at_version(route.model, _version(same_version[0])), same_version
