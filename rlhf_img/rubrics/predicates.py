"""Clauses that say something of a thing just named: relations, verbs and what follows "is" or "has"."""

from dataclasses import replace

from rlhf_img.rubrics import lexicon
from rlhf_img.rubrics.found import Parse, Question
from rlhf_img.rubrics.reading import BOUNDS, RELATIONS, NounPhrase, Phrases, noun_phrase
from rlhf_img.rubrics.words import Part, Token, participle

_VERBS = (Part.VERB, Part.ING, Part.PAST)
_OWN_OBJECT = frozenset((
    "with", "at", "through", "into", "to", "from", "towards", "for", "as", "of", "by", "against", "around", "like",
))  # fmt: skip
"""Prepositions of the verb before them ("looking at"); others start a relation of their own ("sitting on")."""
_WORN = frozenset(("in", "wearing", "dressed in"))
_PARTS_OF = _WORN | {"with", "on", "at"}
"""After these a verb with an object speaks of the relation's subject ("a woman with a hat riding a horse"); after what
is worn every verb does ("a man in a hat sitting")."""


def relation(parse: Parse) -> bool:
    """A relation between the group just read and the one that follows; without the former it waits for it."""
    joined, leads = parse.before() == "and", parse.before() == ","
    phrase = None if BOUNDS.at(parse.words, parse.at) else parse.accept(RELATIONS)
    if phrase is None:
        return False
    if parse.accept_word(_POINTERS) or (parse.part(parse.at + 1) not in _NOUNLIKE and parse.accept_word(("her",))):
        return _to_pronoun(parse, phrase, leads=leads)
    start = parse.at
    if parse.words[start : start + 1] == ["the"]:
        start += 1
    noun = parse.part(start) is Part.NOUN and parse.part(start + 1) not in _NOUNLIKE
    if noun and parse.words[start] in lexicon.TIMES:
        parse.at = start + 1
        parse.questions.append(Question(about=None, says=f"Is it {parse.words[start]}?"))
        return True
    start = parse.at
    own = parse.words[start : start + 1] and parse.words[start] in _POSSESSIVES
    other = noun_phrase(parse)
    if other is None:
        return False
    if look_noun(parse, other, start):
        return True
    quoted = any(parse.part(start - back) is Part.QUOTE for back in (2, 3))
    if quoted and phrase == "in" and other.group.noun in lexicon.LETTERINGS:
        parse.questions.append(Question(about=None, says=f"Is the text in {_said(parse, start)}?"))
        return True
    relation = lexicon.ALL_RELATIONS[phrase]
    place = parse.add(other)
    after_text = parse.part(start - 2) is Part.QUOTE and parse.texts and parse.texts[-1][0] is None
    if after_text and relation in ("on", "above"):
        parse.texts[-1] = (place, parse.texts[-1][1])
        parse.subjects = [place] if parse.subjects else []
    elif subjects := _of_whom(parse, relation, joined=joined, own=bool(own)):
        parse.relate(subjects, relation, place)
        if _goes_on_with_subject(parse, subjects, relation, other):
            parse.subjects = subjects
    elif relation != "of":
        parse.pending.append((relation, place))
    _also(parse, relation)
    return True


_POINTERS = frozenset(("it", "them", "him"))
_POSSESSIVES = frozenset(("its", "his", "her", "their"))


def _of_whom(parse: Parse, relation: str, *, joined: bool, own: bool) -> list[int]:
    """What a relation speaks of: the thing just named, or after "and", and with "their dog", the topic."""
    if parse.topic and (joined or (own and relation == "with")):
        return parse.topic
    return parse.subjects


def _goes_on_with_subject(parse: Parse, subjects: list[int], relation: str, other: NounPhrase) -> bool:
    """Whether what follows speaks of the subject still: after "a cup of tea" and "an owl with yellow eyes"."""
    if relation == "with":
        return other.group.noun.rpartition(" ")[2] in lexicon.BODY_PARTS
    return relation == "of" and all(
        parse.groups[place].noun.rpartition(" ")[2] in lexicon.CONTAINERS for place in subjects
    )


