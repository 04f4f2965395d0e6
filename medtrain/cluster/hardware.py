"""What the jobs of a run compute with: the base's size, and the GPUs that each kind of job gets.

model.base → architecture and parameters; `cluster:` → GPU type and number for a kind of job →
bytes of a weight, seconds of loading, and for a training stage how it would be launched there.
"""

from __future__ import annotations

from medtrain.cluster.site import resources_of
from medtrain.config import JobKind, RunConfig
from medtrain.gpus import DEFAULT_GPU, LOAD_BYTES_PER_S, START_S, Gpu, gpu_of, parameters_of
from medtrain.memory import Choice, architecture_of, choose_strategy
from medtrain.run import Run, Trained


class Hardware:
    """Of one run."""

    def __init__(self, run: Run, config: RunConfig) -> None:
        self._config = config
        built_in = config.model.base.startswith("builtin:")
        self.architecture = architecture_of(config, run.built_base if built_in else None)
        self.parameters = None if built_in else self._count()
        """Of the base; None where nobody knows, or where nobody counts."""

    def gpu(self, kind: JobKind) -> Gpu:
        """The GPU that a kind of job gets, or is taken to get."""
        return gpu_of(resources_of(self._config, kind)) or DEFAULT_GPU

    def gpus(self, kind: JobKind) -> int:
        """GPUs of one job of a kind, on all its nodes."""
        wanted = resources_of(self._config, kind)
        return (wanted.gpus or 0) * (wanted.nodes or 1)

    def processes(self, stage: Trained) -> int:
        """Processes of a training on GPUs, on all nodes together; 0 without GPUs."""
        wanted, each = resources_of(self._config, stage), self._config.train.processes
        of_a_node = wanted.gpus or 0
        if each != "auto":
            of_a_node = min(of_a_node, each)
        return of_a_node * (wanted.nodes or 1)

    def choice(self, stage: Trained) -> Choice:
        """How a training stage would be launched on the GPUs that its job asks for."""
        gpu = self.gpu(stage)
        return choose_strategy(
            self._config,
            stage,
            gpus=self.processes(stage),
            gpu_bytes=gpu.memory_bytes,
            architecture=self.architecture,
            auto_bytes=gpu.auto_bytes,
        )

    def bytes_each(self, kind: JobKind) -> int:
        """Of a weight that is not quantised."""
        if self._config.model.dtype == "auto":
            return self.gpu(kind).auto_bytes
        return 4 if self._config.model.dtype == "float32" else 2

    def load_s(self, kind: JobKind, parameters: float | None = None) -> float:
        """Seconds until a model is loaded; None takes the base."""
        weights = (parameters or self.parameters or 0.0) * self.bytes_each(kind)
        return START_S + weights / LOAD_BYTES_PER_S

    def _count(self) -> float | None:
        if self.architecture is not None:
            return float(self.architecture.parameters.total)
        return parameters_of(self._config.model.base)
