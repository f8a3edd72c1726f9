"""Topics: directions, travel, appointments, weather, complaints."""

from raftune.starters.text.topics.domain import CLOSERS, OPENERS, Domain

DIRECTIONS = Domain(
    asks=(
        "How do I get to the {t}?",
        "Where is the {t}?",
        "Can you show me the way to the {t}?",
        "I am lost and I need to find the {t}.",
        "Is the {t} far from here?",
    ),
    said="the {t}",
    openers=(*OPENERS, "No problem, {r} is easy to find."),
    closers=(*CLOSERS, "Have a safe walk!"),
    topics={
        "train station": (
            "Follow the main street down to the clock tower.",
            "Tram number four stops right at the platforms.",
            "It is ten minutes on foot, straight past the bank.",
        ),
        "library": (
            "Turn left at the school and you will see the red building.",
            "It stands behind the church, next to the bakery.",
            "Walk two blocks north and cross at the lights.",
        ),
        "museum": (
            "Go along the river until you reach the stone bridge.",
            "Bus number nine takes you to the front steps.",
            "It is the large white house on the old square.",
        ),
        "hospital": (
            "Take the ring road and follow the blue signs.",
            "Bus number two runs there every ten minutes.",
            "Drive up the hill and turn right at the top.",
        ),
        "post office": (
            "It is on the corner across from the cinema.",
            "Walk past the fountain and take the second street.",
            "Look for the yellow sign beside the pharmacy.",
        ),
        "city park": (
            "The green gate is at the end of this avenue.",
            "Cross the footbridge and keep to the right.",
            "Get off the tram at the rose garden.",
        ),
        "market": (
            "Follow the smell of bread to the covered hall.",
            "It opens at seven in the square by the town hall.",
            "Take the stairs under the arch and turn left.",
        ),
        "harbor": (
            "Walk downhill until you can see the masts.",
            "The ferry bus leaves from the square every hour.",
            "Keep the lighthouse in front of you all the way.",
        ),
    },
)

TRAVEL = Domain(
    asks=(
        "What should I see in {t}?",
        "I am going to {t} next month.",
        "Is {t} worth a visit?",
        "Do you have any tips for a trip to {t}?",
        "I will be in {t} for a few days.",
    ),
    said="{t}",
    openers=(*OPENERS, "Lucky you, {r} is a wonderful place!"),
    closers=(*CLOSERS, "Have a great trip!"),
    topics={
        "Paris": (
            "Walk along the Seine and stop at a small cafe.",
            "Visit the Louvre early, before the long lines.",
            "Three days are enough for the tower and the old streets.",
        ),
        "Rome": (
            "See the Colosseum in the morning, when it is cool.",
            "Throw a coin into the fountain and eat ice cream nearby.",
            "Take four days, since there are ruins on every corner.",
        ),
        "Tokyo": (
            "Buy a rail card and eat noodles at the station.",
            "The temple in Asakusa is best just after sunrise.",
            "Stay five days and spend one of them in the mountains.",
        ),
        "London": (
            "Most big museums are free, so start with those.",
            "Ride on top of a red bus through the center.",
            "Bring an umbrella and book the theater early.",
        ),
        "Egypt": (
            "See the pyramids at dawn and wear a hat.",
            "A slow boat on the Nile shows you the villages.",
            "Go in winter, when the desert is not so hot.",
        ),
        "Iceland": (
            "Drive the ring road and swim in the hot springs.",
            "Come in winter if you want to see the northern lights.",
            "Pack a rain coat, because the wind never stops.",
        ),
        "Venice": (
            "Get lost in the lanes far from the main square.",
            "Take the water bus down the grand canal at sunset.",
            "Two days are fine, and the islands deserve a third.",
        ),
        "Norway": (
            "Take the train to Bergen for the best views.",
            "A small ferry brings you deep into the fjords.",
            "Bring good boots and hike up to the glacier.",
        ),
    },
)

