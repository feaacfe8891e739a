"""The errors that a user can cause or must be told of; the command line prints them without a traceback."""

import difflib
from collections.abc import Iterable


class RlhfImgError(Exception):
    """Something the user can mend: the message says what was given, what was expected and what to do."""

    exit_code = 2


class RunStopped(RlhfImgError):
    """A pre-flight check or a sentinel stopped the run; the last good checkpoint stays."""

    exit_code = 3


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The nearest known name as a question, and every known name.

    >>> did_you_mean("rubrik", ["artifact", "rubric"])
    'did you mean "rubric"? Known: artifact, rubric'
    """
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    question = f'did you mean "{near[0]}"? ' if near else ""
    return f"{question}Known: {', '.join(names)}"
