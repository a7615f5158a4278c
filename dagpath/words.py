"""Numbers in front of nouns."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: ``1 free group``, ``1,024 free groups``.

    Args:
        number: how many.
        noun: in the singular.
        plural: where it is not the singular with an s.

    Example:
        >>> from dagpath.words import counted
        >>> counted(1, "free group"), counted(2048, "entry", "entries")
        ('1 free group', '2,048 entries')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def not_finite(number: int) -> str:
    """How many values are not: ``1 value that is not finite``."""
    return counted(number, "value that is not finite", "values that are not finite")
