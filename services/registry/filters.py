"""Turns the filters of lists into SQL conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import sqlalchemy as sa

from libs.rpc.filter import parse_filter
from services.registry.tables import deployments, model_versions, models

Condition: TypeAlias = sa.ColumnElement[bool]


def model_conditions(text: str) -> list[Condition]:
    """Returns the conditions of `ListModelsRequest.filter`.

    Raises:
        InvalidArgument: the filter is invalid.
    """
    return list(_conditions(text, {"name": lambda value: _model(models.c.id, value)}))


def version_conditions(text: str) -> list[Condition]:
    """Returns the conditions of `ListModelVersionsRequest.filter`.

    Raises:
        InvalidArgument: the filter is invalid.
    """
    digest = model_versions.c.artifact_digest
    return list(_conditions(text, {"artifact_digest": lambda value: digest == value}))


def deployment_conditions(text: str) -> list[Condition]:
    """Returns the conditions of `ListDeploymentsRequest.filter`.

    Raises:
        InvalidArgument: the filter is invalid.
    """
    fields = {
        "spec.model_version": _deployed_version,
        "spec.pool": lambda value: deployments.c.pool == value,
    }
    return list(_conditions(text, fields))


def _conditions(text: str, fields: Mapping[str, Callable[[str], Condition]]) -> Iterator[Condition]:
    for field, value in parse_filter(text, fields=fields.keys()).items():
        yield fields[field](value)


def _model(column: sa.Column[str], name: str) -> Condition:
    """Compares a column of ids with `models/{id}`; nothing equals a name of another form."""
    collection, _, identifier = name.partition("/")
    return column == identifier if collection == "models" else sa.false()


def _deployed_version(name: str) -> Condition:
    model, _, version = name.partition("/versions/")
    return sa.and_(_model(deployments.c.model, model), deployments.c.version == version)