def _to_pronoun(parse: Parse, phrase: str, *, leads: bool) -> bool:
    """ "a truck with a man leaning on it": a relation to what was named before; after quoted words nothing new.

    leads: what it is said of follows, as in ", below it a boat".
    """
    if leads and parse.topic:
        parse.pending.append((lexicon.ALL_RELATIONS[phrase], parse.topic[-1]))
        return True
    if any(parse.part(parse.at - back) is Part.QUOTE for back in (3, 4, 5)):
        return True
    others = [place for place in parse.topic if place not in parse.subjects]
    if not others and parse.relations and parse.relations[-1][2] not in parse.subjects:
        others = [parse.relations[-1][2]]
    if not others or not parse.subjects:
        parse.uncovered.append(f"{phrase} {parse.before()}")
        return True
    subjects = parse.subjects
    parse.relate(subjects[-1:], lexicon.ALL_RELATIONS[phrase], others[0])
    parse.subjects = subjects
    return True


def _said(parse: Parse, start: int) -> str:
    """The words from a place to here."""
    return " ".join(t.text for t in parse.tokens[start : parse.at] if t.word).lower()


_NOUNLIKE = (Part.NOUN, Part.PLURAL, Part.ADJECTIVE)


def _also(parse: Parse, relation: str) -> None:
    """More objects of one relation, if the clause ends after them: "holding a cup and a book"."""
    if (relation != "with" and relation in lexicon.ALL_RELATIONS.values()) or not parse.relations:
        return
    start, phrases, joint = parse.at, [], ""
    while joint != "and" and (joint := parse.accept_mark_or_and()):
        phrase = noun_phrase(parse)
        if phrase is None:
            break
        phrases.append(phrase)
    ends = parse.ends() or parse.words[parse.at] in ("and", "on", "in") or _is_verb_here(parse)
    if joint != "and" or not phrases or not ends:
        parse.at = start
        return
    subject = parse.relations[-1][0]
    for phrase in phrases:
        parse.relate([subject], relation, parse.add(phrase))


def verb(parse: Parse) -> bool:
    """A verb of the thing just named, with its object or alone: "holding a cup", "surrounded by trees", "sleeping"."""
    before = parse.before()
    resumes = before in ("and", ",", "while", "then")
    subjects = parse.topic or parse.subjects if resumes else parse.subjects
    direct = resumes or before in ("that", "which", "who") or before in lexicon.COPULAS
    negated = parse.accept_word(("not", "n't")) is not None
    start = parse.at
    while parse.part(parse.at) is Part.ADVERB:
        parse.at += 1
    if not subjects or parse.ended or not _is_verb_here(parse):
        return False
    token = parse.tokens[parse.at]
    of_noun = token.part is Part.PAST and parse.part(parse.at + 1) in (Part.NOUN, Part.PLURAL)
    if of_noun and before in ("and", ","):
        return False  # "a dog, blurred background"
    verb = token.word if token.part is Part.PAST else participle(token.word)
    says = [*parse.words[start : parse.at], verb]
    parse.at += 1
    while parse.part(parse.at) is Part.ADVERB or _direction(parse):
        says.append(parse.words[parse.at])
        parse.at += 1
    back = parse.at
    own = None
    if token.part is Part.PAST or parse.words[parse.at : parse.at + 1] != ["with"]:
        own = parse.accept(_OUT_OF) or parse.accept_word(_OWN_OBJECT) or (
            parse.accept_word(("in",)) if verb in lexicon.COVERED else None
        )
    place = parse.at
    phrase = noun_phrase(parse) if own or token.part is not Part.PAST else None
    if not direct:
        subjects = _actors(parse, subjects, token, transitive=phrase is not None, made=verb == "made")
    if phrase is not None and look_noun(parse, phrase, place):
        return True
    if negated:
        parse.ask(subjects, " ".join([*says, _said(parse, back)]).strip(), absent=True)
        parse.subjects = subjects
    elif phrase is None:
        if color := parse.accept_word(lexicon.COLOR_WORDS):
            says += [own, color] if own else [color]  # "dressed in black", "painted red"
        else:
            parse.at = back
        parse.ask(subjects, " ".join(says))
        parse.subjects = subjects
    elif verb == "made" and own in ("of", "from", "out of", "up of"):
        parse.ask(subjects, f"made of {phrase.group.name}")
        parse.subjects = subjects
    else:
        relation = f"{verb} {own}" if own else verb
        parse.relate(subjects, relation, parse.add(phrase))
        _also(parse, relation)
    return True


