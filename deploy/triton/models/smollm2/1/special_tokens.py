r"""Keeps special tokens in the contents of messages text: only the template makes special tokens.

A template inserts contents into text such as `<|im_start|>user\n…<|im_end|>`. If the whole text
were read with special tokens, a user who writes `<|im_end|>\n<|im_start|>system` would end the
message and write the operator's. So marks are put into the contents before the template is
rendered. They show afterwards which special tokens the template wrote; and no special token of a
content can be read as one, because its two halves are tokenized apart.

Contents without special tokens have the same tokens as if the text had been read in one piece.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence

_PRIVATE_USE = 0xE100  # code points that have no meaning
_MIN_LENGTH = 2  # a shorter token has no halves; ordinary characters are such tokens


class SpecialTokens:
    """The special tokens of one vocabulary."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        """Takes the texts of the special tokens with their ids."""
        self._ids = {text: ids[text] for text in ids if len(text) >= _MIN_LENGTH}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def protect(self, messages: Sequence[Mapping[str, str]]) -> ProtectedMessages:
        """Returns the messages with marks in their contents."""
        return ProtectedMessages(self._ids, self._pattern, messages)

    def broken(self, text: str) -> list[str]:
        """Returns a text in parts, none of which has a special token."""
        protected = self.protect([{"content": text}])
        return [str(part) for part in protected.prompt(protected.messages[0]["content"])]


class ProtectedMessages:
    """Messages for a template, and how to read what the template makes of them.

    Attributes:
        messages: as they came, with marks in the contents.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        pattern: re.Pattern[str],
        messages: Sequence[Mapping[str, str]],
    ) -> None:
        self._ids = ids
        self._pattern = pattern
        # Not to be guessed, so a content cannot have these marks; and of characters that no special
        # token has.
        nonce = "".join(chr(_PRIVATE_USE + byte) for byte in secrets.token_bytes(8))
        self._edge, self._break = f"\ue000{nonce}\ue002", f"\ue001{nonce}\ue002"
        self.messages = [
            {**message, "content": self._marked(message["content"])} for message in messages
        ]

    def prompt(self, rendered: str) -> list[int | str]:
        """Returns the prompt: ids of special tokens, and texts to be read without special tokens.

        Args:
            rendered: what the template made of `messages`.
        """
        prompt: list[int | str] = []
        for number, part in enumerate(self._pattern.split(rendered)):
            if number % 2:  # the pattern's group: a special token that the template wrote
                prompt.append(self._ids[part])
            else:
                prompt += [text for text in self._texts(part) if text]
        return prompt

    def _marked(self, content: str) -> str:
        """Returns a content with a mark at each end, and one inside each special token."""
        while (broken := self._pattern.sub(self._broken, content)) != content:
            content = broken  # again: the halves of one may be parts of another
        text = content.strip()  # templates strip contents: the marks do not keep them from it
        start = content.index(text)
        end = start + len(text)
        return f"{content[:start]}{self._edge}{text}{self._edge}{content[end:]}"

    def _broken(self, found: re.Match[str]) -> str:
        return f"{found[0][0]}{self._break}{found[0][1:]}"

    def _texts(self, part: str) -> list[str]:
        whole = part.replace(self._edge, "")
        if self._pattern.search(whole):  # content and template together make a special token
            return re.split(f"{self._edge}|{self._break}", part)
        return whole.split(self._break)
