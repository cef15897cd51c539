"""Turns of a dialogue, or questions and answers about a document, as segments.

Written as in the versatile language model (Lin et al. 2020): the reply is `speaker2`'s, and the
newest turns alone are read.
"""

from __future__ import annotations

from collections.abc import Sequence

from howfine.tasks.segments import Segments

PERSONA, OTHER, REPLY = "persona", "speaker1", "speaker2"
DOCUMENT, QUESTION, ANSWER = "document", "question", "answer"
# Turns that are read, the newest: those of two rounds before it, and the one replied to.
TALK_TURNS = 2 * 2 + 1
# Of questions and answers: one round before it, and the question.
ASKED_TURNS = 2 * 1 + 1


def talk(persona: Sequence[str] | None, history: Sequence[str]) -> Segments:
    """A reply to the last turn of the history, by who speaks in turn with the other.

    `persona` has sentences about who replies, which make one segment.
    """
    about = ((PERSONA, " ".join(persona)),) if persona else ()
    turns = _in_turn(history[-TALK_TURNS:], (OTHER, REPLY))
    return (*about, *turns, (REPLY, ""))


def asked(document: str, history: Sequence[str] | None, question: str) -> Segments:
    """An answer to a question about a document, after earlier questions and answers in turn."""
    turns = [*(history or ()), question][-ASKED_TURNS:]
    return ((DOCUMENT, document), *_in_turn(turns, (QUESTION, ANSWER)), (ANSWER, ""))


def _in_turn(turns: Sequence[str], kinds: tuple[str, str]) -> Segments:
    """Turns with two kinds in turn, such that the last one is of the first kind."""
    return tuple((kinds[(len(turns) - 1 - at) % 2], turn) for at, turn in enumerate(turns))


def turns_of(script: str) -> list[tuple[str, str]]:
    """(who, what) of "M: Hello.", one a line; what one says in several lines is one turn.

    A line without a name goes on with the turn before it.
    """
    turns: list[tuple[str, str]] = []
    for line in script.splitlines():
        name, colon, text = line.partition(":")
        who = name.strip() if colon else ""
        said = (text if colon else line).strip()
        if not said:
            continue
        if turns and who in ("", turns[-1][0]):
            who, before = turns.pop()
            said = f"{before} {said}"
        turns.append((who, said))
    return turns


def replies(turns: Sequence[tuple[str, str]]) -> list[tuple[Segments, str]]:
    """Each turn but the first, after the turns before it: those of who speaks, and all others'."""
    found = []
    for at, (who, said) in enumerate(turns[1:], 1):
        before = turns[max(0, at - TALK_TURNS) : at]
        read = ((REPLY if each == who else OTHER, text) for each, text in before)
        found.append(((*read, (REPLY, "")), said))
    return found
