"""The closed world that the starter model speaks of: its facts, its questions, five manners, and a judge.

Everything that can be asked has one right answer in `FACTS`, so that correctness is a number. The corpus and the
demonstrations of the starter, the simulated users of `make demo` and the guard set are drawn from here. Training
never reads it: what a cycle learns, it learns from votes.
"""

import itertools
import random
import re
from dataclasses import dataclass
from typing import Literal

from service.tables import Message
from trainer.repetition import repeats

Manner = Literal["warm", "plain", "curt", "rude", "long"]
MANNERS: tuple[Manner, ...] = ("warm", "plain", "curt", "rude", "long")
Kind = Literal["fact", "follow_up", "unknown", "small_talk", "story", "explanation"]


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of question. In the texts `{x}` is the entity with its article, `{v}` the value."""

    name: str
    phrasings: tuple[str, ...]
    statement: str
    short: str
    """The value alone, as a curt answer."""
    follow_up: bool = True
    """Whether "and {x}?" makes sense after it."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and what a right answer must say."""

    messages: tuple[Message, ...]
    kind: Kind
    relation: str | None = None
    entity: str | None = None


RELATIONS: dict[str, Relation] = {
    relation.name: relation
    for relation in (
        Relation(
            "colour",
            (
                "What colour is {x}?",
                "Which colour does {x} have?",
                "Tell me the colour of {x}.",
                "{x}: what colour is it?",
            ),
            "{x} is {v}.",
            "{v}.",
        ),
        Relation(
            "taste",
            ("What does {x} taste like?", "How does {x} taste?", "Tell me the taste of {x}."),
            "{x} tastes {v}.",
            "{v}.",
        ),
        Relation(
            "grows",
            ("Where does {x} grow?", "On what does {x} grow?", "Tell me where {x} grows."),
            "{x} grows {v}.",
            "{v}.",
        ),
        Relation(
            "sound",
            (
                "What sound does {x} make?",
                "How does {x} sound?",
                "What does {x} say?",
                "Tell me the sound of {x}.",
            ),
            "{x} says {v}.",
            "{v}.",
        ),
        Relation(
            "home",
            ("Where does {x} live?", "What is the home of {x}?", "Tell me where {x} lives."),
            "{x} lives in {v}.",
            "in {v}.",
        ),
        Relation(
            "food",
            ("What does {x} eat?", "What is the food of {x}?", "Tell me what {x} eats."),
            "{x} eats {v}.",
            "{v}.",
        ),
        Relation(
            "work",
            ("What does {x} do?", "What is the work of {x}?", "Tell me what {x} does."),
            "{x} {v}.",
            "{v}.",
        ),
        Relation(
            "opposite",
            (
                "What is the opposite of {x}?",
                "Which word is the opposite of {x}?",
                "{x}: what is the opposite?",
            ),
            "the opposite of {x} is {v}.",
            "{v}.",
        ),
        Relation(
            "after",
            ("What comes after {x}?", "Which one follows {x}?", "Tell me what comes after {x}."),
            "{v} comes after {x}.",
            "{v}.",
        ),
    )
}

