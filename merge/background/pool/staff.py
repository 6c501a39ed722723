"""The workers of a Ray cluster: how many, what each is at, and what to do when one dies."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from merge.background.pool.failures import Failure
from merge.background.pool.resident import Answer, Resident
from merge.background.pool.schedule import Schedule
from merge.errors import list_first

MOST_TRIES = 3
_POLL_S = 0.2
_STEPS_S = 0.5
# How often more workers are looked for, where a cluster grows.
_HIRE_S = 10.0
# For a result to arrive that is there, and for workers to close.
_FETCH_S = 60.0
_CLOSE_S = 5.0
_SHOWN = 200


class FailedError(Exception):
    """A job, or the making of a worker, raised."""

    def __init__(self, failure: Failure, key: str) -> None:
        super().__init__(failure.text)
        self.failure = failure
        self.key = key


class LostError(Exception):
    """There is nobody who could do the work."""


def shorten(error: BaseException) -> str:
    """Return an error's text as one line; of a long one, where it begins and ends."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"


@dataclass(eq=False)
class Ticket:
    """A job that only a worker can read.

    Attributes:
        index: Its place in the call.
        key: Its name.
        group: Of jobs like it.
        job: The pickled job.
        tries: How many workers died of it.
        steps: How many of its steps home has heard of.
    """

    index: int
    key: str
    group: str
    job: bytes
    tries: int = 0
    steps: int = 0


@dataclass(eq=False)
class _Member:
    """One actor. `ref` is what it was asked for last: `hello`, then `make`, then jobs."""

    actor: Any
    ref: Any
    is_placed: bool = False
    is_made: bool = False
    ticket: Ticket | None = None
    group: str | None = None
    number: int = 0
    steps_ref: Any = None


