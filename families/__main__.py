"""List the families: `python -m families`."""

from families.family import all_families

for family in all_families():
    print(f"{family.name:<18} {family.layout or '-':<8} {family.about}")
