"""List the families: `python -m families`."""

from families.family import every

for family in every():
    print(f"{family.name:<18} {family.layout or '-':<8} {family.about}")
