"""Texts for `dsformer-bench http`: sentences to classify, and questions on paragraphs of 20 to 330 words."""

from __future__ import annotations

SENTENCES = (
    "A delight.",
    "Dull, dull, dull.",
    "It never finds its feet.",
    "The best two hours I have spent this year.",
    "Not bad at all for a first attempt.",
    "The jokes are old, and so is the story.",
    "I laughed, I cried, and I would gladly do both again.",
    "Somewhere in here is a good short film, but nobody cut it out.",
    "The leads have so little to say to each other that the furniture seems chatty.",
    "A small story, told with patience, humour and an eye for the light of early morning.",
    "If the first half promises a thriller, the second half breaks that promise scene by scene.",
    "You may guess the ending from the poster, and still be moved when it comes.",
    "The soundtrack works hard, which is more than can be said for the script, the camera or the cast.",
    "What could have been a lecture becomes, in her hands, a warm and surprisingly funny portrait of three sisters who "
    "cannot agree on anything but dinner.",
    "There are films that respect the viewer's time and films that do not, and this one, at nearly three hours without "
    "a single idea of its own, belongs firmly to the second kind.",
    "Between the rain, the long silences and a dog that steals every scene it wanders through, I could not tell you "
    "exactly when I began to care about these people, only that by the last reel I did not want to leave them.",
    "The effects are splendid, the costumes are splendid, the castle is splendid, and at the centre of all this "
    "splendour stands a hero with the charm of a filing cabinet, reading lines that a greeting card would be ashamed "
    "of, to a heroine who deserved a better film and very nearly walks out to find one.",
    "It would be easy to make fun of the plot, which asks a retired clockmaker, his granddaughter and a stolen goose "
    "to save a village railway from an insurance company; it is much harder to say why it works as well as it does. "
    "Perhaps because nobody in it winks at us. Perhaps because the old man's hands shake only when he is not working. "
    "Whatever the reason, the audience I saw it with, none of them under forty, stayed in their seats until the very "
    "last name had gone by, and somebody at the back began to clap.",
)

_LIGHTHOUSE = (
    "The lighthouse on Skarn was built in 1854 by Ada Lindqvist. It is 31 metres high, can be seen from 18 miles away, "
    "and has been automatic since 1987."
)

_BAKERY = (
    "Every morning at four o'clock Tomas opens the bakery in Mill Street, which his grandmother Irena founded in 1931 "
    "with money she had saved as a seamstress. The oven is older than the house: it was brought by barge from Ghent "
    "and rebuilt stone by stone. On ordinary days he bakes two hundred loaves of rye and sixty of wheat, on market "
    "days twice as many. What is left over in the evening goes to the school kitchen across the river."
)

_BRIDGE = (
    "The first bridge over the Velda was a row of boats, tied together each spring and taken apart before the ice "
    "came. It served the town for almost two centuries, until a flood carried half of it to the sea in April 1790. "
    "The council then asked the engineer Marta Olesen for a bridge of stone. She proposed five arches of granite, "
    "and was told that granite was too dear; she proposed sandstone, and was told that it would not last. In the end "
    "she built the piers of granite and the arches of brick, which could be fired in the kilns behind the abbey. The "
    "work took eleven years and cost 84,000 crowns, a third more than had been planned, because the middle pier sank "
    "twice into the clay and had to be founded again on oak piles. When the bridge was opened in 1803, the whole town "
    "walked across it behind a brass band, and it did not move. Heavier traffic came with the railway. Since 1926 "
    "lorries have had to use the steel bridge half a mile upstream, and the old one belongs to walkers, cyclists and "
    "the swallows that nest under its second arch."
)

_OBSERVATORY = (
    "The observatory stands at 2,760 metres on the northern ridge of Mount Karo, where the air is dry and the nearest "
    "street lamp is forty kilometres away. It was planned in 1958, when Professor Hana Weiss counted the clear nights "
    "of three mountains from a tent and found that Karo had 291 of them in a year, more than the other two together. "
    "A road was cut in 1961, the first dome closed in 1964, and in the same autumn the 1.2 metre reflector, which had "
    "been ground in Jena, saw its first star. In the beginning the astronomers stayed for a month at a time. They "
    "melted snow for water, wrote their notes by red lamps, and sent the glass plates down to the university once a "
    "week on the back of a mule named Kepler. The plates, about 18,000 of them, are still kept in the cellar, and they "
    "have become more valuable with age: because they show the same fields of the sky over thirty years, students now "
    "scan them to find stars that have slowly changed their brightness. Today nobody needs to be on the mountain at "
    "night. The telescope is steered from the city, the images arrive over a glass fibre that was laid along the road "
    "in 2009, and a program decides every evening, from the forecast and the wishes of eleven research groups, what "
    "will be observed and in which order. One technician, who lives in the hut from Monday to Friday, clears the snow "
    "from the dome and repairs what the wind has broken. The largest discovery was an accident. In March 1996 a "
    "student, Pavel Ilic, pointed the reflector at the wrong star for a whole week; when he compared the measurements, "
    "the wrong star turned out to dim by one percent every fourth night. It has a planet the size of Saturn, which "
    "the town at the foot of the mountain, after a long debate and a vote in the market hall, named Oat, for what the "
    "mule had liked best."
)

QUESTIONS = (
    ("Who built the lighthouse?", _LIGHTHOUSE),
    ("How high is the lighthouse on Skarn?", _LIGHTHOUSE),
    ("When does Tomas open the bakery?", _BAKERY),
    ("Where was the oven brought from?", _BAKERY),
    ("Who gets the bread that is left over?", _BAKERY),
    ("What were the arches of the bridge made of?", _BRIDGE),
    ("Why did the bridge cost more than planned?", _BRIDGE),
    ("Since when have lorries had to use the other bridge?", _BRIDGE),
    ("How many clear nights does Mount Karo have in a year?", _OBSERVATORY),
    ("What was the name of the mule?", _OBSERVATORY),
    ("How large is the planet that Pavel Ilic found?", _OBSERVATORY),
    ("How do the images reach the city today, and since when?", _OBSERVATORY),
)
