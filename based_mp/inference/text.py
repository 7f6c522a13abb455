"""From tokens to text as they come: whole characters, and nothing that a stop string may still cut."""

from __future__ import annotations

from data_prep.tokenizers import Tokenizer

CONTEXT = 5                      # prompt tokens that decide how the first new token is spelt (a leading space)
UNFINISHED = "\ufffd"            # what an incomplete UTF-8 sequence decodes to


class TextStream:
    """The text of one continuation. `text` is final; `stopped` says that a stop string ended it."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: list[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text, self.stopped = "", False
        self._held = ""                                # decoded, but a stop string may begin in it
        self._ids, self._read = list(prompt[-CONTEXT:]), len(prompt[-CONTEXT:])
        self._begin = 0

    def add(self, tokens: list[int], *, last: bool = False) -> str:
        """Take in tokens; `last` when no more will come. Returns the text that became final."""
        if self.stopped:
            return ""
        before = len(self.text)
        self._ids += tokens
        self._take(self._decode(last=last))
        if last and not self.stopped:
            self.text, self._held = self.text + self._held, ""
        return self.text[before:]

    def _decode(self, *, last: bool) -> str:
        """What the tokens since the last whole character spell."""
        old = self.tokenizer.decode(self._ids[self._begin : self._read])
        new = self.tokenizer.decode(self._ids[self._begin :])
        if len(new) <= len(old) or (new.endswith(UNFINISHED) and not last):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return new[len(old) :]

    def _take(self, new: str) -> None:
        if not new:
            return
        held = self._held + new
        found = [at for s in self.stop if (at := held.find(s)) >= 0]
        if found:
            self.text, self._held, self.stopped = self.text + held[: min(found)], "", True
            return
        keep = max((n for s in self.stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        self.text, self._held = self.text + held[: len(held) - keep], held[len(held) - keep :]