MEETINGS = Domain(
    asks=(
        "Can we move the {t} to {d}?",
        "Is {d} good for the {t}?",
        "Please book the {t} for {d}.",
        "I cannot make the {t} on {d}.",
    ),
    said="the {t}",
    openers=(*OPENERS, "Sure, we can find a good time for {r}."),
    closers=(*CLOSERS, "See you then!"),
    topics={
        "team meeting": (
            "The large room is free on {d} at ten.",
            "I will ask the team whether {d} works and send a note.",
            "We can also join by video on {d} after lunch.",
        ),
        "dentist visit": (
            "The clinic has one free chair on {d} at nine.",
            "I can call the clinic and ask for {d} afternoon.",
            "Bring your insurance card on {d} and come early.",
        ),
        "piano lesson": (
            "The teacher can come on {d} after school.",
            "We could play for an hour on {d} at five.",
            "Practice the scales until {d} and bring the notes.",
        ),
        "budget review": (
            "The numbers will be ready on {d} by noon.",
            "I have put {d} at two in the calendar.",
            "Please send your costs before {d} so that we can check them.",
        ),
        "haircut": (
            "The salon has a free slot on {d} at four.",
            "I can book {d} morning with the same stylist.",
            "On {d} it takes about forty minutes with a wash.",
        ),
        "phone call": (
            "I am free on {d} between three and four.",
            "I will ring you on {d} at eleven.",
            "Send me your number and I will call on {d}.",
        ),
        "training course": (
            "There are two seats left in the group on {d}.",
            "The course on {d} starts at nine and ends at three.",
            "I can put your name on the list for {d}.",
        ),
        "car service": (
            "The garage can take the car on {d} at eight.",
            "Leave the keys on {d} and collect it in the evening.",
            "They will change the oil on {d} and test the brakes.",
        ),
    },
)

WEATHER = Domain(
    asks=(
        "What will the weather be in the {t} on {d}?",
        "Will it rain in the {t} on {d}?",
        "What should I wear in the {t} on {d}?",
        "Is {d} a good day to be out in the {t}?",
    ),
    said="the {t}",
    openers=(*OPENERS, "Let me check {r} for you."),
    closers=(*CLOSERS, "Stay safe out there!"),
    topics={
        "mountains": (
            "{d} looks clear but cold, so take a thick coat.",
            "Snow may fall on {d} above the tree line.",
            "Start early on {d}, since storms come after noon.",
        ),
        "valley": (
            "Fog will hide the sun until noon on {d}.",
            "Expect a mild {d} with almost no wind.",
            "A light sweater is all you need on {d}.",
        ),
        "desert": (
            "{d} will be dry and very hot, so carry water.",
            "Wear long sleeves on {d} against the sun.",
            "The night after {d} will be cold and full of stars.",
        ),
        "south": (
            "Short showers and a warm breeze are likely on {d}.",
            "The sea will be calm on {d}, so bring a swimsuit.",
            "Take sun cream on {d}, for the clouds are thin.",
        ),
        "city": (
            "It should rain a little on {d}, so take an umbrella.",
            "{d} will be gray but warm enough for a walk.",
            "Light shoes are fine on {d}, as the streets stay dry.",
        ),
        "north": (
            "Strong wind and sleet are likely on {d}.",
            "Wear boots and gloves on {d}, for the roads are icy.",
            "The days are short, so be home before dark on {d}.",
        ),
        "forest": (
            "The paths will be muddy on {d}, so wear boots.",
            "It stays cool under the trees on {d}.",
            "A few drops may fall on {d}, but the leaves keep you dry.",
        ),
        "west": (
            "High waves are likely on {d}, so stay on the beach.",
            "{d} will be sunny with a fresh wind from the sea.",
            "Take a wind jacket on {d} and hold on to your hat.",
        ),
    },
)

COMPLAINTS = Domain(
    asks=(
        "I am not happy with my {t}.",
        "I want my money back for the {t}.",
        "There is a problem with my {t}.",
        "The {t} you sent me is damaged.",
        "I have a complaint about my {t}.",
    ),
    said="your {t}",
    openers=(
        "I am very sorry about {r}.",
        "I apologize for the trouble with {r}.",
        "Thank you for telling us about {r}.",
        "I am sorry to hear that.",
    ),
    closers=(*CLOSERS, "Thank you for your patience."),
    topics={
        "jacket": (
            "Send it back in the bag and we will mail a new size.",
            "You can return it in any of our shops within a month.",
            "We will mend the zipper free of charge.",
        ),
        "sofa": (
            "Our driver will collect it and bring another one.",
            "We can give you a new cover in the same color.",
            "The carpenter will come and repair the leg at your home.",
        ),
        "headphones": (
            "A new pair will leave our store tonight.",
            "Please reset them first by holding both buttons.",
            "We will pay the full price back to your card.",
        ),
        "camera": (
            "Mail us a photo of the lens and we will replace it.",
            "The repair is free for two years.",
            "We will send a courier to pick it up tomorrow.",
        ),
        "birthday cake": (
            "We will bake a fresh one this afternoon.",
            "Our baker can write the right name on it at once.",
            "You will not pay for it, and we add some cookies.",
        ),
        "suitcase": (
            "We will ship new wheels and a strong handle.",
            "It was left in the depot and arrives tomorrow.",
            "Keep the journal entry and you will get a larger one.",
        ),
        "bookshelf": (
            "The missing screws are already in the mail.",
            "We will replace the cracked board this week.",
            "A worker can come and build it for you.",
        ),
        "watch": (
            "Our expert will change the strap and the glass.",
            "Bring it to the counter and we will set it right.",
            "We can swap it for another model of equal value.",
        ),
    },
)
