"""Where the command ``nhwconv`` starts; ``python -m nhwconv.cli`` is the same."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say in one line what has to be installed for it."""
    try:
        import rich  # noqa: F401 - asked for here, so that nothing deeper fails halfway
        import threadpoolctl  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"nhwconv: the command line needs {error.name}: pip install nhwconv[compare]", file=sys.stderr)
        sys.exit(2)
    from .app import app

    app(prog_name="nhwconv")


if __name__ == "__main__":
    main()
