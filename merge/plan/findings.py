"""What planning finds out about a recipe and its models, collected and told together."""

from __future__ import annotations

from dataclasses import dataclass, field

from merge.plan.model import LeftOut


@dataclass(frozen=True, slots=True)
class Findings:
    """Lines for the user, in the order found.

    Attributes:
        problems: What does not fit; with one of these there is no plan.
        warnings: What a user should decide or mend, although the run goes on.
        notes: What a user should know before running.
        left_out: Keys of inputs that are not used, each with its reason.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def problem(self, line: str) -> None:
        """Say what does not fit."""
        self.problems.append(line)
