"""Names of an earlier layout; they go once nothing takes them from here."""

from w2sg.data.table import single_texts
from w2sg.experiment.fit_text import one_tokenizer, one_vocabulary
from w2sg.experiment.run import Run
from w2sg.models.trained import Trained as Writer
from w2sg.models.trained import reading_as


def TextRun(run: Run) -> Run:
    return run


def write(self, name, writer, prompts, sampling, settings=None, reference=None, samples=1, engine=None):
    return self.generate(name, writer, prompts, sampling, settings, reference, samples)


Run.run = property(lambda self: self)
Run.write, Run.sample = write, Run.generate
Run.supervise, Run.prefer, Run.follow, Run.read_replies = Run.sft, Run.dpo, Run.wspo, Run.score

__all__ = ["TextRun", "Writer", "one_tokenizer", "one_vocabulary", "reading_as", "single_texts"]
