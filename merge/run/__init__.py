"""The whole job: resolve, plan, merge, export, verify. The only room that knows all stages."""

from merge.run.model import Progress, RunResult
from merge.run.repetition import Reproduction, reproduce
from merge.run.stages import run_recipe

__all__ = ["Progress", "Reproduction", "RunResult", "reproduce", "run_recipe"]
