"""The closed word list: object classes, colours, categories and question words."""

EMOJI = {
    "cat": "\U0001f431",
    "frog": "\U0001f438",
    "fish": "\U0001f41f",
    "pig": "\U0001f437",
    "penguin": "\U0001f427",
    "apple": "\U0001f34e",
    "banana": "\U0001f34c",
    "grapes": "\U0001f347",
    "pizza": "\U0001f355",
    "carrot": "\U0001f955",
    "car": "\U0001f697",
    "bus": "\U0001f68c",
    "rocket": "\U0001f680",
    "plane": "\u2708",
    "tree": "\U0001f332",
    "flower": "\U0001f33b",
    "star": "\u2b50",
    "ball": "\u26bd",
    "umbrella": "\u2602",
    "house": "\U0001f3e0",
}
GARMENTS = {"shirt": 0, "trousers": 1, "dress": 3, "bag": 8, "boot": 9}  # Fashion-MNIST labels
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    "red": (225, 45, 45),
    "green": (45, 185, 70),
    "blue": (70, 110, 245),
    "yellow": (240, 215, 45),
    "purple": (170, 70, 200),
    "white": (245, 245, 245),
}
COLOR_NAMES = tuple(COLORS)

NOUNS = (*EMOJI, *GARMENTS, *DIGITS)  # an object class is an index into this tuple
FIRST_GARMENT = len(EMOJI)
FIRST_DIGIT = FIRST_GARMENT + len(GARMENTS)
CATEGORIES = {
    "animals": ("cat", "frog", "fish", "pig", "penguin"),
    "foods": ("apple", "banana", "grapes", "pizza", "carrot"),
    "vehicles": ("car", "bus", "rocket", "plane"),
    "clothes": tuple(GARMENTS),
    "digits": DIGITS,
}
KINDS = ("what", "color", "which", "exist", "count", "rel", "read")
WHERE = "where"  # the kind of the task of places, and the one word that only it needs
PLACES = (
    *("top left", "top center", "top right"),
    *("center left", "center", "center right"),
    *("bottom left", "bottom center", "bottom right"),
)  # the cells of a 3 x 3 grid in reading order

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
_QUESTION_WORDS = (  # noqa: SIM905
    "user assistant : ? what is nearest to the top bottom left right corner center edge color "
    "which digit item there a how many are of above below next read from yes no"
).split()
WORDS = tuple(
    dict.fromkeys((PAD, BOS, EOS, UNK, IMAGE, *_QUESTION_WORDS, *COLORS, *NOUNS, *CATEGORIES))
)
KNOWN_WORDS = tuple(word for word in WORDS if word not in (PAD, BOS, EOS, UNK, IMAGE))
WORDS_OF_PLACES = (*WORDS, WHERE)  # of the model that answers where something is
WORD_ID = {word: index for index, word in enumerate(WORDS_OF_PLACES)}


def encode(text: str) -> list[int]:
    """Token ids of space-separated words; an unknown word is an error, not `<unk>`."""
    return [WORD_ID[word] for word in text.split()]
