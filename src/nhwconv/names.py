"""Names that people type: a known one is returned, an unknown one is refused with the nearest that is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["known", "suggestion"]


def known(kind: str, name: str, names: Iterable[str]) -> str:
    """Return `name` where it is one of `names`, otherwise raise a ValueError that suggests the nearest."""
    names = tuple(names)
    if name in names:
        return name
    raise ValueError(f'there is no {kind} "{name}", expected one of {", ".join(names)}{suggestion(name, names)}')


def suggestion(name: str, names: Sequence[str]) -> str:
    """Return the end of a message that refuses `name`: the nearest of `names`, or nothing where none is near."""
    import difflib  # for errors alone

    near = difflib.get_close_matches(name, names, 1)
    return f'; did you mean "{near[0]}"?' if near else ""
