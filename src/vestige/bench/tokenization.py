"""From turns to token ids and back: the one place where the benchmark meets the chat text and the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.bench.methods.conversation import Job, TurnIds
from vestige.bench.sample import Turn
from vestige.text.chat_template import ChatTemplate, find_end_ids


@dataclass(frozen=True)
class Renderer:
    """Makes the ids that every arm is given."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    question_aware: bool = False
    """Questions are read with the context, before anything is compressed: what papers on SnapKV and LaProx measure, and
    what ``generate`` does with a whole prompt. The first token of a reply is then owed to the full cache."""

    def job(self, turns: Sequence[Turn]) -> Job:
        """Return the ids of a conversation."""
        frame, made = ChatTemplate(self.tokenizer), []
        for i, turn in enumerate(turns):
            context = frame.next_context(turn.context) if i else frame.context(turn.context)
            question = frame.question(turn.question, turn.answer_prefix)
            ids = TurnIds(
                context=tuple(context[0].tolist()),
                question=tuple(question[0].tolist()),
                max_new_tokens=turn.max_new_tokens,
            )
            made.append(_moved(ids) if self.question_aware else ids)
        return Job(turns=tuple(made), stop=self.stop())

    def measure(self, turns: Sequence[Turn]) -> int:
        """Return the tokens of a whole conversation, the longest replies included."""
        return self.job(turns).tokens

    def count(self, text: str) -> int:
        """Return the tokens of a piece of text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def stop(self) -> tuple[int, ...]:
        """Return the ids that end a reply: the generation config's, or the tokenizer's."""
        return find_end_ids(self.model, self.tokenizer)

    def text(self, reply: Sequence[int]) -> str:
        """Return a reply as text."""
        return str(self.tokenizer.decode(list(reply), skip_special_tokens=True))


def _moved(turn: TurnIds) -> TurnIds:
    return replace(turn, context=turn.context + turn.question, question=())
