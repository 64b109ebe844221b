"""Tell asv about this machine under a name, with its processor, memory and system; `make bench-record` calls it.

    python tools/machine.py zen3-2cores

`asv machine --machine NAME --yes` keeps the name alone, and the dashboard would show nothing else of the machine.
"""

from __future__ import annotations

import sys

from asv.machine import Machine, MachineCollection
from asv.util import UserError


def main() -> None:
    """Keep what is known of a machine, and add what asv finds out for whatever is not."""
    (name,) = sys.argv[1:]
    try:
        known = MachineCollection.load(name)
    except UserError:  # as yet unknown
        known = {}
    MachineCollection.save(name, {**Machine.get_defaults(), **known, "machine": name})


if __name__ == "__main__":
    main()