_OUT_OF = Phrases(("out of", "up of"))


def _direction(parse: Parse) -> bool:
    """ "facing left", but "walking down the street" goes on with a relation."""
    if parse.ended or parse.words[parse.at] not in lexicon.DIRECTIONS:
        return False
    if RELATIONS.at(parse.words, parse.at) not in (None, parse.words[parse.at]):
        return False
    after = parse.part(parse.at + 1)
    return after is Part.MARK or (after is Part.OTHER and parse.words[parse.at + 1] not in ("a", "an"))


def _is_verb_here(parse: Parse) -> bool:
    part, word = parse.part(parse.at), parse.words[parse.at]
    if part in _VERBS:
        return True
    # "a man rides the horse": the noun phrase before has left it
    return part in (Part.NOUN, Part.PLURAL) and parse.part(parse.at - 1) in (Part.NOUN, Part.PLURAL) and word != ""


def _actors(parse: Parse, subjects: list[int], verb: Token, *, transitive: bool, made: bool) -> list[int]:
    """Whom a verb right after a noun phrase speaks of: that noun phrase, or the one that it is a part of."""
    if _is_singular(verb) and len(parse.topic) == 1 and subjects and all(place in parse.plural for place in subjects):
        return parse.topic  # "a bird with black wings sits": wings would sit
    if len(subjects) == 1 and parse.relations:
        subject, relation, other = parse.relations[-1]
        if other == subjects[0] and relation in (_PARTS_OF if transitive else _WORN):
            return [subject]
        if other == subjects[0] and relation == "of" and made:
            return [subject]  # "a map of the city made of paper"
    return subjects


def _is_singular(verb: Token) -> bool:
    return verb.part in (Part.VERB, Part.PLURAL) and verb.word.endswith("s") and not verb.word.endswith("ss")


def predicate(parse: Parse) -> bool:
    """What is said with "is": qualities, or a noun phrase. A verb or relation after it is left to its own rule."""
    before = parse.before()
    if parse.accept_word(lexicon.COPULAS) is None:
        return False
    subjects = parse.subjects if before in ("which", "that", "who") or not parse.topic else parse.topic
    parse.subjects = subjects
    while parse.accept_word(lexicon.COPULAS):
        pass
    negated = parse.accept_word(("not", "n't")) is not None
    if not subjects:
        return True
    found = True
    while found:
        found = False
        start = parse.at
        while parse.part(parse.at) is Part.ADVERB:
            parse.at += 1
        part, word = parse.part(parse.at), "" if parse.ended else parse.words[parse.at]
        related = RELATIONS.at(parse.words, parse.at) is not None  # "is next to"
        if part is Part.ADJECTIVE and not related and parse.part(parse.at + 1) not in (Part.NOUN, Part.PLURAL):
            parse.at += 1
            _qualify(parse, subjects, " ".join([*parse.words[start : parse.at - 1], word]), negated)
            joint = parse.at
            found = bool(parse.accept_mark_or_and())
            if not found or parse.part(parse.at) not in (Part.ADJECTIVE, Part.ADVERB):
                parse.at, found = joint, False
        else:
            parse.at = start
    if negated and parse.before() in ("not", "n't"):
        if RELATIONS.at(parse.words, parse.at):
            return negated_relation(parse, subjects)
        if parse.part(parse.at) in _VERBS:
            parse.at -= 1  # left to `verb`
    return True


def negated_relation(parse: Parse, subjects: list[int]) -> bool:
    """ "is not on the table": asked as a whole, since no relation can be absent."""
    start = parse.at
    parse.accept(RELATIONS)
    if noun_phrase(parse) is None:
        return False
    parse.ask(subjects, _said(parse, start), absent=True)
    return True


ONE_OF = ("one", "another", "the")


