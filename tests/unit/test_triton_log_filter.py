"""Texts of models' exceptions do not get into Triton's log."""

from __future__ import annotations

import io

import pytest

from deploy.triton.log_filter import forward, without_inputs

CANARY = "canary-91ab"
HEAD = "E1127 22:00:10 22998 pb_stub.cc:714] "
FAILED = "Failed to process the request(s) for model 'm_0_0', message: "


@pytest.mark.parametrize("text", [CANARY, f"{CANARY}\\n\\nAt:\\n  {CANARY}", f"is {CANARY} At: "])
def test_the_text_of_an_exception_is_left_out(text):
    """Its class, and where it was raised, stay."""
    end = "\\n"  # as Triton writes the ends of lines in its log
    frames = f"  /srv/m/1/model.py(10): fail{end}  /srv/m/1/model.py(23): execute{end}"
    line = f'{HEAD}"{FAILED}ValueError: {text}{end}{end}At:{end}{frames}"\n'
    filtered = without_inputs(line)
    assert CANARY not in filtered
    assert "ValueError" in filtered
    assert "/srv/m/1/model.py(23): execute" in filtered
    assert filtered.startswith(HEAD)
    assert filtered.count("\n") >= 1


@pytest.mark.parametrize(
    "text", [CANARY, f"{CANARY}Error: x", f"TritonModelException: {CANARY}", f"Error {CANARY}"]
)
def test_nothing_of_it_stays_without_frames(text):
    """Whatever the text looks like, apart from a name that ends with Error."""
    filtered = without_inputs(f'{HEAD}"{FAILED}{text}"\n')
    assert CANARY not in filtered.replace(f"{CANARY}Error", "")


@pytest.mark.parametrize(
    "line",
    [
        "I1127 model_lifecycle.cc:839] \"successfully loaded 'probe'\"\n",
        f"{HEAD}{FAILED}Stub process 'm_0_0' is not healthy.\n",
        "\n",
        "no end",
    ],
)
def test_all_other_lines_stay(line):
    """They are Triton's own."""
    assert without_inputs(line) == line


def test_a_log_is_forwarded_until_it_ends():
    """Also bytes that are no text."""
    target = io.BytesIO()
    forward(io.BytesIO(f'one\n"{FAILED}ValueError: {CANARY}"\n'.encode() + b"\xff\n"), target)
    assert target.getvalue().startswith(b"one\n")
    assert CANARY.encode() not in target.getvalue()
    assert target.getvalue().endswith("\N{REPLACEMENT CHARACTER}\n".encode())


def test_the_rest_of_a_long_line_is_left_out_too() -> None:
    """It may quote the request as its start did; other long lines are copied whole."""
    head = b"E1127 pb_stub.cc:714] \"Failed to process the request(s) for model 'm_0', message: "
    failure = head + b"ValueError: " + b"SECRET " * 50_000 + b'"\n'
    plain = b"x" * 200_000 + b"\n"
    target = io.BytesIO()
    forward(io.BytesIO(plain + failure + plain), target)
    copied = target.getvalue()
    assert b"SECRET" not in copied
    assert copied.startswith(plain)
    assert copied.endswith(plain)