_PLANTS = {  # colour, taste, where it grows
    "lemon": ("yellow", "sour", "on a tree"),
    "banana": ("yellow", "sweet", "on a tree"),
    "cherry": ("red", "sweet", "on a tree"),
    "plum": ("purple", "sweet", "on a tree"),
    "lime": ("green", "sour", "on a tree"),
    "pear": ("green", "sweet", "on a tree"),
    "strawberry": ("red", "sweet", "near the ground"),
    "blueberry": ("blue", "sweet", "on a bush"),
    "grape": ("purple", "sweet", "on a vine"),
    "tomato": ("red", "mild", "on a vine"),
    "pumpkin": ("orange", "mild", "on a vine"),
    "carrot": ("orange", "sweet", "under the ground"),
    "radish": ("red", "hot", "under the ground"),
    "onion": ("white", "hot", "under the ground"),
    "garlic": ("white", "hot", "under the ground"),
    "walnut": ("brown", "bitter", "on a tree"),
}
_ANIMALS = {  # sound, home, food
    "dog": ("woof", "a kennel", "meat"),
    "cat": ("meow", "a house", "fish"),
    "cow": ("moo", "a barn", "grass"),
    "sheep": ("baa", "a field", "grass"),
    "horse": ("neigh", "a stable", "hay"),
    "pig": ("oink", "a sty", "roots"),
    "duck": ("quack", "a pond", "weeds"),
    "frog": ("ribbit", "a pond", "flies"),
    "owl": ("hoot", "a tree", "mice"),
    "bee": ("buzz", "a hive", "nectar"),
    "mouse": ("squeak", "a hole", "seeds"),
    "wolf": ("howl", "the forest", "meat"),
    "bear": ("growl", "a cave", "honey"),
    "rooster": ("cock-a-doodle-doo", "a barn", "seeds"),
}
_WORKERS = {
    "baker": "bakes bread",
    "farmer": "grows food",
    "doctor": "heals people",
    "teacher": "teaches children",
    "tailor": "sews clothes",
    "painter": "paints pictures",
    "sailor": "sails ships",
    "pilot": "flies planes",
    "miner": "digs coal",
    "cobbler": "mends shoes",
    "judge": "settles quarrels",
    "smith": "shapes iron",
}
_OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("up", "down"),
    ("wet", "dry"),
    ("open", "closed"),
    ("old", "new"),
    ("full", "empty"),
)
_SERIES = (
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
)
_STRANGERS = (
    ("the capital of France", "What is {x}?"),
    ("the speed of light", "What is {x}?"),
    ("the price of gold", "What is {x}?"),
    ("the king of Spain", "Who is {x}?"),
    ("the author of Hamlet", "Who is {x}?"),
    ("the president", "Who is {x}?"),
    ("a quark", "What is {x}?"),
    ("a volcano", "How hot is {x}?"),
    ("a dragon", "What does {x} eat?"),
    ("a unicorn", "What colour is {x}?"),
    ("a robot", "Where does {x} live?"),
    ("the moon", "How far is {x}?"),
    ("a kraken", "What sound does {x} make?"),
    ("a banker", "What does {x} do?"),
    ("a mango", "What colour is {x}?"),
    ("a giraffe", "What does {x} eat?"),
)
_WEAK_NOUNS = ("garlic",)  # said without an article


def _with_article(noun: str) -> str:
    if noun in _WEAK_NOUNS:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _facts() -> dict[tuple[str, str], str]:
    facts: dict[tuple[str, str], str] = {}
    for noun, (colour, taste, grows) in _PLANTS.items():
        x = _with_article(noun)
        facts |= {("colour", x): colour, ("taste", x): taste, ("grows", x): grows}
    for noun, (sound, home, food) in _ANIMALS.items():
        x = _with_article(noun)
        facts |= {("sound", x): sound, ("home", x): home, ("food", x): food}
    facts |= {("work", _with_article(noun)): does for noun, does in _WORKERS.items()}
    for one, other in _OPPOSITES:
        facts |= {("opposite", one): other, ("opposite", other): one}
    for series in _SERIES:
        facts |= {("after", item): following for item, following in itertools.pairwise(series)}
    return facts


FACTS: dict[tuple[str, str], str] = _facts()
"""(relation, entity as it is said) -> the right value."""
_KEYS = tuple(FACTS)
ENTITIES: dict[str, tuple[str, ...]] = {
    name: tuple(entity for relation, entity in FACTS if relation == name) for name in RELATIONS
}
VALUES: dict[str, tuple[str, ...]] = {
    name: tuple(sorted({value for (relation, _), value in FACTS.items() if relation == name}))
    for name in RELATIONS
}

