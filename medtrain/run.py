"""Run: one directory, and the only place that knows what a file in it is called.

<output_dir>/<name>/
  config.yaml  manifest.json  stages/     resolved config; lineage; one receipt a finished stage
  data/                                   splits, tokenizer, data card, rejected rows
  sft/ dpo/                               adapter, merged, checkpoints; dpo/reference.jsonl
  generate/ judge/ evaluate/              shard directories and what was collected from them
  preferences.jsonl  report/  logs/
  submissions/  jobs/                     on Slurm: what was submitted; scripts and logs of jobs
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medtrain import locks
from medtrain.errors import ConfigError

_SUBMITTING_WAIT_S = 300.0

Trained = Literal["sft", "dpo"]


@dataclass(frozen=True)
class Run:
    """The names of a run's artefacts. It creates directories; it reads and writes no artefact."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name: its directory's."""
        return self.root.resolve().name

    # Lineage

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Lineage: versions, seeds, and every stage's settings, inputs and outputs."""
        return self.root / "manifest.json"

    @property
    def stages(self) -> Path:
        """Receipts of stages, one file each."""
        return self.root / "stages"

    @property
    def source_hashes(self) -> Path:
        """Sizes, times and hashes of the data files, so that unchanged ones are not read again."""
        return self.root / ".source_hashes.json"

    # Data

    @property
    def data(self) -> Path:
        """Everything `prepare` writes."""
        return self.root / "data"

    @property
    def train_rows(self) -> Path:
        """Training rows."""
        return self.data / "train.jsonl"

    @property
    def preference_prompts(self) -> Path:
        """Rows whose prompts are answered by `generate`."""
        return self.data / "preferences_prompts.jsonl"

    @property
    def ready_preferences(self) -> Path:
        """Ready-made preference rows."""
        return self.data / "preferences_ready.jsonl"

    @property
    def eval_rows(self) -> Path:
        """Evaluation rows."""
        return self.data / "eval.jsonl"

    @property
    def rejected_rows(self) -> Path:
        """Rows that were not used, each with its reason."""
        return self.data / "rejected.jsonl"

    @property
    def data_card(self) -> Path:
        """Counts, drops, hashes and licences of the data, as JSON."""
        return self.data / "card.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of every stage: the base's, with the chat format's tokens added."""
        return self.data / "tokenizer"

    # Training

    @property
    def built_base(self) -> Path:
        """The base that `builtin:tiny` builds."""
        return self.data / "base"

    def trained(self, stage: Trained) -> Path:
        """Everything a training stage owns."""
        return self.root / stage

    def adapter(self, stage: Trained) -> Path:
        """The trained adapter."""
        return self.root / stage / "adapter"

    def merged(self, stage: Trained) -> Path:
        """The plain model directory."""
        return self.root / stage / "merged"

    def checkpoints(self, stage: Trained) -> Path:
        """The trainer's checkpoints."""
        return self.root / stage / "checkpoints"

    def metrics(self, stage: Trained) -> Path:
        """The training metrics of a stage, one JSON object a line."""
        return self.logs / f"{stage}.metrics.jsonl"

    # Answers and verdicts

    @property
    def generate(self) -> Path:
        """Shards of candidate answers."""
        return self.root / "generate"

    @property
    def candidates(self) -> Path:
        """Collected candidate answers."""
        return self.generate / "candidates.jsonl"

    @property
    def judge(self) -> Path:
        """Shards of verdicts on candidate pairs."""
        return self.root / "judge"

    @property
    def verdicts(self) -> Path:
        """Collected verdicts."""
        return self.judge / "verdicts.jsonl"

    @property
    def pairs(self) -> Path:
        """What `pairs` writes besides the preferences: the pairs it left out, and counts."""
        return self.root / "pairs"

    @property
    def dropped_pairs(self) -> Path:
        """Pairs that were left out of training, each with its reason."""
        return self.pairs / "dropped.jsonl"

    @property
    def preferences(self) -> Path:
        """prompt / chosen / rejected rows for DPO."""
        return self.root / "preferences.jsonl"

    @property
    def reference_shards(self) -> Path:
        """Shards of the reference's log-probabilities."""
        return self.root / "dpo" / "reference"

    @property
    def reference(self) -> Path:
        """What DPO's reference makes of both answers of every preference pair."""
        return self.root / "dpo" / "reference.jsonl"

    # Evaluation

    @property
    def evaluate(self) -> Path:
        """Everything `evaluate` writes."""
        return self.root / "evaluate"

    def answers_shards(self, variant: str) -> Path:
        """Shards of one variant's answers."""
        return self.evaluate / variant

    def answers(self, variant: str) -> Path:
        """One variant's collected answers."""
        return self.evaluate / variant / "answers.jsonl"

    def loss_shards(self, variant: str) -> Path:
        """Shards of one variant's loss on the reference answers."""
        return self.evaluate / variant / "loss"

    def held_out_loss(self, variant: str) -> Path:
        """One variant's collected loss on the reference answers."""
        return self.evaluate / variant / "loss.jsonl"

    def evaluate_judge(self, protocol: str) -> Path:
        """Shards of one judging protocol (`rubric`, `rating`, `pairwise`) over all variants."""
        return self.evaluate / "judge" / protocol

    def evaluate_verdicts(self, protocol: str) -> Path:
        """Collected verdicts of one judging protocol."""
        return self.evaluate_judge(protocol) / "verdicts.jsonl"

    @property
    def scores(self) -> Path:
        """All measures of all variants, as JSON."""
        return self.evaluate / "scores.json"

    @property
    def evaluation_rows(self) -> Path:
        """Every question with every variant's answer, measures and verdicts, as JSON lines."""
        return self.evaluate / "rows.jsonl"

    # Report

    @property
    def report(self) -> Path:
        """The report: index.html, report.md, report.json, figures, model card."""
        return self.root / "report"

    @property
    def logs(self) -> Path:
        """One file a job or stage."""
        return self.root / "logs"

    @property
    def log(self) -> Path:
        """Every event of the run, one key=value line each."""
        return self.logs / "run.log"

    # Jobs

    @property
    def submissions(self) -> Path:
        """What was submitted to Slurm: an intent and a note of its job ids for each."""
        return self.root / "submissions"

    def job_folder(self, key: str, number: int) -> Path:
        """Scripts, arguments and logs of one submission."""
        return self.root / "jobs" / f"{key}.{number:03d}"

    # The directory itself

    @property
    def lock_files(self) -> tuple[Path, Path]:
        """Held by whoever computes here, and by training that it launched."""
        return self.root / ".lock", self.root / ".lock.launched"

    def create(self) -> None:
        """Make the directory, closed to writers other than its owner and group.

        Raises:
            ConfigError: it cannot be made there, or it exists and every user of the machine may
                write to it.
        """
        try:
            self._create()
        except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(
                f"The run directory {self.root} cannot be made ({error.filename}: "
                f"{error.strerror})",
                fix="Choose another output_dir.",
            ) from error

    def _create(self) -> None:
        if not self.root.exists():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o750, exist_ok=True)
        elif self.root.stat().st_mode & 0o002:
            raise ConfigError(
                f"Every user of this machine may write to {self.root}",
                fix=f"chmod o-w {self.root}",
            )
        for directory in (self.stages, self.logs):
            directory.mkdir(exist_ok=True)

    def lock(self, *, wait_s: float = 0.0) -> AbstractContextManager[None]:
        """Hold the directory for one `medtrain run`; the kernel lets go when the process dies.

        Raises (when entered):
            TryAgainError: another process holds it, and has held it for `wait_s` seconds.
        """
        return locks.computing(self.root, *self.lock_files, wait_s=wait_s)

    def submitting(self) -> AbstractContextManager[None]:
        """Hold the right to submit jobs of this run; waits a while for whoever has it.

        Raises (when entered):
            TryAgainError: another process has held it for minutes.
        """
        return locks.waiting(self.root / ".lock.submit", _SUBMITTING_WAIT_S)

    def lock_environment(self) -> dict[str, str]:
        """Environment for a child process that works under this process's lock."""
        return locks.environment(self.root)
