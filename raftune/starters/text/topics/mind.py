"""Topics: explanations, facts, learning, worries, thanks."""

from raftune.starters.text.topics.domain import CLOSERS, OPENERS, Domain

EXPLAIN = Domain(
    asks=(
        "What is {t}?",
        "Can you explain {t} to me?",
        "How does {t} work?",
        "I do not understand {t}.",
        "Please tell me about {t} in simple words.",
    ),
    said="{t}",
    openers=(*OPENERS, "That is a fine question about {r}!"),
    closers=(*CLOSERS, "I hope that makes it clear."),
    topics={
        "gravity": (
            "It is the pull that every mass has on every other mass.",
            "It keeps the planets on their paths around the sun.",
            "The heavier and nearer two things are, the stronger they attract.",
        ),
        "inflation": (
            "Prices rise over time, so the same money buys less.",
            "It often comes when people spend more than shops can supply.",
            "Banks raise interest rates to slow it down.",
        ),
        "photosynthesis": (
            "Plants turn light, water and air into sugar.",
            "Green leaves catch the sunlight and give off oxygen.",
            "It is how a plant makes its own food.",
        ),
        "electricity": (
            "Tiny charges flow through a wire like water in a pipe.",
            "A power plant pushes the current to your home.",
            "Metals carry it well and rubber blocks it.",
        ),
        "evaporation": (
            "Warm water slowly becomes vapor and rises into the air.",
            "Wet clothes dry because the water leaves as gas.",
            "The fastest drops escape first, which cools the rest.",
        ),
        "compound interest": (
            "You earn interest on the interest of earlier years.",
            "Small savings grow large if you leave them for decades.",
            "The balance grows faster each year because the gains stay in.",
        ),
        "erosion": (
            "Wind and rain carry soil away bit by bit.",
            "Rivers cut valleys over thousands of years.",
            "Roots hold the ground, so trees slow it down.",
        ),
        "democracy": (
            "The people choose their leaders by a free vote.",
            "Laws are made in parliament and courts watch over them.",
            "Everyone may speak, and the majority decides.",
        ),
    },
)

FACTS = Domain(
    asks=(
        "Tell me a fact about {t}.",
        "What is special about {t}?",
        "My son wants to know more about {t}.",
        "Why are {t} so interesting?",
        "I have to write a page about {t}.",
    ),
    said="{t}",
    openers=(*OPENERS, "I like {r} too, there is a lot to say!"),
    closers=(*CLOSERS, "Isn't that amazing?"),
    topics={
        "whales": (
            "The blue one is the largest animal that ever lived.",
            "They sing songs that travel for many miles.",
            "They breathe air and sleep with half of the brain.",
        ),
        "bees": (
            "They dance to tell each other where the flowers are.",
            "A hive makes honey from two million blossoms a jar.",
            "Only the queen lays eggs, and she lives for years.",
        ),
        "octopuses": (
            "They have three hearts and blue blood.",
            "Each arm can taste what it touches.",
            "They change color in less than a second.",
        ),
        "volcanoes": (
            "Their ash makes the soil around them rich.",
            "Melted rock rises through cracks in the crust.",
            "Most of them lie in a ring around the ocean.",
        ),
        "penguins": (
            "They cannot fly but they swim like arrows.",
            "The males keep the egg warm on their feet.",
            "They huddle together and take turns in the middle.",
        ),
        "owls": (
            "They turn the head almost all the way around.",
            "Soft feathers let them fly without a sound.",
            "They hear a mouse under deep snow.",
        ),
        "comets": (
            "They are balls of ice and dust from far out in space.",
            "Their tails always point away from the sun.",
            "The most famous one returns every seventy six years.",
        ),
        "castles": (
            "Thick walls and a deep ditch kept enemies out.",
            "The stairs turn so that the defender has more room.",
            "Most were cold, dark and full of smoke inside.",
        ),
    },
)

