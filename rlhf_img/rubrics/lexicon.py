"""The words that the grammar and the checks know: numbers, sizes, colours, shapes, relations and styles."""

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 42, 40),
    "orange": (245, 130, 32),
    "yellow": (245, 215, 60),
    "green": (46, 160, 67),
    "cyan": (64, 200, 220),
    "blue": (40, 80, 210),
    "purple": (130, 50, 170),
    "pink": (245, 130, 190),
    "brown": (110, 75, 45),
    "grey": (128, 128, 128),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}
"""The basic colours (8-bit sRGB) between which a colour is named by the nearest one."""

FINE_COLORS: dict[str, tuple[int, int, int]] = {
    "crimson": (180, 20, 50),
    "maroon": (115, 15, 25),
    "gold": (225, 175, 40),
    "beige": (225, 210, 175),
    "olive": (115, 115, 30),
    "lime": (140, 220, 40),
    "teal": (15, 125, 125),
    "turquoise": (64, 220, 205),
    "navy": (15, 25, 95),
    "magenta": (220, 30, 180),
    "silver": (190, 190, 195),
}
"""Finer names: each also competes with the basic colours, save those that it shades into."""

COLOR_SYNONYMS = {"gray": "grey", "violet": "purple", "aqua": "cyan", "scarlet": "red", "golden": "gold"}
_OTHER_COLORS = """tan cream ivory burgundy lavender indigo khaki charcoal bronze copper coral emerald salmon mustard
    fuchsia lilac mauve ochre blond blonde azure cerulean sepia"""
COLOR_WORDS = frozenset((*COLORS, *FINE_COLORS, *COLOR_SYNONYMS, *_OTHER_COLORS.split()))
"""Every word that is a colour in a prompt; the checks know only those with a value above."""
SHADES = frozenset(_words("""
    dark light bright pale deep vivid neon pastel hot sky royal navy olive forest lime baby jet
"""))
"""Words that make another colour of the colour after them."""
COLORED_THINGS = frozenset(_words("orange lime olive violet bronze gold silver salmon coral"))
"""Colours that are things where no noun follows ("an orange")."""
NEUTRALS = ("white", "grey", "black")

MATERIALS = {
    **dict.fromkeys(("wood", "wooden"), "wood"),
    **dict.fromkeys(("metal", "metallic"), "metal"),
    **dict.fromkeys(("wool", "woolen", "woollen"), "wool"),
    **{word: word for word in _words("""
    glass plastic paper cardboard leather stone brick marble steel iron concrete ceramic porcelain clay silk
    cotton velvet linen denim rubber aluminum bamboo wicker granite copper brass fabric suede satin wax foam
    terracotta cork straw felt
""")},
}  # fmt: skip
"""A word before a noun -> the material that it says the thing is made of."""

SHAPE_SYNONYMS = {
    "disc": "circle",
    "disk": "circle",
    "dot": "circle",
    "box": "square",
    "plus sign": "cross",
    "plus": "cross",
}
"""Other words for the shapes of the built-in vision. In a prompt they stay what they are: a box may be of cardboard."""
NOUN_SYNONYMS = {"people": "person", "persons": "person"}

SIZES: dict[str, tuple[float, float]] = {"small": (0.0, 0.14), "medium": (0.14, 0.175), "large": (0.175, 1.0)}
"""Range of an object's nominal radius, as a fraction of the image side."""
SIZE_SYNONYMS = {
    **dict.fromkeys(("tiny", "little", "miniature"), "small"),
    **dict.fromkeys(("big", "huge", "giant", "gigantic", "enormous", "massive"), "large"),
    "medium-sized": "medium",
}
SIZE_WORDS = frozenset((*SIZES, *SIZE_SYNONYMS))

