# SPDX-License-Identifier: Apache-2.0
"""How a record (key, value) is written down and asked for, in very many wordings.

No wording of a published benchmark may occur here: `HELD_OUT_WORDINGS` lists what the tests look
for in samples of every family.
"""

from dataclasses import dataclass

from training.data.names import Rng, draw

HELD_OUT_WORDINGS = (
    "magic",
    "REGISTER_CONTENT",
    "mentioned in the provided text",
    "Extract the value",
    "Corresponding value",
    "JSON object below",
    "The grass is green",
    "Here we go. There and back again",
    "Memorize and track the chain",
    "Find all variables that are assigned",
    "coded word",
)

NOUNS = [
    "number",
    "code",
    "password",
    "secret",
    "address",
    "year",
    "price",
    "figure",
    "weight",
    "token",
    "id",
    "score",
    "count",
    "total",
    "amount",
    "balance",
    "length",
    "height",
    "rank",
    "serial",
    "pin",
    "key",
    "phrase",
    "word",
    "name",
    "value",
    "entry",
    "result",
    "label",
    "level",
    "answer",
    "mark",
    "date",
    "sum",
    "size",
    "age",
    "account",
    "ticket",
    "room",
    "seat",
    "badge",
    "licence",
    "route",
    "reference",
]
ADJECTIVES = [
    "secret",
    "special",
    "hidden",
    "private",
    "official",
    "new",
    "old",
    "final",
    "first",
    "second",
    "main",
    "true",
    "real",
    "public",
    "unique",
    "personal",
    "exact",
    "correct",
    "current",
    "original",
    "favourite",
    "short",
    "long",
    "lucky",
    "daily",
]
RELATIONS = ["for", "for", "for", "of", "of", "given to", "belonging to", "assigned to", "about",
             "in", "under", "at", "from", "kept by"]  # fmt: skip
COPULAS = [" is", " is", " is:", " is:", " was", ":", " =", " equals", " reads", " should be"]
WHERE = ["", "", "", " in the text above", " given in the passage", " stated earlier",
         " that was written above", " from the notes", " in the document", " named in the story",
         " according to the text", " found above", " in this text", " in the list"]  # fmt: skip
OPENERS = [
    "Below is a text with some {noun}s in it. Remember them.",
    "A few {noun}s are written between the lines that follow. Keep them in mind.",
    "Read the following. Afterwards there will be a question about a {noun}.",
    "Here is a list of records.",
    "Study these notes and then answer.",
    "Keep the {noun}s in this text in your memory.",
    "Some important facts are hidden in a long text. Find them.",
    "You are given a text. Answer the question at its end.",
    "The {noun}s below will be needed later.",
    # The words that the question will repeat, with no value behind them.
    "A {what} is hidden somewhere in the pages that follow. I will ask for the {what} later.",
    "Some {what}s are kept in this text. Learn them, for I shall ask about the {what}s at the end.",
    "A {what} is written in what follows. Make sure to keep it in mind.",
    "The {what} is asked for at the end of this text, so note every {what} that you see.",
    "There is a {what} in the document. The {what} is what I want to know.",
    "One {what} is mentioned below. Please read with care, a quiz about the {what} will follow.",
    "Each {what} is a value that belongs to a name; look for every {what} and learn it.",
]


@dataclass
class Style:
    """One way of writing, fixed for a whole sequence.

    Attributes:
        opener: First line, or "".
        glue: What stands between records that follow one another directly.
        open, close: What encloses the whole list.
        filler: Whether running text may stand between records.
    """

    opener: str
    glue: str
    before: str
    between: str
    after: str
    queries: list[tuple[str, str, str]]
    open: str = ""
    close: str = "\n"
    filler: bool = True

    def record(self, key: str, value: str) -> str:
        return (
            self.before.replace("{key}", key)
            + self.between.replace("{key}", key)
            + (value + self.after)
        )

    def query(self, rng: Rng, key: str, value: str) -> tuple[str, str, str]:
        """Question with the start of the answer, the answer, what ends it."""
        ask, lead, end = rng.choice(self.queries)
        return ask.replace("{key}", key), lead + value, end


def _phrase(rng: Rng) -> str:
    noun = rng.choice(NOUNS)
    return f"{rng.choice(ADJECTIVES)} {noun}" if rng.random() < 0.6 else noun


def _where(rng: Rng, words: list[str]) -> str:
    """What stands between a key and its value in a question; nothing, or as far as nine words.

    Random words half of the time, so that the key is found by what it is and not by its distance.
    """
    if rng.random() < 0.3:
        return ""
    if rng.random() < 0.5:
        return rng.choice(WHERE)
    small = rng.choices(
        ["the", "in", "of", "a", "that", "which", "was", "to", "by", "on", "from"], k=3
    )
    picked = rng.sample(words, 4) + small
    rng.shuffle(picked)
    return " " + " ".join(picked[: rng.randint(1, 7)]) + rng.choice(["", rng.choice(WHERE)])


