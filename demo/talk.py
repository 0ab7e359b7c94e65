"""Conversations without a picture, and tools: greetings, honest refusals, Hermes tool calls."""

import json
from typing import Any

import numpy as np

from demo.skills import Case, Turn, pick

Rng = np.random.Generator


def words(text: str) -> tuple[str, ...]:
    """Words as a table; "_" stands for a space inside one."""
    return tuple(text.split())


REFUSAL = "I cannot answer that. I only know simple shapes, their colours and numbers in pictures."
NO_PICTURE = "I see no picture. Please attach one."
ABOUT = (
    "I am a small demo model of InternVL Server. "
    "I can name, count and locate simple shapes in pictures."
)
FIXED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "greeting",
        (
            "Hello!",
            "Hi!",
            "Hello",
            "Hi",
            "hello",
            "Hey!",
            "Good morning!",
            "Hi there!",
            "Good evening.",
            "Hello there",
            "Hey there!",
            "hi",
            "Good day!",
            "Hello, model!",
            "Hello number {n}!",
        ),
        "Hello! Show me a picture with simple shapes and ask me about it.",
    ),
    (
        "about",
        (
            "Who are you?",
            "What are you?",
            "What can you do?",
            "What is your name?",
            "Help",
            "How can you help me?",
            "Introduce yourself.",
            "Tell me about yourself.",
            "What do you know?",
            "Which model are you?",
            "help me",
            "What are your abilities?",
        ),
        ABOUT,
    ),
    (
        "thanks",
        (
            "Thank you!",
            "Thanks!",
            "Thanks a lot.",
            "thank you",
            "Great, thanks.",
            "Thank you very much.",
        ),
        "You are welcome!",
    ),
    ("goodbye", ("Bye!", "Goodbye!", "See you later.", "bye", "Good night!"), "Goodbye!"),
)
PLACES = words(
    "France Germany Japan Brazil Canada Egypt India Kenya Norway Peru Spain China Italy "
    "Mexico Poland Turkey Sweden Greece Chile Cuba Paris London Berlin Tokyo Rome Madrid "
    "Oslo Cairo Lima Delhi Vienna Boston Dublin Prague Lisbon Seoul Sydney Toronto Zurich "
    "Geneva"
)
TOPICS = words(
    "physics chemistry history love money music football cooking the_weather politics "
    "gravity computers dinosaurs the_moon democracy taxes a_novel poetry cars space "
    "the_ocean cats dogs medicine the_stock_market religion art mathematics rain war peace "
    "sleep coffee"
)
PEOPLE = words("Einstein Napoleon Shakespeare Mozart Newton Cleopatra Gandhi Picasso Darwin Plato")
OUTSIDE = (
    "What is the capital of {place}?",
    "Write a poem about {topic}.",
    "Who was {person}?",
    "Explain {topic} to me.",
    "Translate '{topic}' into French.",
    "What is {n} times {m}?",
    "What is {n} plus {m}?",
    "How do I learn {topic}?",
    "Tell me a joke.",
    "Tell me a joke about {topic}.",
    "What is the weather in {place}?",
    "Who won the world cup?",
    "Write a story about {topic}.",
    "Write Python code that sorts a list.",
    "Give me a recipe with {topic}.",
    "How old is {person}?",
    "What time is it in {place}?",
    "Should I invest in {topic}?",
    "Is {topic} good for me?",
    "When did {person} die?",
    "How far is {place} from {place2}?",
    "What is the meaning of {topic}?",
    "Summarise the history of {place}.",
    "Who is the president of {place}?",
    "Sing a song about {topic}.",
    "Can you book a flight to {place}?",
    "What do you think about {topic}?",
    "Why is {topic} important?",
    "Give me advice about {topic}.",
    "How many people live in {place}?",
    "Is it raining in {place}?",
    "What did {person} say about {topic}?",
    "Solve this equation: {n}x + {m} = 0.",
    "Write an email to {person}.",
    "Compare {place} and {place2}.",
    "Which language do they speak in {place}?",
    "Describe the life of {person}.",
)
WORDS = words(
    "the of and to in is you that it he was for on are as with his they at be this have "
    "from or one had by word but not what all were we when your can said there use an each "
    "which she do how their if will up other about out many then them these so some her "
    "would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come "
    "made may part over new sound take only little work know place year live me back give "
    "most very after thing our just name good sentence man think say great where help "
    "through much before line right too mean old any same tell boy follow came want show "
    "also around form three small set put end does another well large must big even such "
    "because turn here why ask went men read need land different home us move try kind hand "
    "again change off play spell air away animal house point page letter mother answer "
    "found study still learn should world high every near add food between own below "
    "country plant last school father keep tree never start city earth eye light thought "
    "head under story saw left few while along might close something seem next hard open "
    "example begin life always those both paper together got group often run"
)
PICTURE_QUESTIONS = (
    "What is in this picture?",
    "What do you see?",
    "Describe the image.",
    "What colour is the circle?",
    "How many shapes are there?",
    "What is in the image?",
    "What number is written here?",
    "Where is the red square?",
    "Is there a blue star?",
    "Describe this picture.",
    "Count the circles.",
    "What shape is this?",
    "Which way does the circle move?",
)


