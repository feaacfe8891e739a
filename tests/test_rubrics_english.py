"""The grammar on English of many kinds: what it finds, and that what it does not find is said."""

import pytest

from rlhf_img.rubrics import decompose
from rlhf_img.rubrics.scoring import describe


def facts(prompt):
    return [
        describe(r) + (f" [{', '.join(r.permits)}]" if r.permits else "") for r in decompose(prompt).rubric.requirements
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # number and its agreement
        ("a photo of two bus stops", "bus stop | exactly 2 bus stop"),
        ("a photo of three sports balls", "sports ball | exactly 3 sports ball"),
        ("a photo of three cacti", "cactus | exactly 3 cactus"),
        ("a photo of seven dominoes", "domino | exactly 7 domino"),
        ("a photo of two pairs of scissors", "scissors | exactly 2 scissors"),
        ("a photo of a pair of shoes", "shoe | exactly 2 shoe"),
        (
            "There are exactly six red balloons floating above a small wooden house",
            "balloon | exactly 6 balloon | balloon is red | house | exactly 1 house | house is small | "
            "Is the house made of wood? (yes) | balloon above house | Are the balloons floating? (yes)",
        ),
        (
            "no more than three ducks in the pond",
            "duck | pond | duck in pond | Are there no more than three ducks? (yes)",
        ),
        (
            "at least five books on a shelf",
            "book | shelf | exactly 1 shelf | book on shelf | Are there at least five books? (yes)",
        ),
        ("1,000 lanterns in the sky", "lantern | exactly 1000 lantern | Are the lanterns in the sky? (yes)"),
        # nouns, compounds and names
        (
            "a photo of a cherry left of a lime",
            "cherry | exactly 1 cherry | lime | exactly 1 lime | cherry left of lime",
        ),
        ("two-headed dragon breathing fire", "dragon | Is the dragon two-headed? (yes) | fire | dragon breathing fire"),
        (
            "a robot painting a picture of a sunset",
            "robot | exactly 1 robot | picture | exactly 1 picture | sunset | exactly 1 sunset | "
            "robot painting picture | picture of sunset",
        ),
        (
            "a crowd watches while two women are fishing",
            "crowd | exactly 1 crowd | woman | exactly 2 woman | Is the crowd watching? (yes) | "
            "Are the women fishing? (yes)",
        ),
        (
            "the Statue of Liberty next to the Washington Monument",
            "statue of liberty | washington monument | statue of liberty next to washington monument",
        ),
        (
            "a statue of the god Anubis wearing goggles",
            "statue | exactly 1 statue | god anubis | goggles | statue of god anubis | god anubis wearing goggles",
        ),
        ("a pentagonal warning sign", "warning sign | exactly 1 warning sign | Is the warning sign pentagonal? (yes)"),
        (
            "a still lake beside a fox made of autumn leaves",
            "lake | exactly 1 lake | Is the lake still? (yes) | fox | exactly 1 fox | lake next to fox | "
            "Is the fox made of autumn leaves? (yes)",
        ),
        # qualities
        (
            "a red, white and blue flag",
            "flag | exactly 1 flag | Is the flag partly red? (yes) | Is the flag partly white? (yes) | "
            "Is the flag partly blue? (yes)",
        ),
        (
            "two dogs, one black and one white",
            "dog | exactly 2 dog | Is one of the dogs black? (yes) | Is one of the dogs white? (yes)",
        ),
        (
            "three bottles: one green and one clear",
            "bottle | exactly 3 bottle | Is one of the bottles green? (yes) | Is one of the bottles clear? (yes)",
        ),
        (
            "The square blue box was next to the round red ball",
            "box | box is blue | Is the box square? (yes) | ball | ball is red | Is the ball round? (yes) | "
            "box next to ball",
        ),
        (
            "a bald man with a mustache wearing glasses",
            "man | exactly 1 man | Is the man bald? (yes) | mustache | exactly 1 mustache | glasses | "
            "man with mustache | man wearing glasses",
        ),
        # whom a clause speaks of
        (
            "The black chair was on the left of the white table, and the red book was on the table.",
            "chair | chair is black | table | table is white | book | book is red | chair left of table | "
            "book on table",
        ),
        (
            "the red flowers were on top of the white table and in front of the blue vase",
            "flower | flower is red | table | table is white | vase | vase is blue | flower above table | "
            "flower in front of vase",
        ),
        (
            "a cup of coffee to the right of an open laptop",
            "cup | exactly 1 cup | coffee | laptop | exactly 1 laptop | Is the laptop open? (yes) | "
            "cup of coffee | cup right of laptop",
        ),
        (
            "an owl with glowing yellow eyes sitting on a dead branch",
            "owl | exactly 1 owl | eye | eye is yellow | Are the eyes glowing? (yes) | branch | "
            "exactly 1 branch | Is the branch dead? (yes) | owl with eye | owl on branch | "
            "Is the owl sitting? (yes)",
        ),
        (
            "A small bird with a yellow beak and black wings sits on a branch",
            "bird | exactly 1 bird | bird is small | beak | exactly 1 beak | beak is yellow | wing | "
            "wing is black | branch | exactly 1 branch | bird with beak | bird with wing | bird on branch | "
            "Is the bird sitting? (yes)",
        ),
        (
            "A man wearing a cowboy hat and sunglasses rides a brown horse",
            "man | exactly 1 man | cowboy hat | exactly 1 cowboy hat | sunglasses | horse | exactly 1 horse | "
            "horse is brown | man wearing cowboy hat | man wearing sunglasses | man riding horse",
        ),
        (
            "A person is walking on the beach with their dog.",
            "person | exactly 1 person | beach | dog | person on beach | person with dog | "
            "Is the person walking? (yes)",
        ),
        (
            "a couple holding hands while walking down a cobblestone street",
            "couple | exactly 1 couple | hand | cobblestone street | exactly 1 cobblestone street | "
            "couple holding hand | couple down cobblestone street | Is the couple walking? (yes)",
        ),
        (
            "a truck with a man leaning on it",
            "truck | exactly 1 truck | man | exactly 1 man | truck with man | man on truck | Is the man leaning? (yes)",
        ),
        (
            "a spoon to the left of a bowl, and a fork to the right of it",
            "spoon | exactly 1 spoon | bowl | exactly 1 bowl | fork | exactly 1 fork | spoon left of bowl | "
            "fork right of bowl",
        ),
        (
            "Two friends are watching a movie together.",
            "friend | exactly 2 friend | movie | exactly 1 movie | friend watching movie | "
            "Are the friends watching the movie together? (yes)",
        ),
        (
            "a map of the United States made out of sushi",
            "map | exactly 1 map | united states | map of united states | Is the map made of sushi? (yes)",
        ),
        (
            "A plate of spaghetti, topped with cheese.",
            "plate | exactly 1 plate | spaghetti | cheese | plate of spaghetti | plate topped with cheese",
        ),
        ("the moon, below it a boat", "moon | boat | exactly 1 boat | boat below moon"),
        ("the cat sat on the mat", "cat | mat | cat on mat | Is the cat sitting? (yes)"),
        ("a horse that is facing left", "horse | exactly 1 horse | Is the horse facing left? (yes)"),
        (
            "an espresso machine that makes coffee",
            "espresso machine | exactly 1 espresso machine | coffee | espresso machine making coffee",
        ),
        # what must not be there
        ("a beach without umbrellas, boats, or people", "beach | exactly 1 beach | no umbrella | no boat | no person"),
        ("no people, film grain", "no person | film grain [grain, noise]"),
        ("a dog that is not wearing a collar", "dog | exactly 1 dog | Is the dog wearing a collar? (no)"),
        ("the cat is not on the mat", "cat | Is the cat on the mat? (no)"),
        ("a tree that has no leaves", "tree | exactly 1 tree | no leaf"),
        ("a bowl of apples but not bananas", "bowl | exactly 1 bowl | apple | no banana | bowl of apple"),
        ("nobody in the park", "no person | park"),
        ("a pizza that doesn't have any cheese", "pizza | exactly 1 pizza | no cheese"),
        ("a house with neither doors nor windows", "house | exactly 1 house | no door | no window"),
        (
            "a bicycle without wheels leaning on a wall",
            "bicycle | exactly 1 bicycle | no wheel | wall | exactly 1 wall | bicycle on wall | "
            "Is the bicycle leaning? (yes)",
        ),
        # text
        (
            'two signs, one says "LEFT" and the other says "RIGHT"',
            'sign | exactly 2 sign | sign reads "LEFT" | sign reads "RIGHT"',
        ),
        (
            "a storefront with 'Hello World' written on it",
            'storefront | exactly 1 storefront | storefront reads "Hello World"',
        ),
        (
            "A vintage poster titled 'Don't Panic' in bold letters",
            'poster | exactly 1 poster | Is the poster vintage? (yes) | poster reads "Don\'t Panic" | '
            "Is the text in bold letters? (yes)",
        ),
        ("the letter A", 'text reads "A"'),
        # looks
        (
            "portrait of a woman, black and white, out of focus background",
            "woman | exactly 1 woman | background | Is the background out of focus? (yes) [blur] | portrait | "
            "black and white",
        ),
        (
            "35mm film photo of a jazz musician, noise",
            "jazz musician | exactly 1 jazz musician | 35mm film [grain, noise] | film grain [grain, noise]",
        ),
        ("a low poly render of a fox", "fox | exactly 1 fox | low poly"),
        ("a street, cinematic lighting", "street | exactly 1 street | Does the image have cinematic lighting? (yes)"),
        (
            "vintage polaroid photo of a beach",
            "beach | exactly 1 beach | vintage polaroid photo [grain, noise, blur, vignette]",
        ),
        ("motion-blurred cyclist", "cyclist | Is the cyclist motion-blurred? (yes) [blur]"),
    ],
)
def test_english(prompt, expected):
    assert facts(prompt) == expected.split(" | ")
    assert decompose(prompt).uncovered == ()


@pytest.mark.parametrize(
    ("prompt", "uncovered"),
    [
        ("a book about a car", ("about",)),
        ("a table with nothing on it", ("nothing", "on it")),
        ("there are no clouds in the sky", ("in the sky",)),  # the sky that has no cloud is no thing of its own
        ("a cat, masterpiece, 8k", ("masterpiece", "8k")),
    ],
)
def test_what_is_left_is_said(prompt, uncovered):
    assert decompose(prompt).uncovered == uncovered


def test_shapes_by_two_words_are_told_apart_and_a_box_stays_a_box():
    assert facts("a box") == ["box", "exactly 1 box"]
    assert "red square above blue box" in facts("a red square above a blue box")
