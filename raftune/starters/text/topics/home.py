"""Topics: cooking, repairs, parties, presents."""

from raftune.starters.text.topics.domain import CLOSERS, OPENERS, Domain

COOKING = Domain(
    asks=(
        "How do I make {t}?",
        "Can you teach me to cook {t}?",
        "I want to make {t} tonight.",
        "What is the trick to good {t}?",
        "I always fail at {t}.",
    ),
    said="{t}",
    openers=(*OPENERS, "What a tasty idea, {r} is always welcome!"),
    closers=(*CLOSERS, "Enjoy your meal!"),
    topics={
        "tomato soup": (
            "Fry an onion slowly before you add the tomatoes.",
            "Simmer the soup for half an hour and blend it.",
            "A spoon of cream at the end makes it smooth.",
        ),
        "fried rice": (
            "Use cold rice from the day before.",
            "Keep the pan very hot and stir all the time.",
            "Add the egg first and the soy sauce last.",
        ),
        "pancakes": (
            "Let the batter rest for twenty minutes.",
            "Turn them when small bubbles open on top.",
            "Mix milk, eggs and flour until no lumps are left.",
        ),
        "roast chicken": (
            "Rub it with butter and salt, then roast it for ninety minutes.",
            "Let the chicken rest before you carve it.",
            "Put half a lemon and some thyme inside.",
        ),
        "apple pie": (
            "Keep the butter cold so that the crust is crisp.",
            "Choose sour apples and add a little cinnamon.",
            "Bake it until the top is golden brown.",
        ),
        "scrambled eggs": (
            "Cook the eggs on low heat and stir gently.",
            "Take the pan away while they are still soft.",
            "Whisk in a splash of milk and a pinch of salt.",
        ),
        "garlic bread": (
            "Mix soft butter with crushed garlic and parsley.",
            "Wrap the loaf in foil and bake it for ten minutes.",
            "Open the foil at the end so that the crust turns crisp.",
        ),
        "vegetable curry": (
            "Toast the spices in oil before anything else.",
            "Add coconut milk and let the vegetables cook until tender.",
            "Serve it with rice and fresh coriander.",
        ),
    },
)

REPAIR = Domain(
    asks=(
        "My {t} is broken.",
        "How do I fix my {t}?",
        "My {t} stopped working today.",
        "Can you help me repair my {t}?",
        "What is wrong with my {t}?",
    ),
    said="your {t}",
    openers=(*OPENERS, "I am sorry that {r} is giving you trouble."),
    closers=(*CLOSERS, "I hope it works again soon."),
    topics={
        "bicycle": (
            "Clean the chain and put a drop of oil on each link.",
            "Check the tires for glass and pump them up.",
            "Tighten the brake cable with a small wrench.",
        ),
        "laptop": (
            "Hold the power button for ten seconds and start it again.",
            "Try another charger and look at the light.",
            "Save your files first and then install the updates.",
        ),
        "kitchen sink": (
            "Pour hot water with baking soda down the drain.",
            "Put a bucket under the pipe and open the trap.",
            "A rubber plunger clears most blocks in a minute.",
        ),
        "phone": (
            "Clean the charging port with a dry brush.",
            "Restart it and remove the apps you do not use.",
            "A new battery costs little and takes an hour to fit.",
        ),
        "washing machine": (
            "Empty the filter behind the small door at the bottom.",
            "Make sure that the water tap is fully open.",
            "Spread the clothes evenly and run a short cycle.",
        ),
        "toaster": (
            "Unplug it and shake out the crumbs.",
            "See whether the lever is bent and push it straight.",
            "Test the wall plug with another machine.",
        ),
        "printer": (
            "Take out the paper tray and remove any jam.",
            "Clean the ink heads from the menu and print a test page.",
            "Delete the waiting jobs and connect the cable again.",
        ),
        "radiator": (
            "Let the air out with a small key at the top.",
            "Open the valve slowly until you feel it warm up.",
            "Move the sofa away so that the heat can spread.",
        ),
    },
)

PLANNING = Domain(
    asks=(
        "Help me plan a {t}.",
        "I need ideas for a {t}.",
        "How should I prepare for a {t}?",
        "We are having a {t} next week.",
        "What do I need for a {t}?",
    ),
    said="your {t}",
    openers=(*OPENERS, "How lovely, {r} is great fun to plan!"),
    closers=(*CLOSERS, "Have a wonderful time!"),
    topics={
        "birthday party": (
            "Send the invitations early and order a cake.",
            "Hang up some balloons and choose three simple games.",
            "Ask each friend to bring one favorite song.",
        ),
        "picnic": (
            "Pack sandwiches, fruit and a big blanket.",
            "Choose a shady spot close to the water.",
            "Freeze a bottle of juice to keep the food cold.",
        ),
        "camping trip": (
            "Test the tent at home and pack warm socks.",
            "Bring a lamp, matches and plenty of water.",
            "Book the site early and check the fire rules.",
        ),
        "dinner party": (
            "Cook one dish that you can make the day before.",
            "Ask your guests what they cannot eat.",
            "Set the table early and light a few candles.",
        ),
        "garage sale": (
            "Put a clear price on every item.",
            "Hang signs at the corner and start at eight.",
            "Keep small coins ready so that you can give change.",
        ),
        "book club": (
            "Pick a short novel that everyone can borrow.",
            "Write down four questions before you meet.",
            "Meet once a month and let a new person lead each time.",
        ),
        "family reunion": (
            "Find a date that suits the oldest members first.",
            "Rent a hall with a garden for the children.",
            "Print old photos and let people tell the stories.",
        ),
        "movie night": (
            "Let everyone vote between three films.",
            "Make popcorn and dim the lights.",
            "Put pillows on the floor and turn off the phones.",
        ),
    },
)

GIFTS = Domain(
    asks=(
        "What should I give my {t}?",
        "I need a present for my {t}.",
        "My {t} has a birthday soon.",
        "What would my {t} like?",
        "I want to surprise my {t}.",
    ),
    said="your {t}",
    openers=(*OPENERS, "How kind of you to think of {r}!"),
    closers=(*CLOSERS, "It will surely be a happy day."),
    topics={
        "sister": (
            "A silver necklace with her first letter is a sweet idea.",
            "Take her to a concert of a band that she loves.",
            "Make an album with pictures of the two of you.",
        ),
        "father": (
            "A good tool for his workshop is always useful.",
            "Cook his favorite dinner and watch the game with him.",
            "Frame an old map of the town where he grew up.",
        ),
        "teacher": (
            "Write a card and let the whole class sign it.",
            "A potted plant for the classroom window would be nice.",
            "Give a box of fine tea and a pen.",
        ),
        "grandmother": (
            "Bring her flowers and stay for an afternoon.",
            "A soft shawl keeps her warm in winter.",
            "Record her best stories and print them as a small book.",
        ),
        "best friend": (
            "Plan a day with all the things that you both enjoy.",
            "Fill a jar with notes about good memories.",
            "Buy two tickets for a show next month.",
        ),
        "boss": (
            "A plain notebook of good paper is safe and useful.",
            "Share the cost with your team and buy a nice lamp.",
            "Good coffee beans are a modest and friendly choice.",
        ),
        "nephew": (
            "A box of wooden blocks will keep him busy.",
            "Take him to the zoo and let him feed the goats.",
            "Give him a kite and fly it together.",
        ),
        "uncle": (
            "A fishing guide with maps would please him.",
            "Choose a warm wool hat in a dark color.",
            "Invite him to a round of cards and bring some cheese.",
        ),
    },
)
