"""Reading a prompt from left to right: clauses become groups, relations, texts, styles and questions.

Each rule reads one clause where the reader stands, or nothing. Rules on what is said of a thing are in `predicates`.
"""

from dataclasses import replace

from rlhf_img.rubrics import lexicon, predicates
from rlhf_img.rubrics.found import Parse, Question
from rlhf_img.rubrics.reading import QUALITIES, RELATIONS, Phrases, noun_phrase
from rlhf_img.rubrics.words import Part

_STYLES = {**lexicon.STYLES, **lexicon.MEDIA}
_STYLE_OF = {phrase: name for name, style in _STYLES.items() for phrase in style.phrases}
_STYLE_PHRASES = Phrases(_STYLE_OF)
_LOOKS = {phrase for style in lexicon.STYLES.values() for phrase in style.phrases}
_STYLE_LEADS = Phrases(("with a", "with", "in a", "in", "a"))
_ARTICLES = Phrases(("a", "an", "the", "a plain", "plain"))
_POSITIONS = Phrases(lexicon.POSITIONS)
_NEGATIONS = Phrases(lexicon.NEGATIONS)
_OR = Phrases(("or", "nor", "and no", "or any"))
_FRAMES = Phrases(lexicon.FRAMES)
_TEXT_VERBS = Phrases(lexicon.TEXT_VERBS)
_BACKGROUND_LEADS = Phrases(lexicon.BACKGROUND_LEADS)
_IN_STYLE = Phrases(("in the style of", "in style of", "style of", "inspired by"))


def parse_prompt(prompt: str) -> Parse:
    """What the prompt says, clause by clause; what no rule reads is in `uncovered`."""
    parse = Parse(prompt)
    while not parse.ended:
        start = parse.at
        for rule in _RULES if parse.words[start] in _OPENERS else _RULES_OF_CONTENT:
            if rule(parse):
                break
            parse.at = start
        else:
            _leave(parse)
    return parse


def _leave(parse: Parse) -> None:
    """Pass over one token that no rule reads; only words that join or close a phrase mean nothing by themselves."""
    token = parse.tokens[parse.at]
    if token.part is Part.MARK:
        parse.subjects = parse.topic
        if token.text != ",":
            parse.topic, parse.pending, parse.sentence = [], [], len(parse.groups)
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
    if not absent:
        parse.accept(_STYLE_LEADS)
    phrase = parse.accept(_STYLE_PHRASES)
    if phrase is None:
        return False
    follows = parse.part(parse.at)
    if phrase in _LOOKS and follows in (Part.NOUN, Part.PLURAL):
        return False  # it speaks of that noun, not of the picture
    if _STYLE_OF[phrase] in lexicon.MEDIA and parse.words[parse.at : parse.at + 1] in (["on"], ["in"], ["above"]):
        return False  # "a watercolor on the wall" is a thing
    parse.styles[_STYLE_OF[phrase]] = absent is None
    parse.accept_word(("style", "of", "photo", "photograph", "image", "picture"))
    return True


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
    if parse.accept(_NEGATIONS) is None:
        return False
    found = False
    while phrase := noun_phrase(parse):
        parse.groups.append(replace(phrase.group, count=None, absent=True))
        found = True
        if parse.accept(_OR) is None:
            break
    parse.subjects = []
    return found


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
    place = parse.add(phrase)
    for relation, other in parse.pending:
        if other < 0:
            parse.ask([place], relation)
        else:
            parse.relations.append((place, relation, other))
    parse.pending = []
    parse.subjects = parse.topic = [*(parse.topic if joined else []), place]
    return True


def _names_the_picture(parse: Parse, start: int) -> bool:
    """Whether a noun such as "painting" is the picture itself: it leads the prompt, or stands between marks."""
    if start == 0 and parse.words[parse.at : parse.at + 1] and parse.words[parse.at] in (
        "of", "showing", "depicting", "featuring", "with",
    ):  # fmt: skip
        return True
    return parse.part(start - 1) is Part.MARK and parse.ends()


_RULES_OF_CONTENT = (
    _text, predicates.after_noun, predicates.predicate, predicates.having, _look, predicates.verb, _group,
)  # fmt: skip
_RULES = (
    _frame, _style, _background, _text, _negation, _position, predicates.relation, predicates.after_noun,
    predicates.predicate, predicates.having, _look, predicates.verb, _group,
)  # fmt: skip
_OPENERS = frozenset(lexicon.COLOR_WORDS).union(*(
    phrases.first_words for phrases in (
        _FRAMES, _NEGATIONS, _STYLE_LEADS, _IN_STYLE, _STYLE_PHRASES, _BACKGROUND_LEADS, _ARTICLES, _POSITIONS,
        RELATIONS,
    )
))  # fmt: skip
"""Words with which a rule that is not one of content can begin; before other words those need not be tried."""
