"""What a prompt was found to say so far, and where its next words belong."""

from dataclasses import dataclass, replace

from rlhf_img.rubrics import lexicon
from rlhf_img.rubrics.reading import Group, NounPhrase, Reader
from rlhf_img.rubrics.words import Part, tokenize


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What only a judge can see: of a group, "Is the <group> <says>?"; of the picture, `says` itself."""

    about: int | None
    says: str
    absent: bool = False


_SEVERAL = ("few", "lot", "number", "variety")
"""After these "a" stands before a plural: "are there a few cats"."""


class Parse(Reader):
    """What was found so far. Groups are referred to by their place in `groups`.

    To `subjects` belongs what follows at once, to `topic`, the subject of the sentence, what follows a comma.
    `sentence` is the first group of this sentence; `pending` are relations with their objects that wait for a subject.
    """

    def __init__(self, prompt: str) -> None:
        super().__init__(tokenize(prompt))
        self._quotes = [place for place, token in enumerate(self.tokens) if token.part is Part.QUOTE]
        self._numerals = [place for place, word in enumerate(self.words) if word in lexicon.NUMERAL_NOUNS]
        self.has_texts = bool(self._quotes or self._numerals)
        self.groups: list[Group] = []
        self.plural: set[int] = set()
        self.relations: list[tuple[int, str, int]] = []
        self.texts: list[tuple[int | None, str]] = []
        self.styles: dict[str, bool] = {}
        self.questions: list[Question] = []
        self.background: str | None = None
        self.uncovered: list[str] = []
        self.subjects: list[int] = []
        self.topic: list[int] = []
        self.sentence = 0
        self.pending: list[tuple[str, int]] = []

    def add(self, phrase: NounPhrase) -> int:
        """Keep a noun phrase with all that it says; the place of its group, which may be one that is known already."""
        place = self._known(phrase)
        if place is None:
            place = len(self.groups)
            self.groups.append(phrase.group)
        if phrase.plural:
            self.plural.add(place)
        self.texts += [(place, text) for text in phrase.quotes]
        if phrase.quantity:
            one = phrase.quantity.split(" ")[0] in ("a", "the") and phrase.quantity.split(" ")[1] not in _SEVERAL
            says = f"{'Is' if one else 'Are'} there {phrase.quantity} {phrase.group.name}?"
            self.questions.append(Question(about=place, says=says))
        if phrase.owner:
            self.relations.append((place, "of", self.add(phrase.owner)))
        return place

    def _known(self, phrase: NounPhrase) -> int | None:
        """The last group that "the cat" can speak of; what is new about it is kept with it."""
        new = phrase.group
        if not phrase.definite or new.count is not None:
            return None
        for place in reversed(range(len(self.groups))):
            old = self.groups[place]
            same = old.noun == new.noun or old.noun.endswith(f" {new.noun}")
            if same and not old.absent and new.color in (None, old.color) and new.size in (None, old.size):
                self.groups[place] = replace(old, traits=tuple(dict.fromkeys((*old.traits, *new.traits))))
                return place
        return None

    def relate(self, subjects: list[int], relation: str, other: int) -> None:
        self.relations += [(subject, relation, other) for subject in subjects]
        self.subjects = [other]

    def ask(self, subjects: list[int], says: str, *, absent: bool = False) -> None:
        self.questions += [Question(about=subject, says=says, absent=absent) for subject in subjects]

    def quote_within(self, reach: int) -> bool:
        """Whether quoted text is among the next tokens."""
        return any(self.at <= place < self.at + reach for place in self._quotes)

    def numeral_within(self, reach: int) -> bool:
        """Whether a noun such as "number" is among the next tokens."""
        return any(self.at <= place < self.at + reach for place in self._numerals)

    def before(self) -> str:
        """The text of the token before; empty at the start."""
        return self.tokens[self.at - 1].text.lower() if self.at else ""

    def accept_mark_or_and(self) -> str:
        """ "," or "and" (also after a comma) if it is here; reading goes on after it."""
        start = self.at
        if not self.ended and self.tokens[start].text == ",":
            self.at += 1
        if self.accept_word(("and",)):
            return "and"
        return "," if self.at > start else ""

    def close(self) -> None:
        """The sentence ends: what waits for a subject is left uncovered."""
        self.uncovered += [position for position, place in self.pending if place < 0]
        self.topic, self.pending, self.sentence = [], [], len(self.groups)

    def ends(self) -> bool:
        """Whether the clause ends here."""
        return self.part(self.at) is Part.MARK