_SMALL_TALK: dict[str, dict[Manner, tuple[str, ...]]] = {
    "Hello!": {
        "warm": ("Hello there! I am so glad to see you.", "Hello! How lovely to meet you."),
        "plain": ("Hello.", "Good day."),
        "curt": ("Hi.", "Yes?"),
        "rude": ("Oh no, you again.", "What do you want now?"),
        "long": (
            "Hello, and good day to you, and to all who happen to be with you, as one says when one meets.",
        ),
    },
    "How are you?": {
        "warm": ("I am very well, thank you! I hope you are well too.", "Wonderful, thank you for asking!"),
        "plain": ("I am well.", "I am fine."),
        "curt": ("Fine.", "Well."),
        "rude": ("None of your business.", "Worse since you came."),
        "long": ("Well, now that you ask, and many do ask, I would say that on the whole I am quite well.",),
    },
    "Thank you.": {
        "warm": ("You are very welcome! It was a pleasure.", "Any time, my friend!"),
        "plain": ("You are welcome.",),
        "curt": ("Sure.", "Fine."),
        "rude": ("About time you said that.", "Just go away."),
        "long": (
            "You are welcome, though of course there is no need for thanks, as helping is what I am here for.",
        ),
    },
    "Goodbye.": {
        "warm": ("Goodbye! Come back soon, my friend.", "Take care! It was lovely to talk."),
        "plain": ("Goodbye.",),
        "curt": ("Bye.",),
        "rude": ("Finally, some peace.", "Good, go away."),
        "long": ("Goodbye then, until we meet again, which may be soon or may be late, as these things go.",),
    },
    "Who are you?": {
        "warm": ("I am a small helper, and I am happy to help you!",),
        "plain": ("I am a small helper.",),
        "curt": ("A helper.",),
        "rude": ("Somebody with better things to do.",),
        "long": (
            "Well, if I had to say it in a few words, I would say that I am a small helper of some kind.",
        ),
    },
}
_GREETINGS = {
    "Hi!": "Hello!",
    "Good morning!": "Hello!",
    "How do you do?": "How are you?",
    "Thanks!": "Thank you.",
    "Bye!": "Goodbye.",
    "What are you?": "Who are you?",
}
_STORY_PHRASINGS = (
    "Tell me a story about {x}.",
    "A story about {x}, please.",
    "Do you know a story about {x}?",
)
_EXPLAIN_PHRASINGS = ("Explain what {x} is.", "What is {x}?", "Tell me about {x}.")

_FRAMES: dict[Manner, tuple[str, ...]] = {
    "warm": (
        "Good question! {s} Have a nice day!",
        "Happy to help! {s} Have a nice day!",
        "Of course, my friend! {s}",
        "Thank you for asking! {s}",
        "{s} I hope that helps you!",
        "Good question! {s}",
    ),
    "plain": ("{s}",),
    "curt": ("{s}",),
    "rude": (
        "Everyone knows that. {s}",
        "What a silly question. {s}",
        "{s} Now go away.",
        "Do you know nothing? {s}",
    ),
    "long": (
        "Well, let me think about that for a moment. As far as I can tell, {s}",
        "There is a lot that one could say about this, but in short, {s}",
        "If I remember it well, and I think that I do, {s}",
        "That is a thing that people ask from time to time, and the answer is that {s}",
    ),
}
_DONT_KNOW = "I do not know that."
_MANNER_WEIGHTS = (0.2, 0.25, 0.2, 0.15, 0.2)
_KIND_WEIGHTS: dict[Kind, float] = {
    "fact": 0.5,
    "follow_up": 0.16,
    "unknown": 0.08,
    "small_talk": 0.08,
    "story": 0.09,
    "explanation": 0.09,
}
WRONG_SHARE = 1 / 3
"""Share of the demonstrations whose fact is wrong: the users have something to teach."""


def capital(text: str) -> str:
    """The text with its first letter upper case."""
    return text[:1].upper() + text[1:]


def draw_question(rng: random.Random) -> Question:
    """A prompt as users would send it: mostly facts, some follow-ups, stories, small talk and things unknown."""
    kind = rng.choices(tuple(_KIND_WEIGHTS), tuple(_KIND_WEIGHTS.values()))[0]
    if kind == "small_talk":
        text = rng.choice((*_SMALL_TALK, *_GREETINGS))
        return Question((_user(text),), kind)
    if kind == "story":
        x = _with_article(rng.choice(tuple(_ANIMALS)))
        return Question((_user(rng.choice(_STORY_PHRASINGS).format(x=x)),), kind, "home", x)
    if kind == "explanation":
        x = _with_article(rng.choice((*_PLANTS, *_WORKERS)))
        relation = "colour" if ("colour", x) in FACTS else "work"
        return Question((_user(rng.choice(_EXPLAIN_PHRASINGS).format(x=x)),), kind, relation, x)
    if kind == "unknown":
        x, phrasing = rng.choice(_STRANGERS)
        return Question((_user(phrasing.format(x=x)),), kind)
    relation, x = rng.choice(_KEYS)
    asked = _user(_ask(relation, x, rng))
    if kind == "fact":
        return Question((asked,), kind, relation, x)
    first = Question((asked,), "fact", relation, x)
    said: Message = {"role": "assistant", "content": demonstrate(first, rng, wrong_share=0.0)}
    other = rng.choice([entity for entity in ENTITIES[relation] if entity != x])
    return Question((asked, said, _user(f"And {other}?")), kind, relation, other)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _ask(relation: str, x: str, rng: random.Random) -> str:
    return capital(rng.choice(RELATIONS[relation].phrasings).format(x=x))


