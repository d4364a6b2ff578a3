"""The embedded conversation: Moshi's layout in small (families/moshi.py), drawn more coolly. A config is in configs/tiny_duplex.py."""


from families.family import Family
from families.moshi import duplex_grid
from streams import StreamTable


def rules(table: StreamTable) -> dict[str, tuple[float, ...]]:
    """The likeliest words; codes at 0.3."""
    return {"temperature": (0.0, *[0.3] * len(table.audio_out))}


FAMILIES = (Family("tiny_duplex", "talk", "embedded: a conversation of digits on a CPU (configs/tiny_duplex.py)", duplex_grid, rules=rules,
                   user_audio="duplex"),)
