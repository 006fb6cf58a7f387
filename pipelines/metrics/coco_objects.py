"""The 80 objects of COCO (Lin et al. 2014), the words that captions use for them, and the objects of its images.

The synonyms were collected for this module: what people call these things in captions. Words that mean several things
are left out (glass, court, mouse of an animal, plate), because a wrong mention counts against a caption.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from pipelines.metrics.chair import Vocabulary

WORDS: dict[str, str] = {  # object -> synonyms, parted by commas
    "person": "man, woman, boy, girl, child, kid, baby, toddler, infant, lady, guy, gentleman, teenager, adult, human, "
    "pedestrian, player, batter, pitcher, catcher, umpire, skier, snowboarder, surfer, skateboarder, skater, rider, "
    "cyclist, bicyclist, biker, motorcyclist, passenger, driver, officer, policeman, soldier, worker, chef, cook, "
    "waiter, waitress, student, athlete, golfer, spectator, bride, groom, couple, crowd, mother, father, family, "
    "businessman, shopper, tourist, swimmer, fisherman, farmer, firefighter, someone, grandmother, grandfather",
    "bicycle": "bike, mountain bike, tricycle",
    "car": "automobile, sedan, taxi, cab, minivan, suv, jeep, convertible, hatchback, limousine, police car",
    "motorcycle": "motorbike, motor bike, moped, motor scooter, dirt bike",
    "airplane": "plane, aeroplane, aircraft, jet, jetliner, airliner, biplane, seaplane, jumbo jet",
    "bus": "double decker, minibus, school bus, tour bus",
    "train": "locomotive, steam engine, subway, tram, trolley, railcar, streetcar",
    "truck": "lorry, pickup, semi, fire truck, firetruck, fire engine, tow truck, dump truck, garbage truck",
    "boat": "ship, sailboat, rowboat, motorboat, canoe, kayak, yacht, ferry, gondola, raft, tugboat, vessel, dinghy",
    "traffic light": "traffic signal, stop light, stoplight, street signal",
    "fire hydrant": "hydrant, fireplug",
    "stop sign": "",
    "parking meter": "",
    "bench": "park bench, pew",
    "bird": "seagull, gull, pigeon, duck, goose, geese, swan, parrot, owl, eagle, hawk, crow, sparrow, ostrich, "
    "flamingo, pelican, peacock, penguin, chick, rooster, hen, parakeet, robin, heron",
    "cat": "kitten, kitty, tabby",
    "dog": "puppy, pup, poodle, terrier, bulldog, labrador, retriever, dachshund, husky, corgi, chihuahua, beagle",
    "horse": "pony, foal, mare, stallion, colt",
    "sheep": "lamb, ram, ewe",
    "cow": "bull, calf, cattle, ox, oxen, steer, heifer",
    "elephant": "",
    "bear": "polar bear, grizzly, grizzly bear, panda, panda bear, bear cub",
    "zebra": "",
    "giraffe": "",
    "backpack": "knapsack, rucksack, book bag",
    "umbrella": "parasol",
    "handbag": "purse, tote bag, shoulder bag",
    "tie": "necktie, bow tie, bowtie",
    "suitcase": "luggage, briefcase, suit case",
    "frisbee": "flying disc, flying disk",
    "skis": "ski",
    "snowboard": "snow board",
    "sports ball": "ball, baseball, basketball, football, soccer ball, tennis ball, volleyball",
    "kite": "",
    "baseball bat": "bat",
    "baseball glove": "catcher mitt, mitt, baseball mitt",
    "skateboard": "skate board, longboard",
    "surfboard": "surf board, boogie board, paddle board",
    "tennis racket": "tennis racquet, racket, racquet",
    "bottle": "water bottle, wine bottle, beer bottle",
    "wine glass": "wineglass, champagne glass, glass of wine, champagne flute",
    "cup": "mug, teacup, coffee cup",
    "fork": "",
    "knife": "butter knife, steak knife, pocket knife",
    "spoon": "teaspoon, tablespoon, ladle",
    "bowl": "soup bowl, salad bowl",
    "banana": "plantain",
    "apple": "",
    "sandwich": "burger, hamburger, cheeseburger, sub, panini, sandwhich",
    "orange": "tangerine, clementine, mandarin",
    "broccoli": "",
    "carrot": "",
    "hot dog": "hotdog, frankfurter",
    "pizza": "",
    "donut": "doughnut, bagel",
    "cake": "cupcake, birthday cake, wedding cake, cheesecake, shortcake",
    "chair": "armchair, arm chair, stool, recliner, high chair, rocking chair, folding chair, lawn chair",
    "couch": "sofa, loveseat, love seat, settee, futon",
    "potted plant": "houseplant, house plant, flower pot, plant pot, plant in a pot",
    "bed": "bunk bed, mattress",
    "dining table": "table, kitchen table, dinner table, desk, coffee table, picnic table",
    "toilet": "urinal, commode",
    "tv": "television, tv screen, television screen, monitor, computer monitor, computer screen",
    "laptop": "laptop computer, notebook computer, macbook",
    "mouse": "computer mouse",
    "remote": "remote control, wii remote, controller, game controller, wii controller",
    "keyboard": "computer keyboard",
    "cell phone": "cellphone, phone, smartphone, smart phone, mobile phone, iphone, mobile",
    "microwave": "microwave oven",
    "oven": "stove, stove top, stovetop, range oven",
    "toaster": "toaster oven",
    "sink": "washbasin, wash basin",
    "refrigerator": "fridge, freezer",
    "book": "novel, textbook, paperback",
    "clock": "clock tower, alarm clock, wall clock, grandfather clock",
    "vase": "",
    "scissors": "pair of scissors, shears, scissor",
    "teddy bear": "teddy, stuffed bear",
    "hair drier": "hair dryer, hairdryer, blow dryer, blow drier",
    "toothbrush": "tooth brush, electric toothbrush",
}

NO_OBJECTS = (
    *("train track", "train station", "train platform", "bus stop", "bus station", "bus shelter", "bicycle rack"),
    *("bike rack", "bike lane", "bike path", "car park", "parking lot", "boat dock", "dog house", "dog bowl"),
    *("bird house", "birdcage", "bird feeder", "bird bath", "cat food", "dog food", "horse trailer", "cow bell"),
    *("bear right", "kite string", "ski lift", "ski slope", "ski pole", "ski resort", "ski boot", "ski jacket"),
    *(
        "baseball field",
        "baseball game",
        "baseball cap",
        "baseball uniform",
        "football game",
    ),
    *("soccer field", "soccer game", "tennis court", "tennis match", "basketball court", "football field"),
    *("bottle opener", "bottle cap", "cup holder", "bowl cut", "apple tree", "orange juice", "orange tree"),
    *("apple juice", "pizza box", "pizza oven", "pizza cutter", "cake stand", "bed of", "bed sheet", "truck bed"),
    *("table cloth", "tablecloth", "toilet paper", "toilet brush", "phone booth", "telephone pole", "phone number"),
    *("mouse pad", "book shelf", "bookshelf", "book case", "knife block", "fork lift", "forklift", "hot plate"),
    *("boat ramp", "umbrella stand", "bench press", "ball gown", "kitchen sink cabinet"),
    *("snow man", "snowman", "scarecrow", "man made", "man hole", "chair lift", "zebra crossing", "tie dye"),
)
"""Phrases with the name of an object in them that mean another thing. The longest phrase wins."""

COCO = Vocabulary.of(
    {name: [word.strip() for word in words.split(",")] if words else [] for name, words in WORDS.items()},
    no_objects=NO_OBJECTS,
    adjectives=("orange",),
)


def objects_of_images(instances: Mapping[str, Any]) -> dict[int, frozenset[str]]:
    """Image id -> names of its objects, from the content of an `instances_*.json` file.

    Every image of the file is among the keys, also one without an object.

    Raises:
        ValueError: if the content is not of this form, or names other objects than COCO's 80.
    """
    try:
        names = {category["id"]: category["name"] for category in instances["categories"]}
        objects: dict[int, set[str]] = defaultdict(set, {image["id"]: set() for image in instances["images"]})
        for annotation in instances["annotations"]:
            objects[annotation["image_id"]].add(names[annotation["category_id"]])
    except (KeyError, TypeError) as error:
        raise ValueError(f"must hold images, annotations and categories as COCO's files do: {error!r}") from error
    if unknown := sorted(set(names.values()) - WORDS.keys()):
        raise ValueError(f"must have COCO's 80 categories, got others: {', '.join(unknown[:3])}")
    return {image: frozenset(there) for image, there in objects.items()}


def read_instances(content: bytes) -> dict[int, frozenset[str]]:
    """`objects_of_images` of the bytes of a file.

    Raises:
        ValueError: if they are not JSON, or as `objects_of_images`.
    """
    return objects_of_images(json.loads(content))
