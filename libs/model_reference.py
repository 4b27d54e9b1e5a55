"""Parses and formats the names of models and versions.

    smollm2                        a model; requests use its highest ready version
    smollm2@1.0.0                  a version, as users write it
    models/smollm2/versions/1.0.0  the same version, as a resource

A model's identifier has letters a-z, digits and hyphens, starts with a letter and has at most
63 characters. A version is a semantic version of at most 64 characters.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

import semver

from libs.errors import InvalidArgument

IDENTIFIER = re.compile(r"[a-z][a-z0-9-]{0,62}")
MAX_VERSION_LENGTH = 64  # it becomes part of file names

_VERSIONS = "/versions/"


class ModelReference(NamedTuple):
    """The model of a request.

    Attributes:
        model: the identifier.
        version: the version that must answer; None: the highest ready one.
    """

    model: str
    version: semver.Version | None = None

    @classmethod
    def parse(cls, text: str, *, field: str = "model") -> Self:
        """Parses any of the three forms.

        Raises:
            InvalidArgument: the text has another form.
        """
        if text.startswith("models/"):
            return cls(*parse_version_name(text, field=field))
        model, separator, version = text.partition("@")
        if not IDENTIFIER.fullmatch(model) or (separator and not _is_version(version)):
            raise InvalidArgument.of_field(
                field,
                "must be a model such as smollm2, or a version such as smollm2@1.0.0 or "
                "models/smollm2/versions/1.0.0",
            )
        return cls(model, semver.Version.parse(version) if separator else None)

    def __str__(self) -> str:
        """Returns the reference as users write it."""
        return self.model if self.version is None else at_version(self.model, str(self.version))


def at_version(model: str, version: str) -> str:
    """Returns `MODEL@VERSION`."""
    return f"{model}@{version}"


def version_name(model: str, version: str) -> str:
    """Returns `models/MODEL/versions/VERSION`."""
    return f"models/{model}{_VERSIONS}{version}"


def version_of(name: str) -> str:
    """Returns the version of a valid `models/MODEL/versions/VERSION`, without checking it."""
    return name.rpartition(_VERSIONS)[2]


def parse_version_name(name: str, *, field: str = "name") -> tuple[str, semver.Version]:
    """Returns the model's identifier and the version of `models/MODEL/versions/VERSION`.

    Raises:
        InvalidArgument: the name has another form.
    """
    parent, separator, version = name.partition(_VERSIONS)
    collection, slash, model = parent.partition("/")
    if not separator or not _is_version(version):
        raise InvalidArgument.of_field(
            field,
            "must be models/MODEL/versions/VERSION with a semantic version such as 1.0.0, of at "
            f"most {MAX_VERSION_LENGTH} characters",
        )
    if collection != "models" or not slash or not IDENTIFIER.fullmatch(model):
        raise InvalidArgument.of_field(
            field,
            "must be models/MODEL/versions/VERSION with a MODEL of a-z, 0-9 and -, which starts "
            "with a letter and has at most 63 characters",
        )
    return model, semver.Version.parse(version)


def _is_version(text: str) -> bool:
    return len(text) <= MAX_VERSION_LENGTH and semver.Version.is_valid(text)
