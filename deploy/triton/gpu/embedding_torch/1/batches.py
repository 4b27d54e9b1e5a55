"""Groups texts into batches."""

from __future__ import annotations

from collections.abc import Sequence


def batches(token_counts: Sequence[int], *, max_run_tokens: int) -> list[list[int]]:
    """Returns the indices of the texts, grouped by similar length.

    A group padded to its longest text has at most `max_run_tokens` tokens, or one text.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(token_counts)), key=lambda each: token_counts[each]):
        # Sorted, so this text is the longest of its group.
        if groups and (len(groups[-1]) + 1) * token_counts[place] <= max_run_tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