_ONE_TO_TWENTY = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty"""
_TENS = "thirty forty fifty sixty seventy eighty ninety"
NUMBERS = {
    **{word: n for n, word in enumerate(_ONE_TO_TWENTY.split(), start=1)},
    **{word: 10 * n for n, word in enumerate(_TENS.split(), start=3)},
    **dict.fromkeys(("a", "an", "another", "a single", "single", "one single"), 1),
    **dict.fromkeys(("a pair of", "pair of", "a couple of", "couple of", "both"), 2),
    **dict.fromkeys(("a trio of", "trio of"), 3),
    **dict.fromkeys(("half a dozen", "a half dozen"), 6),
    **dict.fromkeys(("a dozen", "one dozen"), 12),
    "two dozen": 24,
    "a hundred": 100,
}
QUANTITIES = frozenset((
    "several", "many", "few", "a few", "multiple", "various", "numerous", "countless",
    "some different", "several different", "many different",
    *(f"{much} of" for much in ("dozens", "hundreds", "thousands", "lots", "a lot", "plenty", "a number", "a variety")),
    *(f"{article} {word} of" for article in ("a", "the") for word in _words("""
    group bunch herd flock crowd pile stack row line swarm cluster bouquet pack heap collection array assortment
    handful set series
""")),
    *(f"{word} of" for word in _words("groups rows piles stacks crowds herds flocks")),
))  # fmt: skip
"""Amounts that are no number: "several", "a herd of"."""

EXACT = frozenset(("exactly", "precisely", "just", "only"))
"""Words before a number that leave it as it is."""
BOUNDS = ("at least", "at most", "no more than", "not more than", "no fewer than", "no less than", "more than",
          "fewer than", "less than", "up to", "about", "approximately", "roughly", "nearly", "almost")  # fmt: skip
"""Phrases before a number that make it no exact one."""
ALWAYS_PLURAL = frozenset(_words("""
    scissors clothes pants jeans shorts trousers leggings tights overalls pajamas pyjamas sunglasses eyeglasses goggles
    binoculars pliers tweezers tongs headphones earphones shears
"""))
"""Nouns without a singular; a pair of them is one thing."""
CONTAINERS = frozenset(_words("""
    cup mug glass bottle jug pitcher can jar bowl plate dish tray basket bucket barrel box crate carton bag sack vase
    pot pan piece slice loaf stick sheet wedge scoop pint tin tub cone bar bundle
"""))
"""Nouns that hold or part what follows "of": what is said after "a cup of coffee" is said of the cup."""
BODY_PARTS = frozenset(_words("""
    eye hair beard mustache moustache wing ear tail leg arm face head paw horn antler tusk trunk nose mouth fur mane
    feather tooth hand foot finger claw beak skin neck fin scale spot stripe stem petal