def _opener(rng: Rng, noun: str) -> str:
    """An introduction, or none; `noun` may be a phrase, of which the last word is the noun."""
    if rng.random() < 0.4:
        return ""
    text = rng.choice(OPENERS)
    return text.replace("{noun}", noun.split()[-1]).replace("{what}", noun) + "\n"


def prose(rng: Rng, words: list[str]) -> Style:
    """Sentences: "The secret code for X is 123."."""
    what = _phrase(rng)
    if rng.random() < 0.3:  # any words may take the place of the usual ones
        what = " ".join(rng.sample(words, rng.randint(1, 3)))
    rel, cop, where = rng.choice(RELATIONS), rng.choice(COPULAS), _where(rng, words)
    quote = rng.choice(["", "", "", "", '"', "'"])
    many = what + ("s" if rng.random() < 0.9 else "")
    lead = rng.choice(["The", "The", "The", "One of the", "Note: the",
                       "Remember: the", "Please note that the", "By the way, the",
                       "As we know, the", "It is known that the", "Her", "My", "Our",
                       "A"])  # fmt: skip
    if lead.startswith("One"):
        body = f" One of the {many} {rel} {{key}}"
        if cop.strip() in ("=", ":"):
            cop = " is:"
    else:
        body = f" {lead} {what} {rel} {{key}}"
    full = f"{what} {rel} {quote}{{key}}{quote}"
    body = body.replace("{key}", f"{quote}{{key}}{quote}")
    ask_cop = rng.choice([" is", " is", " is", cop, cop, ":", " is:"])
    answer_leads = [f" The {full}{where}{ask_cop}", f" The {full}{where}{ask_cop}", f"{body}{cop}"]
    questions = [
        f"\nWhat is the {full}{where}?",
        f"\nWhat is the {full}?",
        f"\nTell me the {full}{where}.",
        f"\nWhich {what} was {rng.choice(['given', 'named', 'noted', 'stated'])} {rel} {{key}}?",
        f"\nQuestion: What is the {full}{where}?\nAnswer:",
        f"\nQ: {full}?\nA:",
        f"\nWhat are all the {many} {rel} {{key}}{where}?",
        "\nAnd for {key}?",
        "",
    ]
    queries = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        q = rng.choice(questions)
        a = rng.choice(answer_leads)
        ask = q if q.endswith((":", "?")) and rng.random() < 0.3 and q else q + a
        queries.append((ask, " ", rng.choice([".", ".", "\n", ".\n"])))
    if rng.random() < 0.3:
        return Style(_opener(rng, what), "\n", body.strip(), cop + " ", ".", queries)
    return Style(_opener(rng, what), "", body, cop + " ", ".", queries)


def table(rng: Rng, words: list[str]) -> Style:
    """Lines with a label: "row X holds [123]"."""
    unit = rng.choice(["row", "entry", "item", "record", "slot", "station", "room", "box", "page",
                       "shelf", "file", "", "Row", "No.", rng.choice(words)])  # fmt: skip
    label = rng.choice(["holds", "contains", "DATA is", "VALUE", "payload is", "stores", "shows",
                        "NUMBER is", "has the number", "content =", "ENTRY_VALUE is", "has", "is",
                        "->", rng.choice(words), f"{rng.choice(words).upper()} is",
                        f"{rng.choice(words).upper()}_{rng.choice(words).upper()} is"])  # fmt: skip
    left, right = rng.choice([("<", ">"), ("<", ">"), ("[", "]"), ("(", ")"), ('"', '"'), ("", "")])
    sep = rng.choice([":", ":", ",", "", " -", " |"])
    start = f"{unit} {{key}}" if unit else "{key}"
    name = label.removesuffix(" is").removesuffix(" =")
    lead = " " if not left else " " + left
    value_lead, tail = (" ", "") if not left else ("", right)
    body = f"{sep} {label}{'' if value_lead == ' ' else lead}"
    full = f"{start}{body}"
    where, opening = _where(rng, words), lead if left else ""
    asks = [
        f"\n{full}",
        f"\nWhat is in {start}?{where}. The {left}{name}{right} in {start} is{opening}",
        f"\nTell me about {start}{where}: {name}{opening}",
        f"\nQuestion: what is in {start}?\nAnswer: {full}",
        f"\nTell me the {left}{name}{right} of {start}. The {left}{name}{right} of {start} is",
        f"\nWhat does {start} say? I want the value. {start[0].upper() + start[1:]} says",
        f"\nNow look at {start}. It has{'' if value_lead == ' ' else lead}",
        f"\nWhat is the {name} in {start}? The {name} in {start} is",
    ]
    queries = []
    for ask in rng.sample(asks, rng.choice([1, 1, 2])):
        closed = bool(left) and ask.endswith(lead)
        spaced = value_lead == " " or not closed
        queries.append((ask, " " if spaced else "", "\n" if spaced else tail))
    glue = "\n"
    # `between` ends with the space that the value needs: record() joins before tokenising.
    between = body + (" " if value_lead == " " else "")
    return Style(_opener(rng, name), glue, start, between, tail, queries)


