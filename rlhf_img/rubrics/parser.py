"""Reading a prompt from left to right: clauses become groups, relations, texts, styles and questions.

Each rule reads one clause where the reader stands, or nothing. Rules on what is said of a thing are in `predicates`.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache

from rlhf_img.rubrics import lexicon, predicates
from rlhf_img.rubrics.found import Parse, Question
from rlhf_img.rubrics.reading import (
    BOUNDS,
    OPENS_A_NOUN_PHRASE,
    QUALITIES,
    RELATIONS,
    Group,
    NounPhrase,
    Phrases,
    noun_phrase,
)
from rlhf_img.rubrics.words import Part

_STYLES = {**lexicon.STYLES, **lexicon.MEDIA}
_STYLE_OF = {phrase: name for name, style in _STYLES.items() for phrase in style.phrases}
_STYLE_PHRASES = Phrases(_STYLE_OF)
_LOOKS = {phrase for style in lexicon.STYLES.values() for phrase in style.phrases}
_STYLE_LEADS = Phrases(("with a", "with", "in a", "in", "a"))
_ARTICLES = Phrases(("a", "an", "the", "a plain", "plain"))
_POSITIONS = Phrases(lexicon.POSITIONS)
_NEGATIONS = Phrases(lexicon.NEGATIONS)
_OR = Phrases(("or", "nor", "and no", "or any", "or a", "or an"))
_NOBODY = Phrases(lexicon.NOBODY)
_FRAMES = Phrases(lexicon.FRAMES)
_TEXT_VERBS = Phrases(lexicon.TEXT_VERBS)
_BACKGROUND_LEADS = Phrases(lexicon.BACKGROUND_LEADS)
_IN_STYLE = Phrases(("in the style of", "in style of", "style of", "inspired by"))


def parse_prompt(prompt: str) -> Parse:
    """What the prompt says, clause by clause; what no rule reads is in `uncovered`."""
    parse = Parse(prompt)
    while not parse.ended:
        start = parse.at
        word = parse.words[start]
        kind = word if word in _OPENERS else "1" if word[:1].isdecimal() else ""
        for rule in _rules(kind, parse.part(start), parse.has_texts):
            if rule(parse):
                break
            parse.at = start
        else:
            _leave(parse)
    parse.close()
    return parse


def _leave(parse: Parse) -> None:
    """Pass over one token that no rule reads; only words that join or close a phrase mean nothing by themselves."""
    token = parse.tokens[parse.at]
    if token.part is Part.MARK:
        parse.subjects = parse.topic
        if token.text not in (",", ":"):
            parse.close()
    elif token.word in lexicon.PRONOUNS:
        if token.word not in ("which", "that", "who"):
            parse.subjects = parse.topic = parse.topic or parse.subjects
    elif token.word not in lexicon.SILENT:
        parse.uncovered.append(token.text)
    parse.at += 1


def _frame(parse: Parse) -> bool:
    if parse.accept(_FRAMES) is None:
        return False
    parse.subjects = parse.topic = []
    return True


def _style(parse: Parse) -> bool:
    absent = parse.accept(_NEGATIONS)
    if parse.accept(_IN_STYLE):
        start = parse.at
        while not parse.ended and not parse.ends():
            parse.at += 1
        parse.styles[" ".join(t.text for t in parse.tokens[start : parse.at]).lower()] = not absent
        return parse.at > start
    start = parse.at
    if not absent:
        parse.accept(_STYLE_LEADS)
    phrase = parse.accept(_STYLE_PHRASES)
    if phrase is None:
        return False
    follows = parse.part(parse.at)
    names_picture = not parse.ended and parse.words[parse.at] in lexicon.MEDIUM_NOUNS
    if not parse.ended and parse.words[parse.at] in lexicon.LOOK_NOUNS - {"style"}:
        return False  # "cinematic lighting"
    if (phrase in _LOOKS or phrase in _BEFORE_NOUNS) and follows in (Part.NOUN, Part.PLURAL) and not names_picture:
        return not absent and " " in phrase and _of_noun(parse, phrase)  # it speaks of that noun, not of the picture
    if phrase in _ONLY_ALONE and not (names_picture or (parse.ends() and parse.part(start - 1) is Part.MARK)):
        return False  # "a black and white cat"
    if _STYLE_OF[phrase] in lexicon.MEDIA and parse.words[parse.at : parse.at + 1] in (["on"], ["in"], ["above"]):
        return False  # "a watercolor on the wall" is a thing
    parse.styles[_STYLE_OF[phrase]] = absent is None
    parse.accept_word(("style", "effect", "effects"))
    while parse.accept_word(lexicon.MEDIUM_NOUNS):
        pass
    parse.accept_word(("of",))
    return True


def _of_noun(parse: Parse, phrase: str) -> bool:
    """ "out of focus background"."""
    noun = noun_phrase(parse)
    if noun is not None:
        group = replace(noun.group, traits=(*noun.group.traits, phrase))
        parse.subjects = [parse.add(replace(noun, group=group))]
    return noun is not None


_BEFORE_NOUNS = frozenset(("motion-blurred", "motion blurred", "noisy"))
_ONLY_ALONE = frozenset(("black and white", "black-and-white", "noise"))


def _background(parse: Parse) -> bool:
    """ "on grey", "against a grey background", "grey background"; "on a grey box" is something else."""
    if parse.background is not None:
        return False
    lead = parse.accept(_BACKGROUND_LEADS)
    article = parse.accept(_ARTICLES)
    color = parse.accept_word(lexicon.COLOR_WORDS)
    if color is None:
        return False
    noun = parse.accept_word(lexicon.BACKGROUND_NOUNS)
    ends = parse.ended or parse.part(parse.at) is Part.MARK or parse.words[parse.at] in _ENDS_A_COLOR
    if not noun and not (lead in ("on", "against") and not article and ends):
        return False
    parse.background = lexicon.COLOR_SYNONYMS.get(color, color)
    return True


_ENDS_A_COLOR = lexicon.SILENT | lexicon.ALL_RELATIONS.keys()


def _text(parse: Parse) -> bool:
    """Quoted words; a verb such as "reading" or a noun such as "word" may stand before them."""
    start = parse.at
    if not parse.quote_within(_REACH):
        return False
    if parse.accept(_ONE_OF_THEM) and RELATIONS.at(parse.words, parse.at):
        return False
    verb = parse.accept(_TEXT_VERBS)
    parse.accept_word(lexicon.DETERMINERS | {"a", "an"})
    while parse.part(parse.at) in (Part.ADJECTIVE, Part.NOUN) and parse.words[parse.at] not in lexicon.TEXT_NOUNS:
        parse.at += 1
    noun = parse.accept_word(lexicon.TEXT_NOUNS)
    while noun and parse.accept_word(lexicon.TEXT_NOUNS):
        pass
    if (not noun and not verb and parse.at > start) or parse.ended:
        return False
    if parse.tokens[parse.at].text in (",", ":"):
        parse.at += 1
    if parse.part(parse.at) is not Part.QUOTE:
        return False
    if not noun and parse.part(parse.at + 1) in (Part.NOUN, Part.PLURAL) and _phrase_with_quote(parse, parse.at):
        return False  # 'an "OPEN" sign' is a noun phrase
    text = parse.tokens[parse.at].text.removesuffix(",")
    alone = not verb and (parse.part(start - 1) is Part.MARK or parse.words[start - 1] in ("and", "or"))
    parse.at += 1
    if text.strip():
        parse.texts.append((None if alone else _bearer(parse), text))
    if not parse.ended and parse.words[parse.at] in _WRITTEN and parse.words[parse.at + 1 : parse.at + 2] in _UPON:
        parse.at += 1  # "written on it"
    return True


_WRITTEN = frozenset(("written", "printed", "painted", "engraved", "inscribed", "carved", "embroidered", "stamped"))
_UPON = (["on"], ["in"], ["across"], ["over"], ["above"], ["at"])
_ONE_OF_THEM = Phrases(("one", "another", "the other", "the other one", "the first", "the second", "the third", "it"))


def _numeral(parse: Parse) -> bool:
    """ "the number 7", "the letter A": what is written."""
    start = parse.at
    if not parse.numeral_within(_REACH):
        return False
    verb = parse.accept(_TEXT_VERBS)
    while parse.accept_word(("a", "the", "big", "large")):
        pass
    if parse.accept_word(lexicon.NUMERAL_NOUNS) is None or parse.ended:
        parse.at = start
        return False
    text = parse.tokens[parse.at].text
    if not (text.isdecimal() or (len(text) == 1 and text.isupper())):
        parse.at = start
        return False
    alone = not verb and parse.part(start - 1) is Part.MARK
    parse.texts.append((None if alone else _bearer(parse), text))
    parse.at += 1
    if parse.words[parse.at : parse.at + 1] and parse.words[parse.at] in _WRITTEN:
        parse.at += 1
    return True


_REACH = 7
"""Tokens from the start of a clause to the quoted words that it leads to."""


def _phrase_with_quote(parse: Parse, at: int) -> bool:
    back, parse.at = parse.at, at
    phrase = noun_phrase(parse)
    parse.at = back
    return phrase is not None and bool(phrase.quotes)


def _bearer(parse: Parse) -> int | None:
    """What bears quoted words: the nearest thing of the sentence that usually does, else the nearest thing."""
    for place in reversed(range(parse.sentence, len(parse.groups))):
        if parse.groups[place].noun.rpartition(" ")[2] in lexicon.TEXT_BEARERS and not parse.groups[place].absent:
            return place
    return parse.subjects[-1] if parse.subjects else None


def _negation(parse: Parse) -> bool:
    if BOUNDS.at(parse.words, parse.at):
        return False  # "no more than three"
    if parse.accept(_NOBODY):
        parse.groups.append(Group(noun="person", name="people", absent=True))
        parse.subjects = []
        return True
    negation = parse.accept(_NEGATIONS)
    if negation is None:
        return False
    phrases = _negated_list(parse)
    parse.groups += [replace(phrase.group, count=None, absent=True) for phrase in phrases]
    if negation not in lexicon.ATTACHED_NEGATIONS:
        parse.subjects = []
    return bool(phrases)


def _negated_list(parse: Parse) -> list[NounPhrase]:
    """ "cars, boats, or people": what follows a comma belongs to it only if an "or" comes after."""
    found: list[NounPhrase] = []
    sure, at, joined = 0, parse.at, False
    while phrase := noun_phrase(parse, after_no=True):
        found.append(phrase)
        if len(found) == 1 or joined:
            sure, at = len(found), parse.at
        comma = not parse.ended and parse.tokens[parse.at].text == ","
        parse.at += comma
        joined = parse.accept(_OR) is not None
        if not comma and not joined:
            break
    parse.at = at
    return found[:sure]


def _position(parse: Parse) -> bool:
    """A place in the picture: of the thing just named, or of the one that follows."""
    phrase = parse.accept(_POSITIONS)
    if phrase is None or parse.words[parse.at : parse.at + 1] == ["of"] or parse.part(parse.at) is Part.NOUN:
        return False
    if parse.subjects:
        parse.ask(parse.subjects, lexicon.POSITIONS[phrase])
    else:
        parse.pending.append((lexicon.POSITIONS[phrase], -1))
    return True


def _look(parse: Parse) -> bool:
    """Qualities between marks speak of the picture: ", highly detailed,"."""
    start = parse.at
    while parse.part(parse.at) in (Part.ADJECTIVE, Part.ADVERB, Part.PAST):
        parse.at += 1
    words = parse.words[start : parse.at]
    bare = lexicon.COLOR_WORDS | lexicon.SIZE_WORDS
    if not words or not parse.ends() or parse.part(start - 1) is not Part.MARK or bare.intersection(words):
        return False
    if not any(parse.part(place) in QUALITIES for place in range(start, parse.at)) or words[0][0].isdigit():
        return False
    parse.questions.append(Question(about=None, says=f"Is the image {' '.join(words)}?"))
    return True


def _group(parse: Parse) -> bool:
    start = parse.at
    phrase = noun_phrase(parse)
    if phrase is None:
        return False
    last = phrase.group.noun.rpartition(" ")[2]
    if last in lexicon.MEDIUM_NOUNS and _names_the_picture(parse, start):
        kind = " ".join([*phrase.group.traits, phrase.group.noun])
        parse.texts += [(None, text) for text in phrase.quotes]
        if kind not in lexicon.NEUTRAL_MEDIA:
            parse.styles[kind] = True
        parse.accept_word(("of", "showing", "depicting", "featuring", "with"))
        return True
    if predicates.look_noun(parse, phrase, start):
        return True
    joined = start > 0 and parse.words[start - 1] == "and" and parse.subjects == parse.topic
    if not parse.ended and parse.part(start - 2) is Part.MARK and parse.words[parse.at] in _ONE_IS:
        joined = False  # ", and the book is on the table" says nothing of what was named before
    place = parse.add(phrase)
    for relation, other in parse.pending:
        if other < 0:
            parse.ask([place], relation)
        else:
            parse.relations.append((place, relation, other))
    parse.pending = []
    parse.subjects = parse.topic = [*(parse.topic if joined else []), place]
    return True


_ONE_IS = frozenset(("is", "was", "has", "'s"))


def _boast(parse: Parse) -> bool:
    """ "masterpiece, 8k": left uncovered, and no things."""
    word = parse.accept_word(lexicon.QUALITY_WORDS)
    if word is None or parse.part(parse.at) in (Part.NOUN, Part.PLURAL, Part.ADJECTIVE):
        return False
    parse.uncovered.append(parse.tokens[parse.at - 1].text)
    return True


def _names_the_picture(parse: Parse, start: int) -> bool:
    """Whether a noun such as "painting" is the picture itself: it leads the prompt, or stands between marks."""
    if start == 0 and parse.words[parse.at : parse.at + 1] and parse.words[parse.at] in (
        "of", "showing", "depicting", "featuring", "with",
    ):  # fmt: skip
        return True
    return parse.part(start - 1) is Part.MARK and parse.ends()


_Rule = Callable[[Parse], bool]
_ADJECTIVE_LIKE = (Part.ADJECTIVE, Part.ADVERB, Part.PAST)
_VERB_LIKE = (Part.VERB, Part.ING, Part.PAST, Part.ADVERB, Part.NOUN, Part.PLURAL)
_RULES: tuple[tuple[_Rule, Collection[str], Collection[Part]], ...] = (
    (_frame, _FRAMES.first_words, ()),
    (_style, {*_NEGATIONS.first_words, *_IN_STYLE.first_words, *_STYLE_LEADS.first_words, *_STYLE_PHRASES.first_words},
     ()),
    (_background, {*_BACKGROUND_LEADS.first_words, *_ARTICLES.first_words, *lexicon.COLOR_WORDS}, ()),
    (_text, (), tuple(Part)),
    (_numeral, (), tuple(Part)),
    (_negation, {*_NEGATIONS.first_words, *_NOBODY.first_words}, ()),
    (_position, _POSITIONS.first_words, ()),
    (predicates.relation, RELATIONS.first_words, ()),
    (_boast, lexicon.QUALITY_WORDS, ()),
    (predicates.after_noun, predicates.AFTER_NOUN, (Part.ADJECTIVE, Part.ADVERB)),
    (predicates.predicate, lexicon.COPULAS, ()),
    (predicates.one_of, predicates.ONE_OF, ()),
    (predicates.does_not, lexicon.AUXILIARIES, ()),
    (predicates.having, predicates.HAVING, ()),
    (_look, (), _ADJECTIVE_LIKE),
    (predicates.verb, ("not", "n't"), _VERB_LIKE),
    (_group, OPENS_A_NOUN_PHRASE, (*_VERB_LIKE, Part.ADJECTIVE, Part.QUOTE)),
)  # fmt: skip
"""Each rule, in the order in which they are tried, with the words and the parts of speech that it can begin with."""
_OPENERS = frozenset().union(*(words for _, words, _ in _RULES))


@cache
def _rules(word: str, part: Part, has_texts: bool) -> tuple[_Rule, ...]:
    """The rules that can begin with a word. has_texts: the prompt quotes something or names a numeral."""
    return tuple(
        rule for rule, words, parts in _RULES
        if (word in words or part in parts) and (has_texts or rule not in (_text, _numeral))
    )  # fmt: skip
