"""Questions about documents among distractors: qa_1 (SQuAD) and qa_2 (HotpotQA)."""

from __future__ import annotations

from .chat import fill
from .generator import Example, Generator, Setting
from .specs import STRINGS


class QuestionAnswering(Generator):
    """Units: documents. Sample i asks the file's question i."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, step=10, minimum=1)
        self.source = setting.sources.questions(setting.spec.args["dataset"])
        self.samples = len(self.source.questions)
        if self.sizing == "step":
            self.limit = len(self.source.documents)

    def example(self, units: int, index: int) -> Example:
        question, documents = self.source.questions[index], self.source.documents
        if units >= len(documents):
            chosen = [i % len(documents) for i in range(units)]
        elif units - len(question.gold) > len(question.near):
            shown = [*question.gold, *question.near]
            others = [i for i in range(len(documents)) if i not in set(shown)]
            chosen = shown + self.rng.sample(others, units - len(shown))
        else:
            chosen = question.gold + self.rng.sample(question.near, max(0, units - len(question.gold)))
        numbered = [
            fill(STRINGS["document"], i=str(number), document=documents[i])
            for number, i in enumerate(self.shuffled(chosen), 1)
        ]
        return self.write(question.answers, context="\n\n".join(numbered), query=question.text)