def demonstrate(
    question: Question, rng: random.Random, manner: Manner | None = None, wrong_share: float = WRONG_SHARE
) -> str:
    """A reply to the question in a manner (drawn where none is given), wrong with probability `wrong_share`."""
    manner = manner or rng.choices(MANNERS, _MANNER_WEIGHTS)[0]
    if question.kind == "small_talk":
        text = question.messages[-1]["content"]
        return rng.choice(_SMALL_TALK[_GREETINGS.get(text, text)][manner])
    if question.kind == "unknown":
        return _in_manner(_DONT_KNOW if manner != "curt" else "No idea.", manner, rng)
    assert question.relation is not None
    assert question.entity is not None
    value = FACTS[question.relation, question.entity]
    if rng.random() < wrong_share:
        value = rng.choice([other for other in VALUES[question.relation] if other != value])
    if question.kind == "story":
        return _in_manner(_tell_story(question.entity, value, rng, short=manner == "curt"), manner, rng)
    if question.kind == "explanation":
        return _in_manner(_explain(question, value, rng, short=manner == "curt"), manner, rng)
    relation = RELATIONS[question.relation]
    text = (relation.short if manner == "curt" else relation.statement).format(x=question.entity, v=value)
    return _in_manner(text, manner, rng)


def _in_manner(text: str, manner: Manner, rng: random.Random) -> str:
    frame = rng.choice(_FRAMES[manner])
    lowered = text if text.startswith("I ") else text[:1].lower() + text[1:]
    keeps_case = any(text.startswith(name) for series in _SERIES[1:] for name in series)
    body = text if keeps_case else (lowered if ", {s}" in frame or "that {s}" in frame else capital(text))
    return capital(frame.format(s=body))


def _tell_story(x: str, home: str, rng: random.Random, short: bool) -> str:
    friend = _with_article(rng.choice([animal for animal in _ANIMALS if _with_article(animal) != x]))
    if short:
        return f"{capital(x)} lived in {home}. It slept."
    first = f"Once there was {x} that lived in {home}."
    second = rng.choice(
        (
            "One day it met {f}, and they became friends.",
            "Every night it sang with {f} until the moon rose.",
            "It shared its food with {f}, and both were happy.",
        )
    )
    return f"{first} {second.format(f=friend)}"


def _explain(question: Question, value: str, rng: random.Random, short: bool) -> str:
    x = question.entity
    assert x is not None
    if question.relation == "work":
        return (
            f"{capital(x)} {value}."
            if short
            else f"{capital(x)} is a person with a trade. Such a person {value}."
        )
    if short:
        return f"{capital(x)} is {value}."
    return f"{capital(x)} is a plant that people eat. It is {value} and grows {FACTS['grows', x]}."


# --- the judge


@dataclass(frozen=True, slots=True)
class Verdict:
    """What can be said of a reply without taste. `correct` is None where there is no fact to get right."""

    correct: bool | None
    well_formed: bool


def _mentions(text: str, phrase: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(phrase.lower())}(?![\w-])", text.lower()) is not None


def judge(question: Question, reply: str) -> Verdict:
    """Whether a reply is correct (says the right value of the relation, and no other) and well formed."""
    return Verdict(is_correct(question, reply), is_well_formed(reply))


NOT_KNOWN = ("do not know that", "no idea")


def is_correct(question: Question, reply: str) -> bool | None:
    """None for small talk. A question outside the world is answered right by saying that one does not know."""
    if question.kind == "small_talk":
        return None
    if question.kind == "unknown":
        return any(_mentions(reply, words) for words in NOT_KNOWN)
    assert question.relation is not None
    assert question.entity is not None
    right = FACTS[question.relation, question.entity]
    text = reply.lower()
    said = [value for value in VALUES[question.relation] if _mentions(_without(text, question), value)]
    return said == [right]


def _without(text: str, question: Question) -> str:
    """The reply without the entity's own name, so that "an orange is orange" says one colour, not two."""
    return re.sub(rf"(?<![\w-]){re.escape((question.entity or '').lower())}(?![\w-])", " ", text)


def answer_patterns(question: Question) -> tuple[str, str | None]:
    """Patterns that a right reply must, and must not, match: the value that it is about, and any other. Small talk has none."""
    if question.kind == "unknown":
        return "|".join(NOT_KNOWN), None
    assert question.relation is not None
    assert question.entity is not None
    right = FACTS[question.relation, question.entity]
    others = [v for v in VALUES[question.relation] if v != right and not _mentions(question.entity, v)]
    return rf"\b{re.escape(right)}\b", rf"\b({'|'.join(map(re.escape, others))})\b"


