"""Words: their part of speech, singular and participle, from a lexicon and rules of English; and prompts as tokens.

The parts of speech are those of Brill's lexicon (E. Brill 1992, "A simple rule-based part of speech tagger"), which the
package textblob carries as a text file: one most frequent tag a word. Words that it lacks are judged by their ending.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, lru_cache
from importlib.metadata import distribution
from pathlib import Path

import inflect

from rlhf_img.rubrics import lexicon


class Part(StrEnum):
    """A part of speech, as far as the parser tells them apart."""

    NOUN = "noun"
    PLURAL = "plural noun"
    ADJECTIVE = "adjective"
    VERB = "verb"
    ING = "present participle"
    PAST = "past participle"
    ADVERB = "adverb"
    DETERMINER = "determiner"
    OTHER = "other"
    QUOTE = "quoted text"
    MARK = "mark"


_PARTS = {
    "NN": Part.NOUN, "NNP": Part.NOUN, "NNS": Part.PLURAL, "NNPS": Part.PLURAL,
    "JJ": Part.ADJECTIVE, "JJR": Part.ADJECTIVE, "JJS": Part.ADJECTIVE, "NN|JJ": Part.ADJECTIVE, "CD": Part.ADJECTIVE,
    "VB": Part.VERB, "VBP": Part.VERB, "VBZ": Part.VERB, "VBD": Part.VERB, "VBG": Part.ING, "VBN": Part.PAST,
    "RB": Part.ADVERB, "RBR": Part.ADVERB, "RBS": Part.ADVERB, "FW": Part.NOUN,
}  # fmt: skip
_ENDINGS = (
    (re.compile(r"(ous|ful|less|able|ible|ical|ish|ive|ary|esque|-like|-(?:old|free|style|themed|sized|colou?red|toned))$"),
     Part.ADJECTIVE),
    (re.compile(r"ly$"), Part.ADVERB),
    (re.compile(r"..ing$"), Part.ING),
    (re.compile(r"..ed$"), Part.PAST),
    (re.compile(r"[^us]s$"), Part.PLURAL),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Token:
    """One word, mark or quoted text; `word` is lower-case, and empty unless it is a word."""

    text: str
    word: str
    part: Part


_TOKEN = re.compile(
    # Double quotes of all kinds; a straight one after a letter or digit is inches or a stray mark.
    r'“(?P<curly>[^”]*)”|„(?P<low>[^“”]*)[“”]|«(?P<angle>[^»]*)»|(?<!\w)"(?P<straight>[^"]*)"'
    # Single quotes open before a word and close after one: neither "don't" nor "dogs' bowls" nor "'90s" does.
    r"|(?<![\w'’])['‘](?!\d0s|n['’]|\s)(?P<single>[^\"“”]{0,150}?[^\s\"“”])['’](?!\w)"
    r"|(?P<owner>['’]s?(?!\w))|(?P<word>[^\W_]+(?:(?:[-'’]|[.,:/](?=\d))[^\W_]+)*)|(?P<mark>[,;.:!?()\n|])|(?P<other>[^\s'\"])"
)
_CONTRACTION = re.compile(r"(.+)(n['’]t|['’](?:s|re|m|ve|ll|d))$", re.IGNORECASE)


def tokenize(prompt: str) -> list[Token]:
    """The prompt's words, marks and quoted texts, in order; "cat's" is two words."""
    tokens = []
    for match in _TOKEN.finditer(prompt):
        kind, text = str(match.lastgroup), match[0]
        if kind == "word":
            if split := _CONTRACTION.fullmatch(text):
                tokens += [_word(split[1]), Token(split[2], split[2].lower().replace("’", "'"), Part.OTHER)]
            else:
                tokens.append(_word(text))
        elif kind == "owner":
            # a plural's apostrophe; a stray one elsewhere means nothing
            if tokens and tokens[-1].part is Part.PLURAL:
                tokens.append(Token(text, "'s", Part.OTHER))
        elif kind == "mark":
            tokens.append(Token(text, "", Part.MARK))
        elif kind == "other":
            # dashes part clauses, other signs of ASCII are nothing that one could see
            tokens.append(Token(text, "", Part.MARK if text.isascii() or text in "–—" else Part.OTHER))
        else:
            tokens.append(Token(match[kind], "", Part.QUOTE))
    return tokens


