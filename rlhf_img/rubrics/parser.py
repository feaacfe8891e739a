"""Reading a prompt from left to right: clauses of the lexicon's phrases become groups, relations, texts and styles."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import inflect

from rlhf_img.rubrics import lexicon

_TOKEN = re.compile(r'"(?P<quoted>[^"]*)"|(?P<word>[^\W_]+(?:[-\'’][^\W_]+)*)|(?P<mark>[,;.:!?()])|(?P<other>\S)')
_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "«": '"', "»": '"'})
_COLOR_WORDS = {*lexicon.COLORS, *lexicon.FINE_COLORS, *lexicon.COLOR_SYNONYMS}
_SIZE_WORDS = {*lexicon.SIZES, *lexicon.SIZE_SYNONYMS}
_STYLE_PHRASES = {phrase: name for name, style in lexicon.STYLES.items() for phrase in style.phrases}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Token:
    text: str
    quoted: bool = False
    mark: bool = False

    @property
    def word(self) -> str:
        return "" if self.quoted or self.mark else self.text.lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A counted noun phrase; `noun` is singular, `count` None if the prompt does not say."""

    noun: str
    count: int | None = None
    color: str | None = None
    size: str | None = None
    absent: bool = False


@dataclass(kw_only=True)
class Parse:
    """What was found so far. Groups are referred to by their place in `groups`."""

    tokens: list[_Token]
    at: int = 0
    groups: list[Group] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    texts: list[tuple[int | None, str]] = field(default_factory=list)
    styles: dict[str, bool] = field(default_factory=dict)
    background: str | None = None
    uncovered: list[str] = field(default_factory=list)
    subject: int | None = None

    def match(self, phrases: Iterable[str]) -> str | None:
        """The longest of the phrases that starts here, lower-case; None if none does."""
        best = None
        for phrase in phrases:
            if (best is None or len(phrase) > len(best)) and self._starts(phrase):
                best = phrase
        return best

    def _starts(self, phrase: str) -> bool:
        words = phrase.split(" ")
        tokens = self.tokens[self.at : self.at + len(words)]
        return len(tokens) == len(words) and all(t.word == w for t, w in zip(tokens, words, strict=True))

    def take(self, phrase: str) -> None:
        self.at += phrase.count(" ") + 1

    @property
    def here(self) -> _Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None


def parse_prompt(prompt: str) -> Parse:
    """What the prompt says, clause by clause; what no rule reads is in `uncovered`."""
    parse = Parse(tokens=_tokenize(prompt))
    if lead := parse.match(lexicon.LEAD_INS):
        parse.take(lead)
    while parse.here is not None:
        if not any(rule(parse) for rule in _RULES):
            _leave(parse)
    return parse


def _tokenize(prompt: str) -> list[_Token]:
    tokens = []
    for match in _TOKEN.finditer(prompt.translate(_QUOTES)):
        quoted = match["quoted"]
        tokens.append(
            _Token(text=quoted if quoted is not None else match[0], quoted=quoted is not None, mark=bool(match["mark"]))
        )
    return tokens


def _leave(parse: Parse) -> None:
    """Pass over one token that no rule reads; only words that join or close a phrase mean nothing by themselves."""
    token = parse.here
    assert token is not None
    if not token.mark and token.word not in ("and", "a", "an", "the"):
        parse.uncovered.append(token.text)
    if token.mark:
        parse.subject = None
    parse.at += 1


def _style(parse: Parse) -> bool:
    start = parse.at
    absent = parse.match(lexicon.NEGATIONS)
    lead = absent or parse.match(("with a", "with", "in a", "in", "a"))
    if lead:
        parse.take(lead)
    phrase = parse.match(_STYLE_PHRASES)
    if phrase is None:
        parse.at = start
        return False
    parse.take(phrase)
    parse.styles[_STYLE_PHRASES[phrase]] = absent is None
    return True


def _background(parse: Parse) -> bool:
    """ "on grey", "against a grey background", "grey background"; "on a grey box" is something else."""
    start = parse.at
    lead = parse.match(lexicon.BACKGROUND_LEADS)
    if lead:
        parse.take(lead)
    if article := parse.match(("a", "an", "the", "a plain", "plain")):
        parse.take(article)
    color = parse.match(_COLOR_WORDS)
    if color and parse.background is None:
        parse.take(color)
        noun = parse.match(lexicon.BACKGROUND_NOUNS)
        ends = parse.here is None or parse.here.mark or parse.here.word in lexicon.STOP_WORDS
        if noun or (lead in ("on", "against") and not article and ends):
            if noun:
                parse.take(noun)
            parse.background = _color(color)
            return True
    parse.at = start
    return False


