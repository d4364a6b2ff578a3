"""List the families: `python -m families`."""

import system.setup_check  # noqa: F401, first: it says how to set up where torch is missing

from families.family import all_families

for family in all_families():
    print(f"{family.name:<18} {family.layout or '-':<8} {family.about}")
