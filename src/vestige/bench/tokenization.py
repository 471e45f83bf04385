"""Token ids of conversations, and texts of replies: the only place where the benchmark uses the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.bench.methods.conversation import Job, TurnIds
from vestige.bench.sample import Turn
from vestige.text.chat_template import ChatTemplate, find_end_ids


@dataclass(frozen=True)
class Renderer:
    """Makes the token ids that every method gets."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    question_aware: bool = False
    """Read questions with the context, before anything is compressed, as the papers on SnapKV and LaProx measure and as
    ``generate`` reads a whole prompt. The first token of a reply then comes from the full cache."""

    def job(self, turns: Sequence[Turn]) -> Job:
        """Return the ids of a conversation."""
        frame, turn_ids = ChatTemplate(self.tokenizer), []
        for i, turn in enumerate(turns):
            context = (frame.next_context(turn.context) if i else frame.context(turn.context))[0].tolist()
            question = frame.question(turn.question, turn.answer_prefix)[0].tolist()
            if self.question_aware:
                context, question = context + question, []
            limit = turn.max_new_tokens
            turn_ids.append(TurnIds(context=tuple(context), question=tuple(question), max_new_tokens=limit))
        return Job(turns=tuple(turn_ids), stop=self.stop())

    def measure(self, turns: Sequence[Turn]) -> int:
        """Return the number of tokens of a conversation, the longest replies included."""
        return self.job(turns).tokens

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def stop(self) -> tuple[int, ...]:
        """Return the ids that end a reply: the generation config's, or the tokenizer's."""
        return find_end_ids(self.model, self.tokenizer)

    def text(self, reply: Sequence[int]) -> str:
        """Return a reply as text."""
        return str(self.tokenizer.decode(list(reply), skip_special_tokens=True))
