"""Documents packed into short strings: canonical JSON, deflated, base64."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

from prefect_slo.errors import InvalidObservation


def canonical(document: object) -> str:
    """JSON with sorted keys and no spaces: equal documents give equal text.

    Raises:
        ValueError: A number that JSON doesn't have (NaN, infinity).
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def pack(document: object) -> str:
    """The document as a short ASCII string that ``unpack`` reads back."""
    return base64.b64encode(zlib.compress(canonical(document).encode(), 9)).decode("ascii")


def unpack(text: str) -> Any:
    """The document that ``pack`` was given.

    Raises:
        InvalidObservation: The string is damaged, or was not made by ``pack``.
    """
    try:
        return json.loads(zlib.decompress(base64.b64decode(text, validate=True)))
    except (ValueError, zlib.error) as error:
        shown = f"{text[:24]}…" if len(text) > 24 else text
        raise InvalidObservation("packed document", shown, f"what this package stored ({error})") from None


def digest(document: object) -> str:
    """Sixteen hex digits that name the document's content."""
    return hashlib.blake2b(canonical(document).encode(), digest_size=8).hexdigest()


def plain(value: object) -> Any:
    """``value`` as strict JSON: non-finite numbers become ``None``, what JSON doesn't know its ``str``."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(content) for name, content in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(content) for content in value]
    return str(value)