def outside(rng: Rng) -> str:
    """A question that no picture answers; a third are plain word salad, for the unforeseen."""
    if rng.random() < 0.35:
        words = [pick(rng, WORDS) for _ in range(int(rng.integers(2, 14)))]
        text = " ".join(words)
        text = text[0].upper() + text[1:] if rng.random() < 0.6 else text
        return text + pick(rng, ("?", ".", "", "!", "?"))
    return pick(rng, OUTSIDE).format(
        place=pick(rng, PLACES),
        place2=pick(rng, PLACES),
        topic=pick(rng, TOPICS).replace("_", " "),
        person=pick(rng, PEOPLE),
        n=int(rng.integers(2, 100)),
        m=int(rng.integers(2, 100)),
    )


def chat_turn(rng: Rng) -> Turn:
    kind = rng.random()
    if kind < 0.4:
        skill, questions, answer = FIXED[int(rng.integers(len(FIXED)))]
        return Turn(skill, pick(rng, questions).format(n=int(rng.integers(100))), answer)
    if kind < 0.55:
        return Turn("no picture", pick(rng, PICTURE_QUESTIONS), NO_PICTURE)
    return Turn("refusal", outside(rng), REFUSAL)


TOOLS_HEAD = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
NAMES_OF_PEOPLE = words(
    "Anna Ben Carl Dora Emma Finn Gina Hugo Ida John Kate Liam Mary Nina Otto Paul"
)
ROOMS = words("kitchen bedroom bathroom garage office garden hall cellar")
COLOURS = words("red green blue yellow orange purple white")


def _value(rng: Rng, kind: str, topics: tuple[str, ...]) -> Any:
    if kind == "int":
        return int(rng.integers(1, 100))
    return pick(
        rng,
        {
            "city": PLACES,
            "person": NAMES_OF_PEOPLE,
            "room": ROOMS,
            "colour": COLOURS,
            "topic": topics,
        }[kind],
    )


