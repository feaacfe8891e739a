"""The reading state of a prompt: where the reader is, what was found so far, and noun phrases, its smallest clauses."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from rlhf_img.rubrics import lexicon
from rlhf_img.rubrics.words import Part, Token, is_verb, singular


class Phrases:
    """Phrases to look for at a place of a prompt, the longest first; found by their first two words."""

    def __init__(self, phrases: Iterable[str]) -> None:
        self._single: set[str] = set()
        self._longer: dict[tuple[str, str], list[tuple[int, list[str], str]]] = {}
        for phrase in sorted(set(phrases), key=len, reverse=True):
            words = phrase.split(" ")
            if len(words) == 1:
                self._single.add(phrase)
            else:
                self._longer.setdefault((words[0], words[1]), []).append((len(words), words, phrase))
        self.first_words = frozenset((*self._single, *(first for first, _ in self._longer)))

    def at(self, words: list[str], start: int) -> str | None:
        """The longest phrase that starts there, or None."""
        if start + 1 < len(words):
            for length, phrase, text in self._longer.get((words[start], words[start + 1]), ()):
                if length == 2 or words[start : start + length] == phrase:
                    return text
        return words[start] if start < len(words) and words[start] in self._single else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A counted noun phrase; `noun` is singular, `count` None if the prompt does not say.

    `traits` are its other attributes, as after "is": "fluffy", "made of wood". `name` is the noun as in the prompt.
    """

    noun: str
    count: int | None = None
    color: str | None = None
    size: str | None = None
    traits: tuple[str, ...] = ()
    absent: bool = False
    name: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class NounPhrase:
    """A noun phrase as read: the group, and what is said with it.

    `definite`: it may speak of a thing that is known already. `quantity` is an amount that is no number.
    """

    group: Group
    plural: bool
    definite: bool = False
    quantity: str | None = None
    quotes: tuple[str, ...] = ()
    owner: "NounPhrase | None" = None


NUMBERS = Phrases(lexicon.NUMBERS)
BOUNDS = Phrases(lexicon.BOUNDS)
QUANTITIES = Phrases(lexicon.QUANTITIES)
COMPOUNDS = Phrases((*lexicon.COMPOUNDS, *(f"{phrase}s" for phrase in lexicon.COMPOUNDS)))
RELATIONS = Phrases(tuple(lexicon.ALL_RELATIONS))
_NEVER_IN_A_NOUN_PHRASE = (
    lexicon.COPULAS | lexicon.AUXILIARIES | lexicon.PRONOUNS | lexicon.SILENT | lexicon.ALL_RELATIONS.keys()
    | {"not", "n't", "no", "without", "where", "when", "there"}
)  # fmt: skip
_BEGINS_AN_OBJECT = {"a", "an", *lexicon.DETERMINERS}
QUALITIES = (Part.ADJECTIVE, Part.PAST, Part.ING)
_NOUNS = (Part.NOUN, Part.PLURAL)
_NOMINAL = frozenset((*_NOUNS, *QUALITIES, Part.VERB))


OPENS_A_NOUN_PHRASE = frozenset((
    *QUANTITIES.first_words, *NUMBERS.first_words, *BOUNDS.first_words, *COMPOUNDS.first_words, *lexicon.EXACT,
    *lexicon.DETERMINERS, "1",
))  # fmt: skip
"""Words with which a noun phrase can begin though they are no part of it themselves; "1" is any in digits."""


