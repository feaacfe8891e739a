"""When two prompts are the same but for spelling."""

import re
import unicodedata


def normal_form(text: str) -> str:
    """A prompt without what changes nothing: case, spacing, punctuation at its end. Words in quotes keep their case,
    because they are to be drawn as they are.

    >>> normal_form('A  Sign reading "OPEN".')
    'a sign reading "OPEN"'
    """
    plain = unicodedata.normalize("NFKC", text).translate({0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'"})
    parts = re.split(r'("[^"]*")', plain)
    folded = "".join(part if part.startswith('"') else part.casefold() for part in parts)
    return " ".join(folded.split()).rstrip(" .,;:!")