@lru_cache(maxsize=16384)
def _word(text: str) -> Token:
    word = text.lower().replace("’", "'")
    return Token(text, word, part_of(word))


@cache
def _tags() -> dict[str, Part]:
    """Word -> part of speech. A word that the lexicon has only in capitals is lower-cased."""
    path = Path(str(distribution("textblob").locate_file("textblob/en/en-lexicon.txt")))
    tags: dict[str, Part] = {}
    capitals: dict[str, Part] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        word, _, tag = line.partition(" ")
        if word.islower():
            tags[word] = _PARTS.get(tag, Part.OTHER)
        elif not word.endswith("s"):  # no proper noun says whether "donuts" is a plural
            capitals[word.lower()] = _PARTS.get(tag, Part.OTHER)
    return capitals | tags | _OWN_PARTS


_OWN_PARTS = {
    **dict.fromkeys(lexicon.DETERMINERS, Part.DETERMINER),
    **dict.fromkeys(lexicon.COLOR_WORDS, Part.ADJECTIVE),
    **dict.fromkeys(lexicon.SIZE_WORDS, Part.ADJECTIVE),
    **dict.fromkeys(lexicon.NOUNS_IN_ING, Part.NOUN),
    **dict.fromkeys(lexicon.GERUND_MODIFIERS, Part.NOUN),
    **dict.fromkeys(" ".join(lexicon.SHAPE_SYNONYMS).split(), Part.NOUN),
    **dict.fromkeys(("remote", "interior", "exterior", *lexicon.SIDES), Part.NOUN),
    "lit": Part.PAST,
    **dict.fromkeys((word for word in lexicon.RELATIONS if " " not in word), Part.OTHER),
    **dict.fromkeys((word for word in lexicon.OTHER_RELATIONS if " " not in word), Part.OTHER),
}


@lru_cache(maxsize=16384)
def part_of(word: str) -> Part:
    """The part of speech of a lower-case word."""
    tags = _tags()
    if part := tags.get(word):
        return part
    for ending, part in _ENDINGS:
        if ending.search(word):
            return part
    if "-" in word:
        last = part_of(word.rpartition("-")[2])
        return Part.ADJECTIVE if last in (Part.ING, Part.PAST) else last
    return Part.NOUN


@cache
def _inflect() -> inflect.engine:
    return inflect.engine()


@lru_cache(maxsize=4096)
def participle(verb: str) -> str:
    """The -ing form: "holds" and "hold" give "holding"."""
    return verb if verb.endswith("ing") and len(verb) > 4 else str(_inflect().present_participle(verb))


def is_verb(word: str) -> bool:
    """Whether a word can be a verb: the lexicon knows its -ing form as one."""
    return _tags().get(participle(word)) is Part.ING


@lru_cache(maxsize=8192)
def singular(noun: str) -> str:
    """The singular of a noun's last word, and the lexicon's name for it where it has one."""
    *first, last = noun.split(" ")
    for name in (noun, last):
        if name in lexicon.NOUN_SYNONYMS:
            return " ".join([*(first if name == last else []), lexicon.NOUN_SYNONYMS[name]]).strip()
    # inflect takes "bus", "glass" and "iris" for plurals; the lexicon knows better
    part = _tags().get(last)
    if part is Part.PLURAL or (part is not Part.NOUN and not last.endswith(("us", "ss"))):
        stem = last.removesuffix("s")
        last = str(_inflect().singular_noun(last) or (stem if _tags().get(stem) is Part.NOUN else last))
    one = " ".join([*first, last])
    return lexicon.NOUN_SYNONYMS.get(one) or " ".join([*first, lexicon.NOUN_SYNONYMS.get(last, last)])