"""))
"""What belongs to a body: what is said after "an owl with yellow eyes" is said of the owl."""
PASTS = {
    past: verb
    for verb, past in zip(_words("""
    sit stand hold ride wear run fly eat drink swim lie hang drive throw catch grow make take give fight sleep keep
    build bend sing sell tell lead wind shine stick swing slide creep leap kneel draw blow wake break choose hide bite
    """), _words("""
    sat stood held rode wore ran flew ate drank swam lay hung drove threw caught grew made took gave fought slept kept
    built bent sang sold told led wound shone stuck swung slid crept leapt knelt drew blew woke broke chose hid bit
    """), strict=True)
}  # fmt: skip
"""Irregular past tenses of what one can see, with their verbs."""

_SIDES = {f"{lead} {side} of": f"{side} of" for side in ("left", "right") for lead in ("to the", "on the", "at the")}
RELATIONS = {
    **_SIDES,
    **{f"{lead} {side} side of": f"{side} of" for side in ("left", "right") for lead in ("to the", "on the", "at the")},
    "left of": "left of",
    "right of": "right of",
    "above": "above",
    "over": "above",
    **dict.fromkeys(("on top of", "on the top of"), "above"),
    "below": "below",
    "under": "below",
    "underneath": "below",
    "beneath": "below",
}
"""Phrase -> the relation's name, for the relations that the classical checks know."""
_OTHER_PLACES = (("on", "top"), ("on", "side"), ("at", "side"))
_PLACES = "top bottom side back front edge end base foot center centre middle corner rear"
OTHER_RELATIONS = {
    **dict.fromkeys(("next to", "beside", "by", "adjacent to", "alongside", "by the side of",
        "on the side of", "on side of", "at the side of"), "next to"),
    **dict.fromkeys(("near", "close to", "nearby"), "near"),
    **dict.fromkeys(("in front of", "at the front of"), "in front of"),
    **dict.fromkeys(("behind", "in back of", "at the back of"), "behind"),
    **dict.fromkeys(("on", "upon", "onto", "atop"), "on"),
    **dict.fromkeys(("in", "within", "in the middle of", "in the center of", "in the centre of"), "in"),
    **dict.fromkeys(("inside", "inside of"), "inside"),
    **dict.fromkeys(("around", "all around"), "around"),
    **dict.fromkeys(("toward", "towards"), "towards"),
    **dict.fromkeys(("against", "set against", "leaning against"), "against"),
    **{f"{lead} the {place} of": f"{lead} the {place} of" for lead in ("on", "at", "from")
        for place in _words(_PLACES) if (lead, place) not in _OTHER_PLACES},
    **{word: word for word in _words("""
    between among amid across along through into outside with of at from off opposite beyond past down up for
    during amid amidst like
""")},
}  # fmt: skip
"""The same for relations that only a judge can see."""
ALL_RELATIONS = {**RELATIONS, **OTHER_RELATIONS}
POSITIONS = {
    **{f"{lead} the {side}": f"on the {side}" for lead in ("on", "to", "at") for side in ("left", "right")},
    **{f"{lead} the {side} side": f"on the {side}" for lead in ("on", "to", "at") for side in ("left", "right")},
    **{f"{lead} the {end}": f"at the {end}" for lead in ("on", "at") for end in ("top", "bottom")},
    **{f"in the {place}": f"in the {place}" for place in
        _words("""
    background foreground distance center centre middle corner front back air sky
""")},
    **{word: word for word in ["in midair", "in mid-air", "outside", "indoors", "outdoors", "nearby"]},
    "in the top left": "in the top left",
    "in the top right": "in the top right",
    "in the bottom left": "in the bottom left",
    "in the bottom right": "in the bottom right",
}  # fmt: skip
"""Places in the picture: phrase -> what is asked ("Is the cat on the left?")."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """A deliberate style: the phrases that ask for it, and the artifact classes that it permits."""

    phrases: tuple[str, ...]
    permits: tuple[str, ...]


STYLES: dict[str, Style] = {
    "film grain": Style(
        phrases=(
            "35mm film grain", "film grain", "grainy film", "grainy", "grain", "noisy film", "film noise",
            "image noise", "visible noise", "noise", "noisy",
        ),
        permits=("grain", "noise"),
    ),
    "soft focus": Style(
        phrases=("soft focus", "soft-focus", "out of focus", "blurry", "blurred"),
        permits=("blur",),
    ),
    "vignette": Style(
        phrases=(
            "dark vignette corners", "dark vignette", "vignette corners", "vignette", "vignetting", "dark corners",
        ),
        permits=("vignette",),
    ),
}


_MEDIA: dict[str, tuple[str, ...]] = {
    "watercolor": ("watercolor", "watercolour", "watercolor painting", "watercolour painting"),
    "oil painting": ("oil painting", "oil on canvas"),
    "sketch": ("sketch", "pencil sketch", "pencil drawing", "charcoal drawing"),
    "hand drawn": ("hand drawn", "hand-drawn"),
    "pixel art": ("pixel art", "pixelated", "8-bit"),
    "black and white": ("black and white", "black-and-white", "monochrome"),
    "anime": ("anime", "anime style", "manga"),
    "cartoon": ("cartoon", "cartoon style", "comic book style"),
    "digital art": ("digital art", "digital painting", "digital illustration"),
    "3d render": ("3d render", "3d rendering", "octane render", "unreal engine", "cgi"),
    "photorealistic": ("photorealistic", "photo-realistic", "hyperrealistic", "hyper realistic", "ultra realistic"),
    "cinematic": ("cinematic", "cinematic style", "film still"),
    "bokeh": ("bokeh", "shallow depth of field", "depth of field"),
    "motion blur": ("motion blur", "motion-blurred", "motion blurred"),
    "long exposure": ("long exposure", "long-exposure"),
    "tilt-shift": ("tilt-shift", "tilt shift"),
    "double exposure": ("double exposure",),
    "35mm film": ("35mm film", "35mm", "analog film", "analogue film", "kodak film", "film photograph", "film photo"),
    "polaroid": ("polaroid",),
    "vhs": ("vhs",),
    "glitch": ("glitch art", "glitch"),
    "collage": ("collage",),
    "concept art": ("concept art",),
    "low poly": ("low poly", "low-poly"),
    "vector art": ("vector art", "vector illustration", "vector graphic", "flat design"),
    "line art": ("line art", "line drawing"),
    "minimalist": ("minimalist", "minimalistic", "minimalism"),
    "impressionist": ("impressionist", "impressionism"),
    "cubist": ("cubist", "cubism"),
    "surrealist": ("surrealist", "surrealism", "surreal"),
    "art deco": ("art deco",),
    "pop art": ("pop art",),
    "cyberpunk": ("cyberpunk style",),
    "macro": ("macro", "extreme close-up"),
}
_MEDIA_PERMITS: dict[str, tuple[str, ...]] = {
    "watercolor": ("watercolor", "blur"),
    "sketch": ("sketch",),
    "hand drawn": ("hand drawn",),
    "bokeh": ("blur",),
    **dict.fromkeys(("motion blur", "long exposure", "tilt-shift", "double exposure", "macro"), ("blur",)),
    "35mm film": ("grain", "noise"),
    "polaroid": ("grain", "noise", "blur", "vignette"),
    "vhs": ("grain", "noise", "blur"),
    "glitch": ("glitch",),
    "collage": ("collage",),
    "pixel art": ("grid",),
}
MEDIA: dict[str, Style] = {
    name: Style(phrases=phrases, permits=_MEDIA_PERMITS.get(name, ())) for name, phrases in _MEDIA.items()
}
"""Styles that only a judge can see."""
MEDIUM_NOUNS = frozenset(_words("""
    picture image photo photograph drawing illustration painting rendering render sketch portrait shot close-up
    closeup view artwork art depiction scene photography still snapshot mural cartoon
