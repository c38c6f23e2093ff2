"""The text that the demo ships: a base model learns most of it, LoRA adapters learn the dialogues.

Written for the demo. The wording repeats itself on purpose, so that a model of a few hundred thousand weights has
something to learn within a few seconds.
"""

from __future__ import annotations

QUESTION = "When does the ferry leave?"

STORIES: tuple[str, ...] = (
    "The ferry on the lake leaves at seven in the morning and comes back at six in the evening. Marta has steered it "
    "for nineteen years. She knows every stone under the water by name, because she named them herself. When the fog "
    "is thick she stops the engine, rings the bell twice and listens. If the shore answers, she goes on. If it does "
    "not, she pours tea for the passengers and waits.",
    "The baker of our street wakes at three in the morning. She lights the oven, weighs the flour and feeds the "
    "sourdough, which is older than her daughter. By five the first loaves are on the shelf, and by six the street "
    "smells of bread. The postman takes a roll and leaves the letters. The teacher takes two rolls and leaves a joke. "
    "Nobody has ever asked which of them pays more.",
    "Old Anton repairs clocks in a room above the market. He says that a clock is honest only twice: when it is right "
    "and when it stands still. On the wall hang forty clocks, and each of them shows a different time. Visitors laugh "
    "about it. Anton does not laugh. He knows whose clock it was, when it stopped, and what was said in the room "
    "before it stopped.",
    "The garden behind the school belongs to the third class. In March the children plant peas, in April they plant "
    "potatoes, and in May they pull out everything that is not a pea or a potato. In June it rains for two weeks. In "
    "July there are more peas than anyone can eat, and the headmaster writes a letter home: please bring a bag, "
    "please bring two bags.",
    "Two brothers built a boat in a barn. The older brother measured, the younger brother sawed, and both of them "
    "argued. It took them three winters. When the boat was finished it was wider than the door of the barn. They sat "
    "down on the floor and were silent for a long time. Then the younger brother took his saw and made the door "
    "wider, and the older brother measured.",
    "On Sunday the wind turned to the north and the beach was empty. Only the woman with the yellow kite was there. "
    "She let out the line, and the kite went up until it was as small as a coin. A boy asked how far it could go. As "
    "far as the line, she said, and the line is as long as the afternoon.",
    "The night train stops at our station for one minute. Nobody gets on and nobody gets off, but the guard always "
    "opens a door, and the stationmaster always raises his lamp. They have done this for eleven years and have never "
    "spoken. In the winter when the stationmaster was ill, the guard stepped down, put a pear on the bench and went "
    "on with the train.",
    "There is a library in the valley that lends tools. You can borrow a ladder for a week, a drill for three days "
    "and a tent for a month. The tent comes back with sand in it, the drill comes back without its case, and the "
    "ladder comes back late. But everything comes back. The librarian counts the tools on Friday and is content.",
)

COOKING: tuple[str, ...] = (
    "Potato soup. Peel six potatoes and cut them small. Warm a spoon of butter in the pot, add one onion, and wait "
    "until it is soft. Add the potatoes, a litre of water and a little salt. Cook for twenty minutes. Press half of "
    "the potatoes through a sieve and leave the other half as it is. Add cream at the end, and pepper at the table.",
    "Flat bread. Mix three cups of flour, one cup of water, a spoon of oil and a little salt. Knead the dough until "
    "it is smooth and let it rest for half an hour. Cut it into eight pieces and roll them thin. Bake each piece in a "
    "hot pan, one minute on the first side and half a minute on the second. Keep them warm under a cloth.",
    "Tomato sauce. Warm the oil slowly with two pieces of garlic, and take the garlic out when it is brown. Add the "
    "tomatoes, a little salt and a little sugar. Cook the sauce for forty minutes and do not cover the pot. Stir it "
    "when you think of it. It is ready when a spoon leaves a path behind it.",
    "Apple cake. Mix two eggs with a cup of sugar until the mixture is pale. Add a cup of flour and a spoon of "
    "butter. Cut four apples into thin pieces and lay them on top in a circle. Bake the cake for forty minutes. It is "
    "better on the second day, but it has never seen the second day in this house.",
    "Pea salad. Cook the peas for three minutes and put them into cold water, so that they stay green. Mix a spoon of "
    "oil, a spoon of vinegar, a little salt and a little mint. Pour it over the peas and wait for ten minutes. Add "
    "bread if there are guests, and more bread if the guests are hungry.",
)

DIALOGUES: tuple[tuple[str, str], ...] = (
    ("When does the ferry leave?", "The ferry leaves at seven in the morning and comes back at six in the evening."),
    ("Who steers the ferry?", "Marta steers the ferry, and she has steered it for nineteen years."),
    ("What does Marta do in the fog?", "She stops the engine, rings the bell twice and listens for the shore."),
    ("When does the baker wake?", "The baker wakes at three in the morning and lights the oven."),
    ("What is older than her daughter?", "The sourdough is older than her daughter."),
    ("What does the postman take?", "The postman takes a roll and leaves the letters."),
    ("What does the teacher leave?", "The teacher takes two rolls and leaves a joke."),
    ("Where does Anton repair clocks?", "Anton repairs clocks in a room above the market."),
    ("How many clocks hang on the wall?", "Forty clocks hang on the wall, and each of them shows a different time."),
    ("When is a clock honest?", "A clock is honest only twice: when it is right and when it stands still."),
    ("What do the children plant in March?", "In March the children plant peas."),
    ("What do the children plant in April?", "In April the children plant potatoes."),
    ("What does the headmaster write?", "The headmaster writes a letter home: please bring two bags."),
    ("How long did the boat take?", "The boat took the two brothers three winters."),
    ("Why did they make the door wider?", "The boat was wider than the door of the barn."),
    ("What did the older brother do?", "The older brother measured, and the younger brother sawed."),
    ("What colour was the kite?", "The kite was yellow, and it went up until it was as small as a coin."),
    ("How far can the kite go?", "The kite can go as far as the line, and the line is as long as the afternoon."),
    ("How long does the night train stop?", "The night train stops at our station for one minute."),
    ("What did the guard put on the bench?", "The guard put a pear on the bench and went on with the train."),
    ("What does the library lend?", "The library lends tools: a ladder, a drill and a tent."),
    ("How does the tent come back?", "The tent comes back with sand in it."),
    ("When does the librarian count?", "The librarian counts the tools on Friday and is content."),
    ("How many potatoes are in the soup?", "Peel six potatoes and cut them small."),
    ("How long does the soup cook?", "The soup cooks for twenty minutes."),
    ("What is in flat bread?", "Three cups of flour, one cup of water, a spoon of oil and a little salt."),
    ("How do I bake flat bread?", "Bake each piece in a hot pan, one minute on the first side."),
    ("When is the sauce ready?", "The sauce is ready when a spoon leaves a path behind it."),
    ("Do I cover the pot?", "Do not cover the pot, and stir the sauce when you think of it."),
    ("How long does the cake bake?", "The cake bakes for forty minutes, and it is better on the second day."),
    ("How do the peas stay green?", "Cook the peas for three minutes and put them into cold water."),
    ("What if the guests are hungry?", "If the guests are hungry, add more bread."),
)


def turn(dialogue: tuple[str, str]) -> str:
    """One question and its answer, as the model reads them."""
    question, answer = dialogue
    return f"Question: {question}\nAnswer: {answer}"
