"""From steps to jobs: whatever is chosen, held or done, every step is done once and in order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.cluster.chain import ChainJob, plan_chain, steps_of
from medtrain.cluster.ledger import Step
from medtrain.config import RunConfig, parse_config
from medtrain.stages import STAGES


def config_of(*, shards: int = 3, **sections: dict[str, object]) -> RunConfig:
    tree: dict[str, dict[str, object]] = {
        "model": {"base": "builtin:tiny"},
        "data": {"sources": [{"adapter": "table", "path": "rows.jsonl"}]},
        "generate": {"num_shards": shards},
        "judge": {"kind": "rules", "num_shards": shards},
        "evaluate": {"num_shards": shards},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config({"name": "r", **tree})


JUDGED = {"rubric": True, "rating": False, "pairwise": True}
CONFIGS = st.builds(
    config_of,
    shards=st.integers(1, 9),
    dpo=st.sampled_from([{}, {"reference_shards": 4}, {"method": "orpo"}]),
    evaluate=st.sampled_from([{}, JUDGED, {"held_out_loss": False}, {"variants": ["base"]}]),
)
PLACES = st.tuples(st.integers(0, len(STAGES) - 1), st.integers(0, len(STAGES) - 1)).map(sorted)


@st.composite
def partly_held(draw: st.DrawFn) -> tuple[RunConfig, list[Step], dict[Step, str]]:
    """A configuration, chosen steps, and the jobs of an earlier chain that are still queued."""
    config, (first, last) = draw(CONFIGS), draw(PLACES)
    steps = steps_of(STAGES[first : last + 1], config)
    jobs = plan_chain(steps_of(STAGES, config), config)
    held = draw(st.lists(st.sampled_from(jobs), unique_by=lambda job: job.key))
    holders = {step: job.key for job in held for step in job.steps}
    return config, steps, {step: key for step, key in holders.items() if step in steps}


def keys(jobs: Sequence[ChainJob]) -> list[str]:
    return [job.key for job in jobs]


@given(partly_held())
def test_every_step_is_done_once(drawn: tuple[RunConfig, list[Step], dict[Step, str]]) -> None:
    config, steps, holders = drawn
    jobs = plan_chain(steps, config, holders)
    done = [step for job in jobs for step in job.steps]
    assert done == [step for step in steps if step not in holders], "in order, none twice"
    assert len(set(keys(jobs))) == len(jobs)
    assert not set(keys(jobs)) & set(holders.values())


@given(partly_held())
def test_each_job_waits_for_the_one_that_does_the_step_before(
    drawn: tuple[RunConfig, list[Step], dict[Step, str]],
) -> None:
    config, steps, holders = drawn
    jobs = plan_chain(steps, config, holders)
    who = {**holders, **{step: job.key for job in jobs for step in job.steps}}
    for job in jobs:
        place = steps.index(job.steps[0])
        if place == 0:
            assert job.after == ()
            continue
        before = steps[place - 1]
        # Missing shards are repaired by who collects; a stage that failed ends the chain.
        condition = "afterany" if before[0] == "shards" else "afterok"
        assert job.after == ((who[before], condition),)


@given(partly_held())
def test_training_and_arrays_are_jobs_of_their_own(
    drawn: tuple[RunConfig, list[Step], dict[Step, str]],
) -> None:
    for job in plan_chain(drawn[1], drawn[0], drawn[2]):
        verbs = {verb for verb, _, _ in job.steps}
        if verbs & {"train", "shards"}:
            assert len(job.steps) == 1
        assert job.trains == (verbs == {"train"})
        assert bool(job.tasks) == (verbs == {"shards"})
        kinds = {stage for verb, stage, _ in job.steps if verb == "run"}
        assert (job.kind == "merge") == any(stage.startswith("merge") for stage in kinds)


@given(CONFIGS)
def test_an_array_holds_every_shard_once(config: RunConfig) -> None:
    for job in plan_chain(steps_of(STAGES, config), config):
        units = [unit for task in job.tasks for unit in task]
        assert len(set(units)) == len(units)
        per_set: dict[str, set[int]] = {}
        for key, shard in units:
            per_set.setdefault(key, set()).add(shard)
        whole = config.judge.num_shards if job.kind != "reference" else config.dpo.reference_shards
        assert all(shards == set(range(whole)) for shards in per_set.values())


def test_the_chain_of_a_whole_run() -> None:
    config = config_of(evaluate=JUDGED, dpo={"reference_shards": 2})
    jobs = plan_chain(steps_of(STAGES, config), config)
    assert [(job.key, job.kind, len(job.tasks)) for job in jobs] == [
        ("prepare", "cpu", 0),
        ("sft", "sft", 0),
        ("merge-sft", "merge", 0),
        ("generate.candidates", "generate", 3),
        ("generate.candidates.close", "cpu", 0),
        ("judge.verdicts", "judge", 3),
        ("judge.verdicts.close", "cpu", 0),
        ("reference.sums", "reference", 2),
        ("reference.sums.close", "cpu", 0),
        ("dpo", "dpo", 0),
        ("merge-dpo", "merge", 0),
        ("evaluate.answers", "evaluate", 9),
        ("evaluate.answers.close", "cpu", 0),
        ("evaluate.verdicts", "judge", 6),
        ("evaluate.verdicts.close", "cpu", 0),
    ]
    assert jobs[2].steps == (("run", "merge-sft", ""), ("open", "generate", "candidates"))
    assert [step[0] for step in jobs[-1].steps] == ["close", "run"]


def test_a_chain_without_a_reference() -> None:
    """Pairs are followed by training at once."""
    config = config_of(dpo={"method": "orpo"})
    jobs = plan_chain(steps_of(STAGES, config), config)
    assert [job.key for job in jobs][5:8] == ["judge.verdicts", "judge.verdicts.close", "dpo"]
    assert ("run", "reference", "") not in [step for job in jobs for step in job.steps]


def test_a_job_of_the_old_chain_may_be_lost_from_its_middle() -> None:
    """Its steps are given to a new job, and what follows it, still queued, is left alone."""
    config = config_of()
    steps = steps_of(STAGES, config)
    jobs = plan_chain(steps, config)
    holders = {step: job.key for job in jobs if job.key != "merge-sft" for step in job.steps}
    again = plan_chain(steps, config, holders)
    assert keys(again) == ["merge-sft"]
    assert again[0].after == (("sft", "afterok"),)


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_one_stage_alone(stage: str) -> None:
    config = config_of()
    row = next(s for s in STAGES if s.name == stage)
    jobs = plan_chain(steps_of([row], config), config)
    assert jobs[0].after == ()
    assert {s for job in jobs for _, s, _ in job.steps} == {stage}
