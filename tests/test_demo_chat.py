"""The demo conversations: their replies are right, and validation asks what training never does."""

from typing import Any

from forge.data.demo.chat import KINDS, Draw, demo_chat, is_held_out


def test_the_demo_holds_its_questions_apart_and_needs_nothing_unseen() -> None:
    train, validation = demo_chat("train", 3000), demo_chat("validation", 300)

    def asked(rows: list[dict[str, Any]]) -> set[str]:
        return {m["content"] for row in rows for m in row["messages"] if m["role"] == "user"}

    assert demo_chat("train", 20) == train[:20]
    assert not asked(train) & asked(validation)
    assert all(map(is_held_out, asked(validation)))
    texts = " ".join(m["content"] for row in train for m in row["messages"])
    words = {word for row in validation for m in row["messages"] for word in m["content"].split()}
    assert {word for word in words if word.isalpha()} <= set(texts.replace(".", " ").replace("?", " ").split()) | set(
        texts.split()
    )


def test_the_replies_of_the_demo_are_right() -> None:
    draw = Draw("test")
    for kind in KINDS:
        for _ in range(50):
            question, reply = kind(draw)
            numbers = [int(word.strip(".,?")) for word in question.split() if word.strip(".,?").isdigit()]
            if kind.__name__ == "_next":
                assert reply == f"{numbers[0] + 1}."
            elif kind.__name__ == "_larger":
                assert reply == f"{max(numbers)} is larger."
            elif kind.__name__ == "_sums":
                assert reply == f"{numbers[0]} + {numbers[1]} = {sum(numbers)}."
            elif kind.__name__ == "_backwards":
                assert question == f"Write {' '.join(reversed(reply.split()))} backwards."
            elif kind.__name__ in ("_holdings", "_places"):
                asked = question.split(". ")[-1].rstrip("?").split()
                assert reply in question
                assert asked[-1 if kind.__name__ == "_places" else 2] in reply
                assert kind.__name__ == "_places" or asked[-2] in reply
