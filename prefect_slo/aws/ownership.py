"""Whose a thing in an account is: tags say which pool has made it, and what does not carry them is never removed.

A name alone says too little: ``etl-prod-…`` begins like a thing of the pool ``etl``, and several pools may have one
prefix. So the hash in a name covers the pool's own name, and what a pool removes carries its tag.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from prefect_slo.aws.packaging import HASH_DIGITS
from prefect_slo.errors import InvalidValue
from prefect_slo.units import text

VERSION_TAG, POOL_TAG = "prefect-slo", "prefect-slo:pool"
_PLAIN = re.compile(r"[\w .:=+@-]{1,200}", re.ASCII)  # what values of tags may hold everywhere, in one folder


@dataclass(frozen=True)
class Owner:
    """A pool, as what it makes is marked.

    Attributes:
        prefix: Names of what it makes begin with it.
        pool: Its name.
    """

    prefix: str
    pool: str

    def __str__(self) -> str:
        plain = self.pool if _PLAIN.fullmatch(self.pool) else hashlib.sha256(self.pool.encode()).hexdigest()[:16]
        return f"{self.prefix}/{plain}"

    def tags(self, version: str) -> dict[str, str]:
        """The tags of something that it makes."""
        return {VERSION_TAG: version, POOL_TAG: str(self)}

    def made(self, tags: Mapping[str, str] | None) -> bool:
        """Whether something with these tags was made by it."""
        return tags is not None and tags.get(POOL_TAG) == str(self)

    def version_in(self, name: str, ending: str = "") -> str | None:
        """The hash in a name of the form that it gives, ``prefix-hash`` and an ``ending``; ``None`` for other names.

        Args:
            name: The name.
            ending: What follows the hash, as a regular expression.
        """
        found = re.fullmatch(rf"{re.escape(self.prefix)}-([0-9a-f]{{{HASH_DIGITS}}}){ending}", name)
        return found.group(1) if found is not None else None


def name_prefix(value: object, field: str) -> str:
    """What names of functions and job definitions may begin with.

    Raises:
        InvalidValue: Too long, or with characters that such names don't have.
    """
    prefix = text(value, field)
    if len(prefix) > 40 or not prefix.isascii() or not prefix.replace("-", "").replace("_", "").isalnum():
        raise InvalidValue(field, value, "at most 40 letters, digits, dashes and underscores")
    return prefix