class Reader:
    """The tokens of a prompt and the place of reading in them."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.words = [token.word for token in tokens]
        self._parts = [Part.OTHER if t.word in _NEVER_IN_A_NOUN_PHRASE else t.part for t in tokens]
        self._parts.append(Part.MARK)  # beyond the end, and by Python's counting before the start
        self.at = 0

    def accept(self, phrases: Phrases) -> str | None:
        """The longest of the phrases that starts here; reading goes on after it. None if none does."""
        if self.at >= len(self.words) or self.words[self.at] not in phrases.first_words:
            return None
        found = phrases.at(self.words, self.at)
        if found is not None:
            self.at += found.count(" ") + 1
        return found

    def accept_word(self, words: Collection[str]) -> str | None:
        """The word here if it is one of these; reading goes on after it."""
        if self.at < len(self.words) and self.words[self.at] in words:
            self.at += 1
            return self.words[self.at - 1]
        return None

    def part(self, place: int) -> Part:
        """The part of speech of the token there; a mark beyond the ends, and OTHER for words that end noun phrases."""
        return self._parts[place] if -1 <= place < len(self._parts) else Part.MARK

    @property
    def ended(self) -> bool:
        return self.at >= len(self.tokens)


def noun_phrase(reader: Reader, *, after_no: bool = False) -> NounPhrase | None:
    """(article, number, amount) (size, colour, material, other qualities, quoted text) noun; None if none is here.

    after_no: a word such as "no" stands before, which like an article tells a noun from a verb.
    """
    start = reader.at
    if reader.ended or (reader.words[start] == "that" and reader.part(start + 1) is Part.VERB):
        return None  # "a machine that makes coffee"
    quantity = reader.accept(QUANTITIES)
    definite = reader.accept_word(lexicon.DETERMINERS) is not None
    count, bound = _amount(reader)
    quantity = quantity or bound or reader.accept(QUANTITIES)
    first = reader.at
    article = after_no or first > start
    end = _end(reader, first, article=article, plural=count is not None and count > 1)
    noun_at = _noun_start(reader, first, end, article=article)
    if noun_at is None:
        reader.at = start
        return None
    color, size, traits = _qualities(reader, first, noun_at)
    name = " ".join(reader.words[noun_at:end])
    if count == 2 and reader.words[first - 2] == "pair" and reader.words[end - 1] in lexicon.ALWAYS_PLURAL:
        count = 1  # "a pair of scissors"
    # what one wears, where no number says otherwise
    is_name = reader.tokens[end - 1].is_name or (name == "glasses" and count is None and quantity is None)
    group = Group(
        noun=name if is_name else singular(name), count=count, color=color, size=size,
        traits=traits, name=name,
    )  # fmt: skip
    reader.at = end
    phrase = NounPhrase(
        group=group,
        plural=reader.tokens[end - 1].part is Part.PLURAL,
        definite=definite,
        quantity=quantity,
        quotes=tuple(t.text for t in reader.tokens[first:noun_at] if t.part is Part.QUOTE and t.text.strip()),
    )
    return _owned(reader, phrase) or phrase


def _owned(reader: Reader, owner: NounPhrase) -> NounPhrase | None:
    """What the noun phrase just read owns: "the cat's tail". A kind owns nothing: "a children's book"."""
    after = reader.at + 1
    if reader.words[reader.at : after] != ["'s"] or reader.part(after) not in (*_NOUNS, *QUALITIES):
        return None
    start, reader.at = reader.at, after
    thing = noun_phrase(reader)
    if thing is None:
        reader.at = start
        return None
    if not owner.plural:
        return replace(thing, owner=owner)
    kind = owner.group.name + ("'" if owner.group.name.endswith("s") else "'s")
    group = replace(
        owner.group,
        noun=f"{kind} {thing.group.noun}",
        name=f"{kind} {thing.group.name}",
        traits=(*owner.group.traits, *thing.group.traits),
    )
    return replace(thing, group=group, definite=owner.definite, quantity=owner.quantity)


def _amount(reader: Reader) -> tuple[int | None, str | None]:
    """A number, also "exactly three" and "two pairs of"; or, as words, one that is not exact: "at least three"."""
    start = reader.at
    word = reader.words[start] if start < len(reader.words) else ""
    if word not in _AMOUNT_WORDS and "-" not in word and not word[:1].isdecimal():
        return None, None
    bound = reader.accept_word(lexicon.EXACT) or reader.accept(BOUNDS)
    count = _number(reader)
    inexact = bound is not None and bound not in lexicon.EXACT
    if count is None or (inexact and count == 1):  # "a book about a car"
        reader.at = start
        return None, None
    if inexact:
        return None, " ".join(reader.words[start : reader.at])
    if reader.words[reader.at : reader.at + 2] == ["pairs", "of"]:
        reader.at += 2
        if not lexicon.ALWAYS_PLURAL.intersection(reader.words[reader.at : reader.at + 2]):
            count *= 2
    return count, None


_AMOUNT_WORDS = {*NUMBERS.first_words, *BOUNDS.first_words, *lexicon.EXACT}


def _number(reader: Reader) -> int | None:
    phrase = reader.accept(NUMBERS)
    if phrase is not None:
        return lexicon.NUMBERS[phrase]
    word = reader.words[reader.at] if not reader.ended else ""
    tens, _, ones = word.partition("-")
    if tens in lexicon.NUMBERS and ones in lexicon.NUMBERS:
        reader.at += 1
        return lexicon.NUMBERS[tens] + lexicon.NUMBERS[ones]
    digits = word.replace(",", "")
    # four digits without a comma are a year
    if digits.isdecimal() and digits.isascii() and (len(digits) <= 3 or "," in word):
        reader.at += 1
        return int(digits)
    return None


def _end(reader: Reader, first: int, *, article: bool, plural: bool) -> int:
    """Where the noun phrase that starts at `first` ends. plural: a number above one stands before it."""
    words = reader.words
    at, has_noun, one = first, False, words[first - 1 : first] in (["a"], ["an"], ["another"], ["one"])
    while at < len(reader.tokens):
        may_end = has_noun or (article and at > first and words[at] in lexicon.SIDES)
        if may_end and words[at] in RELATIONS.first_words and RELATIONS.at(words, at):
            return at
        part, follows = reader.part(at), reader.part(at + 1)
        nominal = follows in _NOMINAL
        if plural and part is Part.VERB and words[at].endswith("s") and reader.part(at - 1) is Part.NOUN and at > first:
            part = Part.PLURAL  # "two bus stops": the number wants a plural
        # no verb agrees with "a teddy" but "bears": "a teddy bear"
        if part in _NOUNS or (part is Part.VERB and has_noun and one and not words[at].endswith("s")):
            agrees = plural and part is Part.PLURAL
            if has_noun and not agrees and _is_predicate(reader, at, article=article, one=one):
                return at
            has_noun = True
        elif words[at] in COMPOUNDS.first_words and (compound := COMPOUNDS.at(words, at)):
            at += compound.count(" ")
            has_noun = True
        elif has_noun:
            # "a neon green sign": another quality only where another noun follows
            if not (part is Part.ADJECTIVE and follows in _NOUNS):
                return at
        elif part is Part.VERB:
            # "a drink", "red crosses"
            if not article and at == first and not _may_name(reader, at):
                return at
            has_noun = True
        elif part is Part.ADVERB:
            # "a still lake"
            if follows not in QUALITIES and not (article and at == first and follows in _NOUNS):
                # "on their back"
                return at + 1 if article and at == first and not nominal else at
        elif part is Part.QUOTE or part in (Part.PAST, Part.ING):
            if not nominal and follows is not Part.QUOTE:
                return at
        elif part is not Part.ADJECTIVE and not (at > first and _is_joint(reader, at) and _joins_qualities(reader, at)):
            return at
        at += 1
    return at


def _may_name(reader: Reader, at: int) -> bool:
    """Whether a noun may stand here without an article: "monitor on desk", "under monitor"; not "to sit"."""
    before = reader.words[at - 1] if at else ""
    return reader.part(at - 1) is Part.MARK or before in lexicon.ALL_RELATIONS or before == "and"


def _is_predicate(reader: Reader, at: int, *, article: bool, one: bool) -> bool:
    """Whether a noun's look-alike after a noun is a verb: "a man rides the ...", "people walk on ..."."""
    before, part, word = reader.part(at - 1), reader.part(at), reader.words[at]
    if word.endswith("ing") and word not in lexicon.NOUNS_IN_ING:
        return reader.part(at + 1) not in _NOUNS
    if before is Part.NOUN and part is Part.PLURAL:
        follows = reader.words[at + 1 : at + 2]
        # "a crowd watches": nothing that "a" stands before is a plural
        return is_verb(word) and (one or (article and bool(follows) and follows[0] in _BEGINS_AN_OBJECT))
    if before is Part.PLURAL and part is Part.PLURAL:
        # "a hat and sunglasses rides a horse"
        return reader.words[at + 1 : at + 2] != [] and reader.words[at + 1] in _BEGINS_AN_OBJECT and is_verb(word)
    if before is Part.PLURAL and part is Part.NOUN and not one:
        return reader.part(at + 1) in (Part.OTHER, Part.DETERMINER) and is_verb(word)
    return False


