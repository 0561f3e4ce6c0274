# SPDX-License-Identifier: Apache-2.0
"""Words for keys, needles and lists; where more are needed, syllables make new ones."""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Iterator

_ADJECTIVES = """
able amber ancient arctic ardent autumn bitter blank bold brave brief bright brisk broad bronze
calm careful cheerful chilly civil clean clever cloudy coarse cold copper crimson crisp curious
daily damp dapper daring dark dear deep dense distant dizzy double dreamy dry dusty eager early
earnest eastern elder empty even faded fair faint famous fancy fast fearless fertile final fine
firm flat fluent foggy formal frank free fresh frosty gallant gentle giant gifted glad golden
grand grave great green grey handy happy hardy harsh hasty hazy heavy hidden high hollow honest
humble hungry icy idle inner iron ivory jolly keen kind large late lazy lean level light likely
little lively local lonely loose loud loyal lucky lunar mellow mild misty modern modest mossy
narrow native neat nimble noble noisy northern novel oaken odd open orange outer pale patient
plain pleasant polite proud prudent pure purple quaint quick quiet rapid rare ready regal rich
ripe robust rosy rough round royal rural rustic sandy scarlet secret serene shady sharp shiny
short shy silent silver simple sleek slender slow small smooth snowy sober solar solemn solid
southern spare stable steady steep sterile stiff stormy stout strict sturdy subtle sunny supple
sweet swift tall tame tardy tender thin thirsty tidy timid tiny tranquil true upper urban
useful vacant vague vast velvet violet vivid warm wary western white wide wild windy wise
wooden worthy yellow young zealous
"""
_NOUNS = """
acorn actor almond anchor apple apron arrow artist aunt badge baker balloon bamboo banjo barley
barn basin basket beach beacon bean bear beaver bell bench bird biscuit blanket boat bonnet book
boot bottle bough bowl box branch bread breeze brick bridge broom brook brush bucket button
cabin cactus camel candle canoe canyon captain carpet carrot castle cave cedar cellar chair
chalk cherry chest chimney church cider city clay cliff clock cloud clover coach coal coast
coffee comet compass copper coral corn cottage cotton cousin crane creek cricket crow crown
cup curtain daisy deer desert dew diamond doctor dog door dove dragon drawer drum duck eagle
earth echo elbow elm ember engine fabric falcon farmer feather fence fern ferry fiddle field
finch fire fish flag flute fog forest forge fossil fountain fox frame friend frost fruit garden
garlic gate giant ginger glacier glass globe glove goat grain grape grass guitar hall hammer
harbor harp hat hawk hazel hearth hedge helmet hen herb heron hill hinge honey hook horn horse
house inn island ivy jacket jar jewel judge jug kettle key kite knot ladder lake lamp lantern
larch lark leaf lemon letter library lily linen lion lock log loom lute magnet manor map maple
marble market marsh mast meadow melon mill mint mirror mist moon moss moth mountain mouse mule
needle nest night nurse oak oar oasis ocean olive onion orchard otter oven owl paddle page
palace palm paper parrot path peach pear pearl pebble pen pepper piano pigeon pillow pine pipe
planet plate plow plum pocket poem pond pony poplar portrait potter prairie prince quarry queen
quill rabbit raft rain raven reed ribbon ridge ring river road robin rocket roof root rope rose
saddle sail salmon salt sand scarf school seal seed shadow sheep shell shepherd ship shirt shoe
shore shovel sister sky sled smoke snail snow soap soldier song spade sparrow spice spider
spoon spring spruce squirrel stable star statue stone stork storm stove straw stream street
student sugar summer sun swan sword table tailor tea temple tent thistle thorn thread thunder
tiger timber toad torch tower town trail train tree trumpet tulip tunnel turtle uncle valley
vase vessel village vine violin wagon walnut water wave weaver whale wheat wheel whistle willow
window wing winter wolf wood wool wren yard
"""
_VERBS = """
admire advise answer arrive ask bake bathe believe belong blink borrow bounce bow breathe bring
build burn carry carve chase choose climb collect cook count cover crawl cross dance dare
decide deliver dig dream drift drink drive earn enjoy enter escape explain fetch fill float
follow forget gather give glide greet grow guess guide hang hear help hide hope hunt invite
join jump kneel knit knock laugh lead learn lend lift listen live mend mix move obey offer order
paint part pause plant play polish pour praise print promise pull push race reach read rest
return ride rise row run sail save search sell send sew shake share shine shout show sing sit
skip sleep smile sneeze speak spell spend spin stand stay steal stir study sweep swim teach tell
think throw tie touch travel try turn visit wait wake walk wander wash watch wear whisper win
wish wonder work wrap write yawn yield
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
VERBS = tuple(_VERBS.split())
_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


def words(rng: random.Random, count: int) -> list[str]:
    """`count` different words in random order; English ones as long as they last."""
    english = sorted({*ADJECTIVES, *NOUNS, *VERBS})
    rng.shuffle(english)
    return list(itertools.islice(itertools.chain(english, _syllable_words(rng)), count))


def pair(rng: random.Random, first: str | None = None) -> str:
    """A word of two parts, such as "brisk-heron"; the first may be given."""
    return f"{first or rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def phrase(rng: random.Random) -> str:
    """Five words, such as "brisk heron and silver lamp"."""
    one, two = (f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
    return f"{one} and {two}"


def number(rng: random.Random, num_digits: int = 7) -> str:
    return str(rng.randrange(10 ** (num_digits - 1), 10**num_digits))


def identifier(rng: random.Random) -> str:
    """A random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def letters(rng: random.Random, count: int) -> str:
    """Lower-case letters, such as the coded words of RULER."""
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=count))


def _syllable_words(rng: random.Random) -> Iterator[str]:
    """Words of five syllables without an end; none of them is English or comes twice."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(5))
        if word not in seen:
            seen.add(word)
            yield word