class Staff:
    """Hires workers as far as there is work and room, and lets them do it."""

    def __init__(
        self,
        options: dict[str, Any],
        tell: Callable[..., None],
        is_over: Callable[[], bool],
    ) -> None:
        """Prepare for calls.

        Args:
            options: `workers`, `gpus`, `threads`, `patience_s`, `folder`, `imports`.
            tell: Called with a kind of message and its words.
            is_over: Tells whether home is gone, or goes.
        """
        self._options = options
        self._tell = tell
        self._is_over = is_over
        self._members: list[_Member] = []
        self._recipe: Any = None
        self._waiting: Schedule[Ticket] = Schedule(())
        self._failed_starts = 0
        self._last_sign = 0.0
        self._hired = 0.0
        self._asked_for_steps = 0.0
        self._number = 0
        self._shared: dict[int, Any] = {}

    def share(self, number: int, value: bytes) -> None:
        """Keep a value for the workers, under a number."""
        import ray

        self._shared[number] = ray.put(value)

    def renew(self, recipe: bytes) -> None:
        """Let all workers go: the next ones are made of something else."""
        import ray

        self.close_workers()
        self.dismiss()
        self._recipe = ray.put(recipe)

    def run(self, tickets: Sequence[Ticket]) -> None:
        """Run jobs until all are done, or home is gone."""
        import ray

        self._waiting = Schedule(tickets)
        self._last_sign = time.monotonic()
        self._hire()
        while (self._waiting or self._busy()) and not self._is_over():
            self._assign()
            refs = {member.ref: member for member in self._members if member.ref is not None}
            self._ask_for_steps()
            asked = {m.steps_ref: m for m in self._members if m.steps_ref is not None}
            ready, _ = ray.wait([*refs, *asked], num_returns=1, timeout=_POLL_S)
            for ref in ready:
                if ref in refs:
                    self._take_answer(refs[ref])
                else:
                    self._take_steps(asked[ref])
            self._check_patience()
            if time.monotonic() - self._hired > _HIRE_S:
                self._hire()

    def close_workers(self) -> None:
        """Ask the workers that have nothing to do to close."""
        import ray

        idle = [member.actor for member in self._members if member.is_made and not member.ref]
        if idle:
            with contextlib.suppress(ray.exceptions.RayError):
                closing = [actor.close.remote() for actor in idle]
                ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)

    def dismiss(self) -> None:
        """End all workers, whatever they do."""
        for member in self._members:
            _kill(member)
        self._members = []

    def _busy(self) -> list[_Member]:
        return [member for member in self._members if member.ticket is not None]

    def _hire(self) -> None:
        import ray

        self._hired = time.monotonic()
        room, needs = _room(self._options["gpus"], self._options["threads"])
        if not room and not self._members:
            what = "GPU" if needs.get("num_gpus") else "CPU"
            raise LostError(f"no node of the Ray cluster has a {what} for a worker")
        wanted = min(room, len(self._waiting) + len(self._busy()))
        if self._options["workers"]:
            wanted = min(wanted, self._options["workers"])
        variables = {}
        if self._options["imports"]:
            variables["PYTHONPATH"] = ":".join(self._options["imports"])
        if self._options["threads"]:
            count = str(self._options["threads"])
            variables |= {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        # The one who counts steps answers while the other works.
        kind = ray.remote(concurrency_groups={"steps": 1})(Resident).options(
            runtime_env={"env_vars": variables}, max_restarts=0, max_task_retries=0, **needs
        )
        while len(self._members) < wanted:
            actor = kind.remote(self._options["folder"])
            self._members.append(_Member(actor, actor.hello.remote()))

    def _assign(self) -> None:
        for member in self._members:
            if member.ref is not None or not member.is_made:
                continue
            taken = {m.ticket.group for m in self._members if m.ticket is not None}
            ticket = self._waiting.take(member.group, taken)
            if ticket is None:
                return
            self._number += 1
            member.ticket, member.group, member.number = ticket, ticket.group, self._number
            member.ref = member.actor.run.remote(self._number, ticket.job, self._shared)

    def _take_answer(self, member: _Member) -> None:
        import ray

        try:
            answer: Answer | None = ray.get(member.ref, timeout=_FETCH_S)
        except ray.exceptions.RayError as error:
            self._replace(member, error)
            return
        self._last_sign = time.monotonic()
        member.ref = None
        ticket, member.ticket = member.ticket, None
        if answer is None:
            member.is_placed = True
            member.ref = member.actor.make.remote(self._recipe)
        elif answer.failure is not None:
            raise FailedError(answer.failure, ticket.key if ticket else "")
        elif ticket is None:
            member.is_made = True
            self._failed_starts = 0
        else:
            self._tell_steps(ticket, answer.steps)
            self._tell("result", ticket.index, answer.value)

    def _replace(self, member: _Member, error: Exception) -> None:
        """Let a worker go that died, have its job done by another, and hire one if it fits."""
        _kill(member)
        self._members.remove(member)
        ticket = member.ticket
        if ticket is None:
            self._failed_starts += 1
            if self._failed_starts == MOST_TRIES:
                raise LostError(
                    f"{MOST_TRIES} workers could not start: {shorten(error)}"
                ) from error
        else:
            ticket.tries += 1
            if ticket.tries == MOST_TRIES:
                raise LostError(
                    f"job {ticket.key!r} was given up, its worker died {MOST_TRIES} times:"
                    f" {shorten(error)}"
                ) from error
            self._waiting.put_back(ticket)
        self._hire()

    def _ask_for_steps(self) -> None:
        if time.monotonic() - self._asked_for_steps < _STEPS_S:
            return
        self._asked_for_steps = time.monotonic()
        for member in self._busy():
            if member.steps_ref is None:
                ask = member.actor.steps.options(concurrency_group="steps")
                member.steps_ref = ask.remote()

    def _take_steps(self, member: _Member) -> None:
        import ray

        ref, member.steps_ref = member.steps_ref, None
        try:
            number, steps = ray.get(ref, timeout=_FETCH_S)
        except ray.exceptions.RayError:
            # What it was asked for first says so, too.
            return
        if member.ticket is not None and number == member.number:
            self._tell_steps(member.ticket, steps)

    def _tell_steps(self, ticket: Ticket, steps: int) -> None:
        # A second try does again what was counted.
        if steps > ticket.steps:
            self._tell("steps", steps - ticket.steps)
            ticket.steps = steps

    def _check_patience(self) -> None:
        patience = self._options["patience_s"]
        if any(member.is_placed for member in self._members):
            self._last_sign = time.monotonic()
        elif time.monotonic() - self._last_sign > patience:
            raise LostError(
                f"no worker found a place on the Ray cluster within {patience:g} s: {_use()}"
            )


def _kill(member: _Member) -> None:
    import ray

    with contextlib.suppress(Exception):
        ray.kill(member.actor, no_restart=True)


def _room(gpus: float | None, threads: int | None) -> tuple[int, dict[str, float]]:
    """Return how many workers the cluster has room for, and what each takes."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus is None:
        gpus = 1 if any(node.get("GPU") for node in nodes) else 0
    if gpus:
        return sum(int(node.get("GPU", 0) // gpus) for node in nodes), {
            "num_gpus": gpus,
            "num_cpus": 0,
        }
    most = int(max((node.get("CPU", 0) for node in nodes), default=0))
    cpus = max(1, min(threads or 1, most))
    return sum(int(node.get("CPU", 0) // cpus) for node in nodes), {"num_cpus": cpus, "num_gpus": 0}


def _use() -> str:
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    names = [name for name in ("GPU", "CPU") if name in total]
    return list_first([f"{free.get(n, 0):g} of {total[n]:g} {n}s are free" for n in names])