LEARNING = Domain(
    asks=(
        "How can I learn {t}?",
        "I want to get better at {t}.",
        "Is {t} hard to learn?",
        "Where do I start with {t}?",
        "Am I too old for {t}?",
    ),
    said="{t}",
    openers=(*OPENERS, "It is never too late to start with {r}!"),
    closers=(*CLOSERS, "Have fun with it!"),
    topics={
        "chess": (
            "Solve five small puzzles every day.",
            "Learn the simple endings before the openings.",
            "Play slow games and look for your own mistakes.",
        ),
        "guitar": (
            "Learn three chords and play along with easy songs.",
            "Fifteen minutes a day are better than one long lesson.",
            "Keep the strings in tune and your wrist relaxed.",
        ),
        "swimming": (
            "Practice floating and breathing in shallow water.",
            "Take a class with a coach who watches your kick.",
            "Swim short laps and rest at the wall.",
        ),
        "drawing": (
            "Sketch one object from your desk each evening.",
            "Look at the shapes and shadows more than at the paper.",
            "Copy a master to see how the lines were placed.",
        ),
        "Spanish": (
            "Learn ten words a day and use them in sentences.",
            "Listen to the radio and repeat what you hear.",
            "Find a partner and talk for half an hour a week.",
        ),
        "photography": (
            "Go out at sunset, when the light is soft.",
            "Fill the frame and keep the background simple.",
            "Use one lens for a month and study the results.",
        ),
        "knitting": (
            "Begin with a plain scarf in thick wool.",
            "Count the stitches at the end of every row.",
            "Choose wooden needles, because the yarn slips less.",
        ),
        "running": (
            "Run for one minute, walk for two, and repeat.",
            "Buy good shoes and rest every second day.",
            "Go slowly enough that you can still talk.",
        ),
    },
)

WORRIES = Domain(
    asks=(
        "I am worried about my {t}.",
        "How do I deal with my {t}?",
        "Do you have advice about my {t}?",
        "My {t} keeps me awake at night.",
        "I need help with my {t}.",
    ),
    said="your {t}",
    openers=(*OPENERS, "I understand, many people worry about this, and {r} can go well."),
    closers=(*CLOSERS, "You can do this!"),
    topics={
        "exam": (
            "Study in short blocks and take a break each hour.",
            "Solve old papers and mark your own mistakes.",
            "Sleep well the night before instead of reading more.",
        ),
        "job interview": (
            "Practice your answers aloud with a friend.",
            "Read about the company and bring two questions.",
            "Lay out your clothes early and arrive ten minutes ahead.",
        ),
        "noisy neighbor": (
            "Knock in the afternoon and talk about it calmly.",
            "Offer two quiet hours that suit you both.",
            "Write down the times and ask the landlord for help.",
        ),
        "first speech": (
            "Learn the opening line by heart and breathe slowly.",
            "Look at one friendly face in the room.",
            "Speak it once to the mirror and once to a friend.",
        ),
        "sore back": (
            "Take short walks and stretch every morning.",
            "Raise your screen and sit up straight.",
            "Use a warm towel, and see a doctor if the pain stays.",
        ),
        "new job": (
            "Ask questions early and write the answers down.",
            "Have lunch with one new colleague each day.",
            "Give yourself three months before you judge it.",
        ),
        "long flight": (
            "Drink water often and walk down the aisle.",
            "Wear loose clothes and bring a soft pillow.",
            "Choose an aisle seat and load a good film.",
        ),
        "house move": (
            "Label every box with its room.",
            "Pack one bag with what you need on the first night.",
            "Give away what you have not used for a year.",
        ),
    },
)

THANKS = Domain(
    asks=(
        "Thank you for the {t}.",
        "The {t} really helped me.",
        "Thanks a lot for your {t}!",
        "I was glad to have the {t}.",
    ),
    said="the {t}",
    openers=(
        "You are very welcome, I am glad you liked {r}!",
        "My pleasure!",
        "I am so happy to hear that!",
        "Thank you for your kind message.",
    ),
    closers=(*CLOSERS, "Come back any time!"),
    topics={
        "recipe": (
            "Next time you can add a little more pepper.",
            "It also tastes good on the second day.",
            "Share it with anyone who likes to cook.",
        ),
        "map": (
            "The dotted lines are paths that few people know.",
            "Keep it in your pocket for the next hike.",
            "A new edition with the bus lines comes out in spring.",
        ),
        "flowers": (
            "Cut the stems and change the water every other day.",
            "They last longer away from the sun.",
            "The white ones came from our own garden.",
        ),
        "ride home": (
            "I drive past your house each evening in any case.",
            "Just call when the last bus is gone.",
            "It was nice to have company on the road.",
        ),
        "book": (
            "The second part is even better, and I can lend it to you.",
            "Keep it as long as you want to.",
            "The same author wrote a fine novel about the sea.",
        ),
        "feedback": (
            "Your next draft will be even stronger.",
            "Show me the final version when it is done.",
            "The middle chapter was already very good.",
        ),
        "spare key": (
            "Keep it until the plumber has been here.",
            "Leave it under the blue pot when you go.",
            "It also opens the gate to the yard.",
        ),
        "kind words": (
            "They made my whole week brighter.",
            "I meant every one of them, and you earned them.",
            "I will pass them on to the rest of the group.",
        ),
    },
)
