"""The language of the order-taking task: orders, what customers say, and the words of both.

An order is one or two drinks, each with a quantity, a size and a milk, and whether it is taken
away. A customer says it in one of many ways (phrasing, order of the slots, fillers, synonyms for
the place). Every text is lower-case words separated by single spaces, so a whitespace tokenizer
over `vocabulary()` covers the task; `black` is the milk of a drink without.
"""

from __future__ import annotations

import dataclasses
import random

QUANTITIES = ("one", "two", "three", "four", "five")
SIZES = ("small", "medium", "large")
MILKS = ("oat", "soy", "almond", "whole", "black")
NO_MILK = "black"
DRINKS = ("latte", "cappuccino", "mocha", "cortado", "chai", "tea", "espresso", "cocoa")
PLACES = ("to go", "here")
SPOKEN_PLACES = {"to go": ("to go", "takeaway"), "here": ("for here", "to stay")}
PLACE_WORDS = {"go": "to go", "takeaway": "to go", "here": "here", "stay": "here"}

OPENERS = ("", "hi ,", "hello ,", "hey ,", "morning ,", "so ,")
REQUESTS = (
    "could i get",
    "can i have",
    "i would like",
    "let me get",
    "give me",
    "i want",
    "we need",
    "",
)
FILLERS = ("um", "uh", "well")
CONNECTORS = ("and", "plus", "then")
CUSTOMER, ASSISTANT = "customer :", "assistant :"
MAX_PROMPT_WORDS = 28
SINGLE_ITEM_SHARE = 0.75


@dataclasses.dataclass(frozen=True, order=True)
class Item:
    """One drink of an order."""

    quantity: str
    size: str
    drink: str
    milk: str


@dataclasses.dataclass(frozen=True)
class Order:
    """What a customer orders, and where it is drunk."""

    items: tuple[Item, ...]
    place: str

    @property
    def content(self) -> str:
        """The order's text with its items sorted: equal for two orders of the same things."""
        return answer(Order(tuple(sorted(self.items)), self.place))


def call(item: Item) -> str:
    """The structured call that adds one item."""
    return f"add {item.quantity} {item.size} {item.drink} {item.milk}"


def answer(order: Order) -> str:
    """The right response to an order, for example `add two large latte oat ; to go`."""
    return " ; ".join([*map(call, order.items), order.place])


def sample_item(rng: random.Random, drink: str) -> Item:
    """Draws quantity, size and milk of a drink."""
    return Item(rng.choice(QUANTITIES), rng.choice(SIZES), drink, rng.choice(MILKS))


def sample_order(rng: random.Random) -> Order:
    """One or two items of different drinks, and a place."""
    count = 1 if rng.random() < SINGLE_ITEM_SHARE else 2
    drinks = rng.sample(DRINKS, count)
    return Order(tuple(sample_item(rng, drink) for drink in drinks), rng.choice(PLACES))


def spoken_item(rng: random.Random, item: Item) -> str:
    """One item as a customer may say it, at most 8 words."""
    cups = "cup" if item.quantity == "one" else "cups"
    if item.milk == NO_MILK or rng.random() < 0.5:
        return f"{item.quantity} {item.size} {cups} of {item.milk} {item.drink}"
    return f"{item.quantity} {item.size} {cups} of {item.drink} with {item.milk} milk"


def spoken_order(rng: random.Random, order: Order) -> str:
    """The prompt: what the customer says, then the cue for the assistant. At most 28 words."""
    place = rng.choice(SPOKEN_PLACES[order.place])
    opener, request = rng.choice(OPENERS), rng.choice(REQUESTS)
    items = f" {rng.choice(CONNECTORS)} ".join(spoken_item(rng, item) for item in order.items)
    filler = rng.choice(FILLERS) if rng.random() < 0.3 else ""
    please = "please" if rng.random() < 0.5 else ""
    if rng.random() < 0.3:
        parts = [opener, place, ",", request, filler, items, please]
    else:
        comma = "," if rng.random() < 0.5 else ""
        parts = [opener, request, filler, items, comma, place, please]
    text = f"{CUSTOMER} {' '.join(parts)} {ASSISTANT}"
    if len(text.split()) > MAX_PROMPT_WORDS:
        text = f"{CUSTOMER} {request} {items} {place} {ASSISTANT}"
    return " ".join(text.split())


def parse_item(words: list[str]) -> Item | None:
    """The item that a stretch of a request asks for, None when a slot is not said."""
    said = [
        next((word for word in words if word in options), None)
        for options in (QUANTITIES, SIZES, DRINKS, MILKS)
    ]
    return None if None in said else Item(*said)


def parse_request(prompt: str) -> Order | None:
    """The order a prompt asks for; None when the text is not a request of this language."""
    words = prompt.split()
    stretches: list[list[str]] = [[]]
    for word in words:
        if word in CONNECTORS:
            stretches.append([])
        else:
            stretches[-1].append(word)
    items = tuple(item for item in map(parse_item, stretches) if item is not None)
    places = [PLACE_WORDS[word] for word in words if word in PLACE_WORDS]
    return Order(items, places[0]) if items and places else None


MISTAKES = ("one mistake", "two mistakes", "many mistakes")
REACTION_WORDS = (
    "thanks", "that", "is", "right", "wrong", "missing", "extra", "number", "size", "milk", "drink",
    "place", "garbled", *(word for phrase in MISTAKES for word in phrase.split()),
)  # fmt: skip
# The assistant's turn ends as its responses do, with the eos token of the tokenizers made here (and
# of the Llama family's): a base then knows it, and what follows it: how the turn was received.
END_OF_TURN = "</s>"


def vocabulary() -> list[str]:
    """The sorted closed list of words that prompts, responses and reactions are made of."""
    phrases = [*OPENERS, *REQUESTS, *FILLERS, *CONNECTORS, CUSTOMER, ASSISTANT, *PLACES]
    phrases += [spoken for options in SPOKEN_PLACES.values() for spoken in options]
    words = {word for phrase in phrases for word in phrase.split()}
    words |= {*QUANTITIES, *SIZES, *MILKS, *DRINKS, *REACTION_WORDS}
    words |= {",", ";", ":", "add", "cup", "cups", "of", "with", "milk", "please"}
    return sorted(words)
