"""Clauses that say something of a thing just named: relations, verbs and what follows "is" or "has"."""

from dataclasses import replace

from rlhf_img.rubrics import lexicon
from rlhf_img.rubrics.found import Parse, Question
from rlhf_img.rubrics.reading import RELATIONS, NounPhrase, noun_phrase
from rlhf_img.rubrics.words import Part, participle

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
    phrase = parse.accept(RELATIONS)
    if phrase is None:
        return False
    start = parse.at
    if parse.words[start : start + 1] == ["the"]:
        start += 1
    noun = parse.part(start) is Part.NOUN and parse.part(start + 1) not in _NOUNLIKE
    if noun and parse.words[start] in lexicon.TIMES:
        parse.at = start + 1
        parse.questions.append(Question(about=None, says=f"Is it {parse.words[start]}?"))
        return True
    start = parse.at
    other = noun_phrase(parse)
    if other is None:
        return False
    if look_noun(parse, other, start):
        return True
    relation = lexicon.ALL_RELATIONS[phrase]
    place = parse.add(other)
    after_text = parse.part(start - 2) is Part.QUOTE and parse.texts and parse.texts[-1][0] is None
    if after_text and relation in ("on", "above"):
        parse.texts[-1] = (place, parse.texts[-1][1])
    elif parse.subjects:
        parse.relate(parse.subjects, relation, place)
    elif relation != "of":
        parse.pending.append((relation, place))
    parse.subjects = [place] if parse.subjects else []
    _also(parse, relation)
    return True


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
    if joint != "and" or not phrases or not (parse.ends() or parse.words[parse.at] in ("and", "on", "in")):
        parse.at = start
        return
    subject = parse.relations[-1][0]
    for phrase in phrases:
        parse.relate([subject], relation, parse.add(phrase))


def verb(parse: Parse) -> bool:
    """A verb of the thing just named, with its object or alone: "holding a cup", "surrounded by trees", "sleeping"."""
    subjects = parse.topic or parse.subjects if parse.before() in ("and", ",") else parse.subjects
    direct = parse.before() in ("and", ",", "that", "which", "who") or parse.before() in lexicon.COPULAS
    negated = parse.accept_word(("not", "n't")) is not None
    start = parse.at
    while parse.part(parse.at) is Part.ADVERB:
        parse.at += 1
    if not subjects or parse.ended or not _is_verb_here(parse):
        return False
    token = parse.tokens[parse.at]
    of_noun = token.part is Part.PAST and parse.part(parse.at + 1) in (Part.NOUN, Part.PLURAL)
    if of_noun and parse.before() in ("and", ","):
        return False  # "a dog, blurred background"
    verb = token.word if token.part is Part.PAST else participle(token.word)
    adverbs = parse.words[start : parse.at]
    parse.at += 1
    while parse.part(parse.at) is Part.ADVERB:
        adverbs.append(parse.words[parse.at])
        parse.at += 1
    back = parse.at
    own = None
    if token.part is Part.PAST or parse.words[parse.at : parse.at + 1] != ["with"]:
        own = parse.accept_word(_OWN_OBJECT)
    place = parse.at
    phrase = noun_phrase(parse) if own or token.part is not Part.PAST else None
    if not direct:
        subjects = _actors(parse, subjects, transitive=phrase is not None)
    if phrase is not None and look_noun(parse, phrase, place):
        return True
    if phrase is None or negated:
        said = [*adverbs, verb]
        if color := parse.accept_word(lexicon.COLOR_WORDS):
            said += [own, color] if own else [color]  # "dressed in black", "painted red"
        else:
            parse.at = back
        parse.ask(subjects, " ".join(said), absent=negated)
        parse.subjects = subjects
    elif verb == "made" and own in ("of", "from"):
        parse.ask(subjects, f"made {own} {phrase.group.name}")
    else:
        relation = f"{verb} {own}" if own else verb
        parse.relate(subjects, relation, parse.add(phrase))
        _also(parse, relation)
    return True


def _is_verb_here(parse: Parse) -> bool:
    part, word = parse.part(parse.at), parse.words[parse.at]
    if part in _VERBS:
        return True
    # "a man rides the horse": the noun phrase before has left it
    return part in (Part.NOUN, Part.PLURAL) and parse.part(parse.at - 1) in (Part.NOUN, Part.PLURAL) and word != ""


def _actors(parse: Parse, subjects: list[int], *, transitive: bool) -> list[int]:
    """Whom a verb right after a noun phrase speaks of: that noun phrase, or the one that it is a part of."""
    if len(subjects) == 1 and parse.relations:
        subject, relation, other = parse.relations[-1]
        if other == subjects[0] and relation in (_PARTS_OF if transitive else _WORN):
            return [subject]
    return subjects


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
        if part is Part.ADJECTIVE and parse.part(parse.at + 1) not in (Part.NOUN, Part.PLURAL):
            parse.at += 1
            _qualify(parse, subjects, " ".join([*parse.words[start : parse.at - 1], word]), negated)
            joint = parse.at
            found = bool(parse.accept_mark_or_and())
            if not found or parse.part(parse.at) not in (Part.ADJECTIVE, Part.ADVERB):
                parse.at, found = joint, False
        else:
            parse.at = start
    if negated and _is_verb(parse):
        parse.at -= 1
    return True


def _is_verb(parse: Parse) -> bool:
    return parse.part(parse.at) in _VERBS and parse.before() in ("not", "n't")


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


def after_noun(parse: Parse) -> bool:
    """Qualities right after their noun: "a door ajar", "left arm up"."""
    start = parse.at
    if not parse.subjects or parse.part(start - 1) not in (Part.NOUN, Part.PLURAL):
        return False
    while parse.part(parse.at) in (Part.ADVERB, Part.ADJECTIVE) or (
        not parse.ended and parse.words[parse.at] in ("up", "down", "out")
    ):
        parse.at += 1
    words = parse.words[start : parse.at]
    if not words or parse.part(parse.at) in (Part.NOUN, Part.PLURAL, Part.VERB, Part.ING, Part.PAST, Part.QUOTE):
        return False
    _qualify(parse, parse.subjects, " ".join(words), False)
    return True


def having(parse: Parse) -> bool:
    """ "a building has a roof": as "with"."""
    if parse.accept_word(("has", "have", "had")) is None or not (parse.topic or parse.subjects):
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
    says = " ".join(t.text for t in parse.tokens[start : parse.at] if t.word).lower()
    parse.questions.append(Question(about=None, says=f"Does the image have {says}?"))
    return True
