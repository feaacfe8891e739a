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
from typing import TYPE_CHECKING

from rlhf_img.rubrics import lexicon

if TYPE_CHECKING:
    import inflect


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
    (re.compile(r"(ous|ful|less|able|ible|ical|onal|ular|ish|ive|ary|esque|-like|-(?:old|free|style|themed|sized|colou?red|toned))$"),
     Part.ADJECTIVE),
    (re.compile(r"ly$"), Part.ADVERB),
    (re.compile(r"..ing$"), Part.ING),
    (re.compile(r"..ed$"), Part.PAST),
    (re.compile(r"[^us]s$"), Part.PLURAL),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Token:
    """One word, mark or quoted text; `word` is lower-case, and empty unless it is a word.

    A name ("Statue of Liberty") is one token; it has no singular of its own.
    """

    text: str
    word: str
    part: Part
    is_name: bool = False


_TOKEN = re.compile(
    r"(?P<word>[^\W_]+(?:(?:[-'’]|[.,:/](?=\d))[^\W_]+)*)"
    # Double quotes of all kinds; a straight one after a letter or digit is inches or a stray mark.
    r'|“(?P<curly>[^”]*)”|„(?P<low>[^“”]*)[“”]|«(?P<angle>[^»]*)»|(?<!\w)"(?P<straight>[^"]*)"'
    # Single quotes open before a word and close after one: neither "don't" nor "dogs' bowls" nor "'90s" does.
    r"|(?<![\w'’])['‘](?!\d0s|n['’]|\s)(?P<single>[^\"“”]{0,150}?[^\s\"“”])['’](?!\w)"
    r"|(?P<owner>['’]s?(?!\w))|(?P<mark>[,;.:!?()\n|])|(?P<other>[^\s'\"])"
)
_CONTRACTION = re.compile(r"(.+)(n['’]t|['’](?:s|re|m|ve|ll|d))$", re.IGNORECASE)


def tokenize(prompt: str) -> list[Token]:
    """The prompt's words, marks and quoted texts, in order; "cat's" is two words, and a name is one."""
    tokens = _tokens(prompt)
    return _tell_verbs(tokens if prompt[1:].islower() else _join_names(tokens))


def _tokens(prompt: str) -> list[Token]:
    tokens = []
    for match in _TOKEN.finditer(prompt):
        kind, text = str(match.lastgroup), match[0]
        if kind == "word":
            if ("'" in text or "’" in text) and (split := _CONTRACTION.fullmatch(text)):
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


def _join_names(tokens: list[Token]) -> list[Token]:
    """Words with a capital inside a sentence are names: runs of them, also across "of", become one token.

    Where most words have one, as in a title, it says nothing.
    """
    capitals = [t.word != "" and t.text[0].isupper() for t in tokens]
    if 2 * sum(capitals) > sum(t.word != "" for t in tokens):
        return tokens
    joined: list[Token] = []
    at = 0
    while at < len(tokens):
        end = _name_end(tokens, capitals, at)
        joined.append(tokens[at] if end == at else _name(tokens[at:end]))
        at = max(end, at + 1)
    return joined


def _tell_verbs(tokens: list[Token]) -> list[Token]:
    """Most words in -ing that the lexicon has as nouns are verbs after a noun, "is", a comma or "and", and before an
    article: "a woman reading", "is fishing", "drinking a tea"; but "a fishing boat"."""
    for at, token in enumerate(tokens):
        if token.part is not Part.NOUN or not token.word.endswith("ing"):
            continue
        before = tokens[at - 1] if at else None
        after = tokens[at + 1].word if at + 1 < len(tokens) else ""
        is_thing = token.word in lexicon.NOUNS_IN_ING
        loose = token.word not in lexicon.GERUND_MODIFIERS
        if before is None or not _is_verb_of(token.word):
            verb = False
        elif before.word in lexicon.COPULAS or before.word in ("not", "n't", "while"):
            verb = True
        elif after in ("a", "an") or after in lexicon.DETERMINERS:
            verb = before.part in (Part.NOUN, Part.PLURAL) or (not is_thing and before.word not in ("a", "an", "the"))
        elif is_thing:
            verb = False
        else:
            verb = loose and (before.part in (Part.NOUN, Part.PLURAL) or before.text == "," or before.word == "and")
        if verb:
            tokens[at] = Token(token.text, token.word, Part.ING)
    return tokens


def _is_verb_of(gerund: str) -> bool:
    """Whether a word in -ing is the form of a verb that the lexicon knows: "drinking", "riding", "sitting"."""
    stem = gerund[:-3]
    stems = (stem, f"{stem}e", stem[:-1] if stem[-2:-1] == stem[-1:] else "")
    return any(_tags().get(verb) in (Part.VERB, Part.NOUN, Part.PAST) and len(verb) > 2 for verb in stems)


_PARTS_OF_NAMES = (["of"], ["of", "the"], ["de"], ["von"], ["van"])