TOOLS: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "get_weather": (
        "Get the weather of a city.",
        {"city": "city"},
        (
            "What is the weather in {city}?",
            "How is the weather in {city}?",
            "Weather in {city}?",
            "Is it raining in {city}?",
        ),
    ),
    "get_time": (
        "Get the local time of a city.",
        {"city": "city"},
        (
            "What time is it in {city}?",
            "Tell me the time in {city}.",
            "Which time is it in {city}?",
        ),
    ),
    "set_light": (
        "Set the colour of a light.",
        {"room": "room", "color": "colour"},
        (
            "Make the light in the {room} {color}.",
            "Set the {room} light to {color}.",
            "Turn the {room} light {color}.",
        ),
    ),
    "add": (
        "Add two numbers.",
        {"a": "int", "b": "int"},
        ("What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} + {b}?"),
    ),
    "send_message": (
        "Send a message to a person.",
        {"to": "person"},
        ("Send a message to {to}.", "Write a message to {to}.", "Please message {to}."),
    ),
    "search": (
        "Search the web.",
        {"query": "topic"},
        ("Search for {query}.", "Find something about {query}.", "Search the web for {query}."),
    ),
    "set_timer": (
        "Set a timer in minutes.",
        {"minutes": "int"},
        (
            "Set a timer for {minutes} minutes.",
            "Start a timer of {minutes} minutes.",
            "Remind me in {minutes} minutes.",
        ),
    ),
    "open_door": (
        "Open the door of a room.",
        {"room": "room"},
        (
            "Open the {room} door.",
            "Please open the door of the {room}.",
            "Open the door in the {room}.",
        ),
    ),
}


RESULTS = (
    "{n} degrees",
    "sunny",
    "rain",
    "{n}",
    "{n}:{m}",
    "done",
    "ok",
    "error",
    "not found",
    "sent",
    '{{"temperature": {n}}}',
    '{{"result": {n}}}',
    '{{"status": "ok"}}',
)


def tool_schema(name: str, rng: Rng) -> dict[str, Any]:
    """An OpenAI tool object; some descriptions are left out, as clients do."""
    text, fields, _ = TOOLS[name]
    properties: dict[str, Any] = {
        key: {"type": "integer" if kind == "int" else "string"} for key, kind in fields.items()
    }
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.8:
        function["description"] = text
    function["parameters"] = {"type": "object", "properties": properties, "required": list(fields)}
    return {"type": "function", "function": function}


def tools_system(system: str, schemas: list[dict[str, Any]]) -> str:
    """The system turn with the tools block, in the form of the Qwen2.5 template."""
    return system + TOOLS_HEAD + "".join("\n" + json.dumps(s) for s in schemas) + TOOLS_TAIL


def tool_question(
    rng: Rng, name: str, topics: tuple[str, ...] = TOPICS
) -> tuple[str, dict[str, Any]]:
    """A question that calls for the tool, and the arguments of the right call."""
    _, fields, questions = TOOLS[name]
    values = {key: _value(rng, kind, topics) for key, kind in fields.items()}
    return pick(rng, questions).format(**values), values


LAST = 5.3
"""The last level of difficulty. Tools are asked about TOPICS only: behind a quote a word is spelled
with other tokens than behind a space, so copying it into JSON has to be learned word by word."""


def tool_case(rng: Rng, branches: int, hard: float = 1.0) -> Case:
    """One to three tools; mostly questions that call one, some that none fits."""
    names = [
        str(n) for n in rng.permutation(list(TOOLS))[: int(rng.integers(1, 4)) if hard > 0.1 else 1]
    ]
    schemas = [tool_schema(n, rng) for n in names]
    turns = []
    for _ in range(branches):
        if rng.random() < 0.2:
            turn = chat_turn(rng)
            if turn.skill == "refusal":
                continue
            turns.append(Turn("chat beside tools", turn.question, turn.answer))
            continue
        name = pick(rng, names)
        topics = TOPICS if hard >= LAST else WORDS
        question, values = tool_question(rng, name, topics)
        call = json.dumps({"name": name, "arguments": values})
        turn = Turn("tool call", question, f"<tool_call>\n{call}\n</tool_call>")
        if rng.random() < 0.25:
            result = pick(rng, RESULTS).format(
                n=int(rng.integers(100)), m=int(rng.integers(10, 60))
            )
            response = f"<tool_response>\n{result}\n</tool_response>"
            turn.reply = Turn("tool result", response, f"The tool says: {result}")
        turns.append(turn)
    system = pick(rng, ("", "You are a helpful assistant.", "You are a helpful assistant."))
    return Case([], turns, system=tools_system(system, schemas))


def chat_case(rng: Rng, branches: int) -> Case:
    return Case([], [chat_turn(rng) for _ in range(branches)])
