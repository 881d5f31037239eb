"""The prompt's text for a connector that looks at pictures with the question in mind (InstructBLIP)."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_edge.errors import PromptError
from vlm_edge.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Instruction:
    """The connector's own tokenizer, and how many tokens it has positions for."""

    tokenizer: Tokenizer
    max_tokens: int

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt's text; `add_special_tokens` as the prompt's own tokenizer is told.

        Raises:
            PromptError: there are more than the connector has positions for.
        """
        ids = self.tokenizer.encode(text, add_special_tokens)
        if len(ids) > self.max_tokens:
            raise PromptError(
                f"the prompt's text is {len(ids)} tokens to the connector, which takes at most "
                f"{self.max_tokens}; shorten it"
            )
        return tuple(ids)
