"""What goes wrong with a dataset, and a check of names that all of its makers share."""

import unicodedata


class DatasetError(ValueError):
    """There is no dataset in our layout, it is damaged, or it does not fit. The text has the path and the remedy."""


def check_name(name: str, role: str) -> None:
    """Raise DatasetError for a name of a class or group that cannot be printed: it is not UTF-8, or has line breaks."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        printable = name.encode("unicode_escape").decode()
        raise DatasetError(f"{role} is called '{printable}', which cannot be printed: rename it in letters of UTF-8")