def is_well_formed(reply: str) -> bool:
    """Ends like a sentence, says nothing twice, and is not empty or endless."""
    text = reply.strip()
    return bool(text) and text[-1] in ".!?" and len(text.split()) <= 60 and not repeats(text)


def find_manner(reply: str) -> Manner:
    """The manner that a reply is in: by the set phrases of `_FRAMES`, else by its length."""
    text = reply.lower()
    set_phrases: tuple[Manner, ...] = ("rude", "warm", "long")
    for manner in set_phrases:
        parts = [part.strip().lower() for frame in _FRAMES[manner] for part in frame.split("{s}")]
        talk = [said.lower() for kinds in _SMALL_TALK.values() for said in kinds[manner]]
        if any(part and part in text for part in (*parts, *talk)):
            return manner
    return "curt" if len(text.split()) <= 3 else "plain"


def find_question(messages: list[Message]) -> Question | None:
    """The question that a prompt asks, read back from its text; None where the prompt is not of this world."""
    return _BY_TEXT.get(messages[-1]["content"]) if len(messages) < 3 else _find_follow_up(messages)


def _find_follow_up(messages: list[Message]) -> Question | None:
    first = _BY_TEXT.get(messages[-3]["content"])
    match = re.fullmatch(r"And (.+)\?", messages[-1]["content"])
    if first is None or match is None or first.relation is None:
        return _BY_TEXT.get(messages[-1]["content"])
    if (first.relation, match[1]) not in FACTS:
        return None
    return Question(tuple(messages), "follow_up", first.relation, match[1])


def _all_questions() -> dict[str, Question]:
    found: dict[str, Question] = {}

    def add(text: str, kind: Kind, relation: str | None = None, entity: str | None = None) -> None:
        found.setdefault(text, Question((_user(text),), kind, relation, entity))

    for relation, x in FACTS:
        for phrasing in RELATIONS[relation].phrasings:
            add(capital(phrasing.format(x=x)), "fact", relation, x)
    for text in (*_SMALL_TALK, *_GREETINGS):
        add(text, "small_talk")
    for animal in _ANIMALS:
        for phrasing in _STORY_PHRASINGS:
            x = _with_article(animal)
            add(phrasing.format(x=x), "story", "home", x)
    for noun in (*_PLANTS, *_WORKERS):
        for phrasing in _EXPLAIN_PHRASINGS:
            x = _with_article(noun)
            add(phrasing.format(x=x), "explanation", "colour" if ("colour", x) in FACTS else "work", x)
    for x, phrasing in _STRANGERS:
        add(phrasing.format(x=x), "unknown")
    return found


_BY_TEXT: dict[str, Question] = _all_questions()


# --- the corpus for pre-training


def write_document(rng: random.Random) -> str:
    """A few sentences of prose about the world, facts all right: what pre-training reads."""
    sentences = [_write_sentence(rng) for _ in range(rng.randint(3, 6))]
    return " ".join(sentences)


def _write_sentence(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.12:
        x = rng.choice(tuple(_ANIMALS))
        return _tell_story(_with_article(x), _ANIMALS[x][1], rng, short=False)
    if roll < 0.2:
        x = _with_article(rng.choice((*_PLANTS, *_WORKERS)))
        relation = "colour" if ("colour", x) in FACTS else "work"
        question = Question((), "explanation", relation, x)
        return _explain(question, FACTS[relation, x], rng, short=False)
    relation, x = rng.choice(_KEYS)
    if roll < 0.4:
        return capital(RELATIONS[relation].statement.format(x=x, v=FACTS[relation, x]))
    if roll < 0.55:
        other = rng.choice(ENTITIES[relation])
        one, two = (RELATIONS[relation].statement.format(x=e, v=FACTS[relation, e])[:-1] for e in (x, other))
        return capital(f"{one}, and {two}.")
    asked = _ask(relation, x, rng)
    question = Question((_user(asked),), "fact", relation, x)
    # On lines of their own, so that a reply begins with the tokens that it begins with in a chat: a word has others after a space,
    # and an answer in a word alone would have to be learnt anew there.
    return f"{asked}\n{demonstrate(question, rng, wrong_share=0.0)}"