"""))
"""Nouns that name the picture itself where they lead a prompt ("an oil painting of") or stand alone ("digital art")."""
NEUTRAL_MEDIA = frozenset(_words("picture image photo photograph depiction scene view shot rendering"))
"""Those of them that ask for nothing by themselves."""
LOOK_NOUNS = frozenset(_words("""
    lighting light atmosphere mood vibe feel feeling ambiance ambience tone style palette color colour detail
    resolution quality composition perspective angle focus depth texture contrast aesthetic glow theme exposure
    reflection
"""))
"""Nouns of what a picture has, which is no object in it."""
TIMES = frozenset(_words("""
    night dusk dawn sunset sunrise day daytime noon midnight twilight nighttime evening morning afternoon winter
    summer autumn spring
"""))
"""Times that light a picture ("at night")."""
FRAMES = frozenset((
    "there is", "there are", "there was", "there were", "here is", "here are", "this is", "these are", "you can see",
    *(f"{start}{who} can see" for start in ("", "in this image ", "in this picture ", "in this image , ",
        "in this picture , ", "in the image ", "in the picture ", "here ") for who in ("we", "i", "you")),
    *(f"in {this} {image}" for this in ("this", "the") for image in ("image", "picture", "photo", "scene")),
    *(f"{this} {image} {shows}" for this in ("this", "the") for image in ("image", "picture", "photo", "scene")
        for shows in ("shows", "depicts", "contains", "features", "consists of", "is of")),
))  # fmt: skip
"""Phrases that only say that there is a picture."""

ATTACHED_NEGATIONS = (
    "without any", "without a", "without an", "without", "with no", "has no", "have no", "having no", "with zero",
    "with neither", "free of", "free from", "devoid of", "empty of", "lacking any", "lacking", "minus",
)  # fmt: skip
"""They say of the thing before them what it has not."""
NEGATIONS = (
    *ATTACHED_NEGATIONS, "no", "not any", "there is no", "there are no", "there is not any", "there are not any",
    "and no", "but no", "not a", "not an", "but not", "and not", "zero",
)  # fmt: skip
NOBODY = frozenset(("nobody", "no one", "no-one", "noone"))
QUALITY_WORDS = frozenset(_words("""
    2k 4k 8k 16k hd uhd fhd hdr hq artstation deviantart masterpiece wallpaper
"""))
"""Words that ask for a good picture, which no one can check."""
LETTERINGS = frozenset(_words("letters letter lettering font typeface script type handwriting calligraphy capitals"))
"""What quoted words can be in."""
COVERED = frozenset(_words("""
    covered dressed wrapped coated clad bathed drenched soaked engulfed shrouded decorated painted written drawn set
