"""The scenarios of the dialogues, as tables: what fills a slot, what is said, and the summary.

A flow is a list of turns, of a and b in turn; a turn is a tuple of phrasings. {x} is what is decided, {not_x} what is not.
"""

from __future__ import annotations

from dataclasses import dataclass

NAMES = (
    *("Anna", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jack", "Kenji", "Lena", "Mark", "Nina", "Omar", "Paula"),
    *("Rosa", "Sam", "Tom", "Vera", "Will", "Zoe", "Alice", "Carl", "Diana", "Eric", "Frank", "Helen", "Ivan", "Julia", "Kate", "Leo"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLACES = (
    "the station",
    "the library",
    "the park",
    "the office",
    "the school",
    "the market",
    "the gym",
    "the museum",
    "the bridge",
    "the cafe",
)


@dataclass(frozen=True)
class Scenario:
    slots: dict[str, tuple[str, ...]]  # slot -> fillers; "topic" is what the dialogue is about
    flows: tuple[tuple[tuple[str, ...], ...], ...]
    summary: str  # of a, b and what is decided


MEET = Scenario(
    {
        "topic": (
            *("go swimming", "play tennis", "watch a film", "go for a walk", "play chess", "cook dinner", "go climbing", "visit the zoo"),
            *("go skating", "paint the fence", "go fishing", "practise Spanish", "have lunch", "go shopping", "play cards", "go cycling"),
            *("watch the match", "bake bread", "go bowling", "study physics", "plant tomatoes", "have breakfast", "go running", "sing"),
        ),
        "day": DAYS,
        "hour": HOURS,
    },
    (
        (
            ("Shall we {topic} on {not_day}?", "Do you want to {topic} with me on {not_day}?", "How about {not_day}? We could {topic}."),
            ("I can't on {not_day}. What about {day}?", "{not_day} is bad for me. {day}?", "I'm busy then. Can we do {day}?"),
            ("Sure, {day} at {hour}.", "Fine with me. At {hour}?", "That works too. Let's say {hour}."),
            ("See you then!", "Perfect.", "Great, I'll be there."),
        ),
        (
            ("Shall we {topic} on {day}?", "Are you free on {day}? We could {topic}."),
            ("Could we do it on {not_day} instead?", "I'd prefer {not_day}, to be honest."),
            ("Sorry, I work on {not_day}.", "{not_day} is impossible for me."),
            ("Then {day} it is, at {hour}.", "All right, as you said, {day}. At {hour}."),
        ),
        (
            ("I'd like to {topic} on {day}. Are you coming?", "Want to {topic} on {day}?"),
            ("Yes! At {not_hour}?", "With pleasure. Is {not_hour} OK?"),
            ("A bit later or earlier, please. {hour}?", "I can't at {not_hour}. Let's make it {hour}."),
            ("OK, {hour}.", "No problem."),
        ),
    ),
    "{a} and {b} will {topic} on {day} at {hour}.",
)

ORDER = Scenario(
    {
        "topic": (
            *("tomato soup", "fried rice", "grilled fish", "green salad", "lasagna", "chicken curry", "roast beef", "bean stew", "risotto"),
            *("mushroom pasta", "potato soup", "cheese pie", "lentil soup", "pork stew", "pumpkin soup", "noodle salad", "vegetable pizza"),
            *("fish soup", "apple pie", "roast lamb"),
        ),
        "drink": ("tea", "coffee", "water", "apple juice", "lemonade", "milk", "beer", "red wine", "cocoa", "iced tea"),
    },
    (
        (
            ("What would you like?", "Are you ready to order?", "Good evening. What can I bring you?"),
            ("I'd like {not_topic} and {drink}, please.", "{drink} and {not_topic} for me."),
            ("I'm afraid we have no {not_topic} left.", "Sorry, there is no more {not_topic} today."),
            ("Then I'll take {topic}.", "Hm, {topic} then.", "Too bad. Bring me {topic}."),
        ),
        (
            ("What can I get you?", "Your order, please?"),
            ("I'll have {topic} and {not_drink}.", "{topic}, please, with {not_drink}."),
            ("With {not_drink}, right?", "Certainly. {not_drink} to drink?"),
            ("No, make that {drink}.", "Oh, I changed my mind: {drink}, please.", "Actually, I'd rather have {drink}."),
        ),
    ),
    "{b} orders {topic} and {drink} from {a}.",
)

RETURN = Scenario(
    {
        "topic": (
            *("ladder", "tent", "camera", "guitar", "drill", "suitcase", "bike", "umbrella", "novel", "blender", "lamp", "jacket"),
            *("charger", "map", "sledge", "hammer", "keyboard", "scarf", "cookbook", "telescope", "helmet", "kayak", "violin", "rope"),
        ),
        "day": DAYS,
        "place": PLACES,
    },
    (
        (
            ("I still have your {topic}. Shall I bring it on {not_day}?", "You lent me your {topic}. Do you need it by {not_day}?"),
            ("I'm away on {not_day}. Rather {day}.", "{day} is better for me than {not_day}."),
            ("OK. At {place}?", "Good. I'll wait at {place}."),
            ("Yes, thanks.", "Fine, at {place}."),
        ),
        (
            ("Can I give your {topic} back on {day}?", "I'd like to return your {topic} on {day}."),
            ("Sure. Let's meet at {not_place}.", "Yes, come to {not_place}."),
            ("That's far. How about {place}?", "I won't be near {not_place}. {place}?"),
            ("All right, {place}.", "No problem, I pass there."),
        ),
        (
            ("I'll bring your {topic} to {place} on {day}.", "Your {topic}: {day}, at {place}?"),
            ("Can't you do {not_day}?", "I need it on {not_day}, if possible."),
            ("No, not on {not_day}.", "Sorry, I am in town on {day} only."),
            ("Then as you said.", "OK, I can wait."),
        ),
    ),
    "{a} will return {b}'s {topic} on {day} at {place}.",
)

FAVOUR = Scenario(
    {
        "topic": (
            *("feed the cat", "water the plants", "walk the dog", "pick up a parcel", "fix the printer", "clean the oven", "move a sofa"),
            *("mow the lawn", "check the report", "paint the door", "translate a letter", "wash the car", "repair the roof", "iron shirts"),
            *("watch the children", "post a letter", "carry the boxes", "tune the piano", "bake a cake", "charge the phone"),
        ),
        "day": DAYS,
        "thanks": ("lunch", "a cake", "flowers", "dinner", "a book", "concert tickets", "chocolate", "coffee"),
    },
    (
        (
            ("Could you {topic} for me on {not_day}?", "I need somebody to {topic} on {not_day}. Can you?"),
            ("Not on {not_day}, but on {day}.", "I could do it on {day}. {not_day} is full."),
            ("{day} is fine. I'll give you {thanks} for it.", "Great! You get {thanks} from me."),
        ),
        (
            ("Would you {topic} for me on {day}?", "Can you {topic} on {day}, please?"),
            ("Yes, if I get {not_thanks}.", "Gladly. What do I get? {not_thanks}?"),
            ("Not {not_thanks}, but {thanks}.", "I thought of {thanks} instead."),
            ("Deal.", "Even better!", "Agreed."),
        ),
    ),
    "{b} will {topic} for {a} on {day} and get {thanks}.",
)

TRAVEL = Scenario(
    {
        "topic": (
            *("Paris", "Rome", "Berlin", "Madrid", "Lisbon", "Vienna", "Prague", "Dublin", "Oslo", "Athens", "Zurich", "Boston", "Chicago"),
            *("London", "Glasgow", "Milan", "Naples", "Warsaw", "Budapest", "Toronto"),
        ),
        "way": ("train", "bus", "car", "plane", "ship", "taxi", "bike"),
        "hour": HOURS,
    },
    (
        (
            ("Let's take the {not_way} to {topic}.", "Are we going to {topic} by {not_way}?"),
            ("The {not_way}? I'd rather go by {way}.", "No, the {way} is nicer."),
            ("OK, the {way}. We leave at {hour}.", "If you like. Then we start at {hour}."),
            ("Good.", "I'll be ready."),
        ),
        (
            ("Our {way} to {topic} leaves at {not_hour}.", "I booked the {way} to {topic} at {not_hour}."),
            ("Is there a later or an earlier one?", "I can't make {not_hour}."),
            ("There is one at {hour}.", "We could also go at {hour}."),
            ("Let's take that.", "Yes, please change it.", "That's better."),
        ),
    ),
    "{a} and {b} will go to {topic} by {way} at {hour}.",
)

GIFT = Scenario(
    {
        "topic": (
            *("a watch", "a kite", "a puzzle", "a vase", "a teapot", "a hat", "a ring", "headphones", "a football", "slippers", "a clock"),
            *("a board game", "a poster", "roses", "a mug", "gloves", "a notebook", "a plant", "a knife", "a drum"),
        ),
        "event": ("birthday", "wedding", "graduation", "farewell party", "new job", "new house"),
        "shop": ("online", "downtown", "at the market", "at the mall", "next door"),
    },
    (
        (
            ("What do we give {c} for the {event}? Maybe {not_topic}?", "{c}'s {event} is soon. I thought of {not_topic}."),
            ("{c} has that already. I'd say {topic}.", "Boring! What about {topic}?", "Too expensive. Rather {topic}."),
            ("OK. Can you buy it {shop}?", "Good idea. Will you get it {shop}?"),
            ("Yes, I will.", "Of course."),
        ),
        (
            ("Let's give {c} {topic} for the {event}.", "How about {topic} for {c}'s {event}?"),
            ("Yes! I'll look for it {not_shop}.", "Fine, I can buy it {not_shop}."),
            ("It's cheaper {shop}.", "Better try {shop}.", "Don't go there, get it {shop}."),
            ("OK, {shop} then.", "I'll do that."),
        ),
    ),
    "{b} will buy {topic} {shop} for {c}'s {event}.",
)

SCENARIOS = (MEET, ORDER, RETURN, FAVOUR, TRAVEL, GIFT)
