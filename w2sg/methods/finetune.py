"""Fine-tuning the strong model on the weak model's labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from w2sg.methods import checks

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run
    from w2sg.reports.assemble import Report


def problems(config: TrainConfig) -> list[str]:
    """Conflicts between this method's options and the rest of the configuration."""
    return checks.label_problems(config)


def finetune(run: Run, ceiling_split: Literal["transfer", "weak_train"] = "transfer") -> Report:
    """Train the weak model on ground truth, label with it, train the strong model on these labels.

    Burns et al. 2023 (arXiv 2312.09390); with reverse losses, arXiv 2502.11107.

    Args:
        ceiling_split: split whose ground truth trains the ceiling: transfer (as in openai's first script and
            EleutherAI/w2s: the student's own rows) or weak_train (as in openai's sweep and the deception code). PGR
            depends on it; the report says which.
    """
    data = run.data
    weak = run.fit("weak", run.weak, data.ground_truth, run.gold(data.ground_truth))
    labels = run.noisy(run.predict(weak, data.transfer))
    student = run.fit("student", run.strong, data.transfer, labels, loss=run.loss)
    ceiling = run.ceiling(ceiling_split)
    return run.report(
        weak=run.predict(weak, data.test),
        student=run.predict(student, data.test),
        ceiling=run.predict(ceiling, data.test),
        taught=(labels, run.predict(student, data.transfer)),
        notes={"ceiling_split": ceiling_split},
    )