def mapping(rng: Rng, words: list[str]) -> Style:
    """JSON and its relatives."""
    q = rng.choice(['"', '"', '"', "'"])
    colon = rng.choice([": ", ": ", ":", " : "])
    glue = rng.choice([", ", ",\n", ",\n ", ",\n  ", ","])
    asks = [
        (f"\n{q}{{key}}{q}{colon}{q}", "", q),
        (f"\nLook up {q}{{key}}{q}.\nResult: {q}", "", q),
        ("\nKey: {key}\nValue:", " ", "\n"),
        (f"\nKey {q}{{key}}{q} has the value", " ", "\n"),
        (f"\nWhat does {q}{{key}}{q} map to?\nIt maps to", " ", "\n"),
        (f"\nget({q}{{key}}{q}) == {q}", "", q),
        (f"\n{q}{{key}}{q} ->", " ", "\n"),
        (f"\nThe value of {q}{{key}}{q} is {q}", "", q),
    ]
    word, other = rng.choice(words), " ".join(rng.sample(words, rng.randint(1, 2)))
    where = _where(rng, words)
    asks += [
        (f"\n\n{word.title()}: {q}{{key}}{q}\n{other.capitalize()}: {q}", "", q),
        (f"\n{word}: {q}{{key}}{q}\n{other}: {q}", "", q),
        (f"\n{q}{{key}}{q}{where}: {q}", "", q),
        (f"\nThe value for {q}{{key}}{q}{where} is {q}", "", q),
    ]
    left, right = rng.choice(["{}", "{}", "[]", "()"])
    opener = rng.choice(["", "", "Here are keys and values.\n", "Dictionary:\n", "Data: ",
                         f"Take the value of a key out of this {word}.\n\n{word}:\n",
                         "config = "])  # fmt: skip
    return Style(opener, glue, f"{q}{{key}}{q}", f"{colon}{q}", q, rng.sample(asks, 2),
                 open=left, close=right + "\n", filler=False)  # fmt: skip


def plain(rng: Rng, words: list[str]) -> Style:
    """Bare lists: key, separator, value."""
    sep = rng.choice([":", " =", " ->", ",", " |", " is", " -", ":", " =>", " to"])
    glue = rng.choice(["\n", "\n", ";", ",", ".", " /"])
    before = "{key}" if glue == "\n" else " {key}"
    line = "\n{key}" + sep
    asks = [(line, " ", glue), (line, " ", glue), ("\nFind {key}. {key}" + sep, " ", "\n"),
            ("\n{key}?", " ", "\n")]  # fmt: skip
    return Style(_opener(rng, "value"), glue, before, sep + " ", "", rng.sample(asks, 2))


def nonsense(rng: Rng, words: list[str]) -> Style:
    """Random words around key and value: no wording to rely on, only what was seen before."""
    a = " " + " ".join(rng.sample(words, rng.randint(1, 4)))
    b = " " + " ".join(rng.sample(words, rng.randint(1, 3)))
    c = rng.choice(["", ".", ",", "!", " " + rng.choice(words)])
    shown = rng.choice(["{key}", "{key}", '"{key}"', "<{key}>"])
    colon = rng.choice(["", "", ":", " ="])
    start = f"{a} {shown}"
    d = " " + " ".join(rng.sample(words, rng.randint(1, 4)))
    asks = [
        (start + b + colon, " ", c or "\n"),
        (d + "? " + start.strip() + b + colon, " ", c or "\n"),
        (d + f" {shown}" + b + colon, " ", c or "\n"),
    ]
    return Style("", "", start, f"{b}{colon} ", c, rng.sample(asks, rng.choice([1, 2])))


FAMILIES = {"prose": 5, "table": 3, "mapping": 3, "plain": 2, "nonsense": 3}


def draw_style(rng: Rng, words: list[str]) -> Style:
    """A style of any family."""
    makers = {"prose": prose, "table": table, "mapping": mapping, "plain": plain}
    return makers.get(draw(rng, FAMILIES), nonsense)(rng, words)