def _joins_qualities(reader: Reader, at: int) -> bool:
    """Whether commas and "and" stand between qualities of one noun: "red, white and blue flag"."""
    if reader.part(at - 1) not in QUALITIES:
        return False
    while _is_joint(reader, at):
        while _is_joint(reader, at):
            at += 1
        start = at
        while reader.part(at) in (*QUALITIES, Part.ADVERB):
            at += 1
        if at == start:
            return False
    return reader.part(at) in _NOUNS


def _is_joint(reader: Reader, at: int) -> bool:
    return at < len(reader.tokens) and (reader.words[at] == "and" or reader.tokens[at].text == ",")


def _noun_start(reader: Reader, first: int, end: int, *, article: bool) -> int | None:
    """Where the noun begins, which may be of several words; None if there is none."""
    at = end
    while at > first and reader.part(at - 1) in (*_NOUNS, Part.VERB):
        at -= 1
    for place in range(first, at):
        compound = COMPOUNDS.at(reader.words, place)
        if compound and place + compound.count(" ") + 1 >= at:
            return place
    while at < end - 1 and reader.words[at] in lexicon.MATERIALS:
        at += 1
    if at < end:
        return at
    if end == first:
        return None
    word, part = reader.words[end - 1], reader.part(end - 1)
    noun = (word in lexicon.COLORED_THINGS and article) or word in lexicon.MATERIALS or part is Part.VERB
    plain = word not in lexicon.COLOR_WORDS and word not in lexicon.SIZE_WORDS
    other = article and plain and part in (Part.ADJECTIVE, Part.ADVERB)
    return end - 1 if noun or other else None


def _qualities(reader: Reader, first: int, end: int) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Colour, size and other traits among the words before the noun."""
    colors: list[str] = []
    sizes: list[str] = []
    traits: list[str] = []
    before = ""
    for place in range(first, end):
        word, part = reader.words[place], reader.tokens[place].part
        if word in lexicon.SHADES and reader.words[place + 1] in lexicon.COLOR_WORDS and place + 1 < end:
            before = f"{word} "
        elif word in lexicon.COLOR_WORDS:
            colors.append(before + lexicon.COLOR_SYNONYMS.get(word, word))
            before = ""
        elif word in lexicon.SIZE_WORDS:
            sizes.append(lexicon.SIZE_SYNONYMS.get(word, word))
        elif part is Part.ADVERB:
            before = f"{before}{word} "
        elif word and word != "and":
            traits.append(before + word)
            before = ""
    if before:
        traits.append(before.strip())  # "still"
    if len(colors) > 1:
        traits += [f"partly {color}" for color in colors]
    return colors[0] if len(colors) == 1 else None, sizes[0] if sizes else None, tuple(dict.fromkeys(traits))