def _name_end(tokens: list[Token], capitals: list[bool], start: int) -> int:
    """Where the name that starts here ends; `start` if none does."""
    first = start == 0 or tokens[start - 1].text in ".!?:"
    if not capitals[start] or tokens[start].part is Part.DETERMINER or tokens[start].word in _NO_NAMES:
        return start
    if first and (tokens[start].part is not Part.NOUN or tokens[start].word in lexicon.MEDIUM_NOUNS):
        return start
    end = start + 1
    while end < len(tokens):
        joint = next((j for j in _PARTS_OF_NAMES if [t.word for t in tokens[end : end + len(j)]] == j), [])
        after = end + len(joint)
        if after >= len(tokens) or not capitals[after] or (joint and first):
            break
        end = after + 1
    if end > start + 1:
        return end
    # one word alone matters only where it looks like a plural: "Anubis", "VHS"
    text = tokens[start].text
    looks_plural = text.isupper() or text.endswith(("us", "is", "as", "os"))
    return start + 1 if looks_plural and not first and tokens[start].word not in _tags() else start


_NO_NAMES = frozenset((*lexicon.NUMBERS, *lexicon.COLOR_WORDS, *lexicon.SIZE_WORDS, *lexicon.SILENT, "i"))


def _name(tokens: list[Token]) -> Token:
    text = " ".join(token.text for token in tokens)
    return Token(text, text.lower().replace("’", "'"), Part.NOUN, is_name=True)


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
    known = capitals | tags
    for word, part in known.items():
        if part is Part.VERB and word.endswith("ed"):
            tags[word] = Part.PAST  # "topped": the lexicon has it as the past tense only
        elif part is Part.NOUN and _PLURAL.fullmatch(word) and known.get(word[:-1]) is Part.NOUN:
            tags[word] = Part.PLURAL  # "outfits"
    return capitals | tags | _OWN_PARTS


_PLURAL = re.compile(r"(?!(?:species|series|means|news|lens|gas|canvas)$).*[^sui]s")
_OWN_PARTS = {
    **dict.fromkeys(lexicon.DETERMINERS, Part.DETERMINER),
    **dict.fromkeys(lexicon.COLOR_WORDS, Part.ADJECTIVE),
    **dict.fromkeys(lexicon.SIZE_WORDS, Part.ADJECTIVE),
    **dict.fromkeys(lexicon.NOUNS_IN_ING, Part.NOUN),
    **dict.fromkeys(lexicon.GERUND_MODIFIERS, Part.NOUN),
    **dict.fromkeys(" ".join(lexicon.SHAPE_SYNONYMS).split(), Part.NOUN),
    **dict.fromkeys(("remote", "interior", "exterior", "cherry", *lexicon.SIDES), Part.NOUN),
    **dict.fromkeys(lexicon.ALWAYS_PLURAL, Part.PLURAL),
    **dict.fromkeys(("nothing", "something", "anything", "everything"), Part.OTHER),
    **dict.fromkeys(("lit", "cut"), Part.PAST),
    "round": Part.ADJECTIVE,
    "leaves": Part.PLURAL,
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
def english() -> "inflect.engine":
    """Plurals, articles and number words. Imported here, for its import alone takes seconds."""
    import inflect

    return inflect.engine()


@lru_cache(maxsize=4096)
def participle(verb: str) -> str:
    """The -ing form: "holds", "hold" and "held" give "holding"."""
    verb = lexicon.PASTS.get(verb, verb)
    return verb if verb.endswith("ing") and len(verb) > 4 else str(english().present_participle(verb))


def is_verb(word: str) -> bool:
    """Whether a word can be a verb: the lexicon knows its -ing form as one."""
    gerund = participle(word)
    return _tags().get(gerund) is Part.ING or (gerund in _tags() and gerund not in lexicon.NOUNS_IN_ING)


@lru_cache(maxsize=8192)
def singular(noun: str) -> str:
    """The singular of a noun's last word, and the lexicon's name for it where it has one."""
    *first, last = noun.split(" ")
    for name in (noun, last):
        if name in lexicon.NOUN_SYNONYMS:
            return " ".join([*(first if name == last else []), lexicon.NOUN_SYNONYMS[name]]).strip()
    if last in lexicon.ALWAYS_PLURAL:
        return noun
    # inflect takes "bus", "glass" and "iris" for plurals; the lexicon knows better
    part = _tags().get(last)
    if part is Part.PLURAL or last.endswith("oes") or (part is not Part.NOUN and not last.endswith(("us", "ss"))):
        stem = last.removesuffix("s")
        latin = f"{last[:-1]}us" if last.endswith("i") and f"{last[:-1]}us" in _tags() else ""
        last = latin or str(english().singular_noun(last) or (stem if _tags().get(stem) is Part.NOUN else last))
    one = " ".join([*first, last])
    return lexicon.NOUN_SYNONYMS.get(one) or " ".join([*first, lexicon.NOUN_SYNONYMS.get(last, last)])