def _text(parse: Parse) -> bool:
    """Quoted words, with the word "word" or a verb such as "reading" before them, which names their bearer."""
    start = parse.at
    verb = parse.match(lexicon.TEXT_VERBS)
    if verb:
        parse.take(verb)
    if article := parse.match(("the", "a", "an")):
        parse.take(article)
    noun = parse.match(lexicon.TEXT_NOUNS)
    if noun:
        parse.take(noun)
    if parse.here is None or not parse.here.quoted or not parse.here.text.strip():
        parse.at = start
        return False
    bearer = len(parse.groups) - 1 if verb and not noun and parse.groups else None
    parse.texts.append((bearer, parse.here.text))
    parse.at += 1
    return True


def _negation(parse: Parse) -> bool:
    start = parse.at
    phrase = parse.match(lexicon.NEGATIONS)
    if phrase is None:
        return False
    parse.take(phrase)
    found = False
    while True:
        group = _noun_phrase(parse)
        if group is None:
            break
        parse.groups.append(replace(group, count=None, absent=True))
        found = True
        joint = parse.match(("or", "nor", "and no", "or any"))
        if joint is None:
            break
        parse.take(joint)
    if not found:
        parse.at = start
    return found


def _relation(parse: Parse) -> bool:
    """A relation between the group just read and the one that follows."""
    start = parse.at
    for lead in ("is", "are"):
        if parse.match((lead,)):
            parse.take(lead)
    phrase = parse.match(lexicon.RELATIONS)
    if phrase is None or parse.subject is None:
        parse.at = start
        return False
    subject = parse.subject
    parse.take(phrase)
    group = _noun_phrase(parse)
    if group is None:
        parse.at = start
        return False
    parse.groups.append(group)
    parse.subject = len(parse.groups) - 1
    parse.relations.append((subject, lexicon.RELATIONS[phrase], parse.subject))
    return True


def _group(parse: Parse) -> bool:
    group = _noun_phrase(parse)
    if group is None:
        return False
    parse.groups.append(group)
    parse.subject = len(parse.groups) - 1
    return True


_RULES = (_style, _background, _text, _negation, _relation, _group)


def _noun_phrase(parse: Parse) -> Group | None:
    """(number) (size, colour, other words) noun. Words that are neither size nor colour stay with the noun."""
    start = parse.at
    count = _number(parse)
    if count is None and parse.match(("the",)):
        parse.take("the")
    words: list[str] = []
    color = size = None
    while (token := parse.here) is not None:
        word = token.word
        if (
            not word
            or word in lexicon.STOP_WORDS
            or (words and word.endswith("ing") and word not in lexicon.NOUNS_IN_ING)
        ):
            break
        if words and (parse.match(lexicon.RELATIONS) or parse.match(lexicon.TEXT_VERBS)):
            break
        if mixed := _mixed_colors(parse):
            parse.uncovered += mixed
            parse.at += len(mixed)
            continue
        if color is None and word in _COLOR_WORDS:
            color = _color(word)
        elif size is None and word in _SIZE_WORDS:
            size = lexicon.SIZE_SYNONYMS.get(word, word)
        else:
            words.append(word)
        parse.at += 1
    verb = words and words[0].endswith("ing") and parse.at - start == 1 and words[0] not in lexicon.NOUNS_IN_ING
    if not words or verb or words[-1] in lexicon.TEXT_NOUNS:
        parse.at = start
        return None
    return Group(noun=_singular(" ".join(words)), count=count, color=color, size=size)


def _mixed_colors(parse: Parse) -> list[str]:
    """The words of "red and blue" before a noun: no requirement says that one thing has two colours."""
    words = [t.word for t in parse.tokens[parse.at : parse.at + 4]]
    mixed = len(words) == 4 and words[0] in _COLOR_WORDS and words[1] == "and" and words[2] in _COLOR_WORDS
    return words[:3] if mixed and words[3] and words[3] not in lexicon.STOP_WORDS else []


def _number(parse: Parse) -> int | None:
    phrase = parse.match(lexicon.NUMBERS)
    if phrase is not None:
        parse.take(phrase)
        return lexicon.NUMBERS[phrase]
    token = parse.here
    if token is not None and token.word.isdecimal() and len(token.word) <= 3:
        parse.at += 1
        return int(token.word)
    return None


def _color(word: str) -> str:
    return lexicon.COLOR_SYNONYMS.get(word, word)


@cache
def _inflect() -> inflect.engine:
    return inflect.engine()


@lru_cache(maxsize=4096)
def _singular(noun: str) -> str:
    """The singular of a noun's last word, and the lexicon's name for it where it has one."""
    *first, last = noun.split(" ")
    for name in (noun, last):
        if name in lexicon.NOUN_SYNONYMS:
            return " ".join([*(first if name == last else []), lexicon.NOUN_SYNONYMS[name]]).strip()
    # inflect takes "bus", "glass" and "iris" for plurals
    if not last.endswith(("us", "ss", "is")):
        last = str(_inflect().singular_noun(last) or last)
    singular = " ".join([*first, last])
    if singular in lexicon.NOUN_SYNONYMS:
        return lexicon.NOUN_SYNONYMS[singular]
    return " ".join([*first, lexicon.NOUN_SYNONYMS.get(last, last)])
