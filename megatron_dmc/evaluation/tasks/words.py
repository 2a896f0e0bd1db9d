"""Words of our own, and what is made of them: keys, numbers, and sentences that say nothing."""

from __future__ import annotations

from random import Random

_ADJECTIVES = """
able amber ancient autumn bitter blue bold brass brave brief bright broad busy calm careful cheap clever cloudy
coastal cold copper crisp curious dark deep distant dry dusty early eager empty faint fancy fast fierce final firm
flat foggy fresh gentle giant golden grand gray green happy heavy hidden hollow honest humble idle inner ivory jolly
keen kind late lazy light little lively lonely long loose loud lucky marble merry mild modest narrow noble noisy odd
old open orange pale patient plain polite proud purple quick quiet rapid rare red rich rough round royal rusty
scarlet secret shallow sharp shiny short silent silver simple slow small smooth soft solid steady steep still stormy
strange strong sunny sweet swift tall tender thin tidy tiny upper vast velvet violet warm wide wild windy wise
wooden young
"""
_NOUNS = """
anchor apple arrow attic badge bakery barn basket beacon bell bench blanket boat bottle bridge broom bucket button
cabin candle canoe canyon carpet castle cellar chair chapel cherry clock cloud coach coast compass corner cottage
cradle curtain desert diary door drum engine fabric falcon farm feather fence ferry field flute forest fountain fox
garden gate glove goose granite guitar hammer harbor harvest hat helmet hill horse island jacket jar kettle kitchen
ladder lake lamp lantern leaf lemon letter library lion lock magnet map market meadow mill mirror mountain needle
nest ocean orchard otter oven owl paddle painter palace parrot path pebble pencil pepper piano pigeon pillow pine
planet plate pocket pond porch potato quarry rabbit raft rain ribbon river robin rocket roof rope saddle sail salmon
sandal school shadow shelf shell shirt shore singer sparrow spoon spring square stable station stone storm street
summer table tailor teapot temple thread tiger tower train tunnel turtle valley village violin wagon wall water
whale wheel whistle willow window winter wolf yard
"""
_VERBS = "follows passes finds leaves meets watches paints carries hears loses moves opens reaches sees"

ADJECTIVES, NOUNS, VERBS = (tuple(words.split()) for words in (_ADJECTIVES, _NOUNS, _VERBS))


def sentence(random: Random) -> str:
    """One sentence without a digit."""
    pick = random.choice
    subject, other = f"{pick(ADJECTIVES)} {pick(NOUNS)}", f"{pick(ADJECTIVES)} {pick(NOUNS)}"
    return f"The {subject} {pick(VERBS)} the {other}."


def key(random: Random) -> str:
    """Two words, as a name that is seldom drawn twice."""
    return f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"


def number(random: Random, digits: int) -> str:
    """A number of so many digits, the first not 0."""
    return str(random.randrange(10 ** (digits - 1), 10**digits))