"""))
"""Participles of which "in" says with what: "covered in snow"."""
DIRECTIONS = frozenset(_words("left right up down forward forwards backward backwards away sideways straight"))
"""Where one can look or point."""
NUMERAL_NOUNS = frozenset(("number", "numbers", "digit", "digits", "letter", "letters", "numeral"))
"""Nouns after which a number or a single capital is what is written."""
BACKGROUND_LEADS = ("on", "against", "in front of", "with", "over", "set against", "set on", "isolated on")
BACKGROUND_NOUNS = ("background", "backdrop")
TEXT_NOUNS = frozenset(_words("""
    word words text letters caption title phrase message inscription slogan headline
"""))
TEXT_VERBS = frozenset((
    *(f"{that}{verb}" for verb in ("reads", "says", "states", "warns", "spells", "displays", "shows")
        for that in ("", "that ", "which ")),
    *(f"{how}{verb}" for verb in _words("""
    reading saying stating labelled labeled spelling titled entitled named called marked engraved inscribed
    printed displaying showing captioned written stamped
""")
        for how in ("", "clearly ", "prominently ", "boldly ", "is ", "are ")),
    "with", "that is labelled", "that is labeled",
))  # fmt: skip
TEXT_BEARERS = frozenset(_words("""
    sign signboard billboard poster banner label shirt t-shirt tee hoodie cap hat mug cup book cover screen
    display board chalkboard whiteboard blackboard plaque placard sticker tag card note letter page newspaper
    magazine menu logo badge patch flag door window box bottle can cake tattoo ticket package packaging
    plate bubble notification storefront awning scroll gravestone tombstone headstone jersey license envelope
    graffiti marquee certificate stamp
"""))
"""Nouns that usually bear the quoted words of their sentence."""

COPULAS = frozenset(_words("is are was were be being been 's 're"))
AUXILIARIES = frozenset(_words("""
    has have had does do did can could will would may might must should
"""))
PRONOUNS = frozenset(_words("""
    it they he she them him her itself themselves himself herself this these that those who which
"""))
DETERMINERS = frozenset(_words("""
    some the this that these those its his her their my your our each every all any
"""))
SILENT = frozenset(_words("""
    a an the and or nor but it its this that these those there their his her is are was were be being been while
    as who which of with at by to
"""))
"""Words that ask for nothing by themselves."""
SIDES = frozenset(_words("left right front back top bottom side"))
"""Words that go with the noun after them ("left arm"), though they can be other parts of speech."""
GERUND_MODIFIERS = frozenset(_words("""
    dining parking washing swimming running baking cutting vending sewing frying rocking ironing fishing hunting
    shopping cooking wedding shipping chewing knitting training mixing measuring rolling boxing racing gaming
"""))
"""Words in -ing that name what the noun after them is for; others say what it does."""
COMPOUNDS = frozenset((
    "hot dog", "potted plant", "polar bear", "grizzly bear", "wild boar", "french fries",
    "ice cream", "swiss army knife", "guinea pig", "stuffed animal", "stuffed toy", "mobile phone", "high heel",
    "high heels", "green tea", "black hole", "red panda", "golden retriever", "great dane",
    "electric guitar", "acoustic guitar", "medical mask", "solar panel", "red carpet", "fast food",
    "christmas tree", "paper clip", "paper towel", "toilet paper", "stained glass", "orange juice",
    "rubber duck", "grand piano", "soft drink",
))  # fmt: skip
"""Adjective and noun that name one kind of thing."""

NOUNS_IN_ING = frozenset(_words("""
    ring king wing string spring sling building painting ceiling earring clothing drawing awning bedding carving
    carpeting casing coating crossing cushioning decking dressing dwelling edging engraving fencing flooring footing
    framing frosting gathering grating herring housing icing landing lettering lighting lightning lining lodging meeting
    molding moulding mooring morning evening offering opening packaging padding paneling pairing plating planking
    printing pudding railing rigging roofing scaffolding seating serving setting sheathing shelving siding stocking
    stuffing thing topping tubing veining warning wiring writing sibling duckling dumpling
"""))
"""Words in -ing that are things; others say what something does."""