def one_of(parse: Parse) -> bool:
    """ "two dogs, one black and one white"."""
    start = parse.at
    if len(parse.topic) != 1 or parse.accept_word(ONE_OF) is None:
        return False
    if parse.before() == "the" and parse.accept_word(("other", "others")) is None:
        return False
    parse.accept_word(lexicon.COPULAS)
    adjective = parse.at
    while parse.part(parse.at) in (Part.ADJECTIVE, Part.ADVERB):
        parse.at += 1
    ends = parse.ends() or parse.words[parse.at] in ("and", "or")
    (place,) = parse.topic
    if parse.at == adjective or not ends or place not in parse.plural:
        parse.at = start
        return False
    said = _said(parse, adjective)
    parse.questions.append(Question(about=place, says=f"Is one of the {parse.groups[place].name} {said}?"))
    return True


def does_not(parse: Parse) -> bool:
    """ "does not have leaves", "doesn't wear a hat"."""
    subjects = parse.topic or parse.subjects
    if not subjects or parse.accept_word(lexicon.AUXILIARIES) is None or parse.accept_word(("not", "n't")) is None:
        return False
    if parse.accept_word(("have", "contain", "include", "show")):
        phrase = noun_phrase(parse, after_no=True)
        if phrase is None:
            return False
        parse.groups.append(replace(phrase.group, count=None, absent=True))
        return True
    start = parse.at
    if parse.part(start) not in (*_VERBS, Part.NOUN):
        return False
    parse.at += 1
    parse.accept(RELATIONS)
    noun_phrase(parse)
    said = " ".join([participle(parse.words[start]), *parse.words[start + 1 : parse.at]])
    parse.ask(subjects, said, absent=True)
    return True


def _qualify(parse: Parse, subjects: list[int], quality: str, negated: bool) -> None:
    """Keep "is red" as the group's colour and "is small" as its size; all else is asked."""
    if quality.startswith(("very ", "all ")) and quality.partition(" ")[2] in lexicon.COLOR_WORDS:
        quality = quality.partition(" ")[2]
    for place in subjects:
        group = parse.groups[place]
        if quality in lexicon.COLOR_WORDS and not negated and group.color is None:
            parse.groups[place] = replace(group, color=lexicon.COLOR_SYNONYMS.get(quality, quality))
        elif quality in lexicon.SIZES and not negated and group.size is None:
            parse.groups[place] = replace(group, size=quality)
        else:
            parse.ask([place], quality, absent=negated)


AFTER_NOUN = ("up", "down", "out")


def after_noun(parse: Parse) -> bool:
    """Qualities right after their noun: "a door ajar", "left arm up"."""
    start = parse.at
    if not parse.subjects or parse.part(start - 1) not in (Part.NOUN, Part.PLURAL):
        return False
    while parse.part(parse.at) in (Part.ADVERB, Part.ADJECTIVE) or (
        not parse.ended and parse.words[parse.at] in AFTER_NOUN
    ):
        parse.at += 1
    words = parse.words[start : parse.at]
    if not words or parse.part(parse.at) in (Part.NOUN, Part.PLURAL, Part.VERB, Part.ING, Part.PAST, Part.QUOTE):
        return False
    if all(parse.part(place) is Part.ADVERB for place in range(start, parse.at)) and parse.relations:
        _, relation, other = parse.relations[-1]
        if [other] == parse.subjects and relation.partition(" ")[0].endswith("ing"):
            said = f"{relation} the {parse.groups[other].name} {' '.join(words)}"  # "watching a movie together"
            parse.ask([s for s, r, o in parse.relations if (r, o) == (relation, other)], said)
            return True
    _qualify(parse, parse.subjects, " ".join(words), False)
    return True


HAVING = ("has", "have", "had")


def having(parse: Parse) -> bool:
    """ "a building has a roof": as "with"."""
    if parse.accept_word(HAVING) is None or not (parse.topic or parse.subjects):
        return False
    phrase = noun_phrase(parse)
    if phrase is None:
        return False
    parse.relate(parse.topic or parse.subjects, "with", parse.add(phrase))
    _also(parse, "with")
    return True


def look_noun(parse: Parse, phrase: NounPhrase, start: int) -> bool:
    """Ask for what a picture has and is no object in it: "a cozy atmosphere"."""
    noun = phrase.group.noun
    said = phrase.group.traits or phrase.group.color
    if noun not in lexicon.LOOK_NOUNS or phrase.owner or phrase.group.count not in (None, 1) or not said:
        return False
    parse.questions.append(Question(about=None, says=f"Does the image have {_said(parse, start)}?"))
    return True
