"""An index of a plan's declarations for its replay: tensors, operators by layer, and how often each tensor is made."""

from __future__ import annotations

from tightfit.planner.problem.clipping import accumulate_seconds, clipped_seconds
from tightfit.planner.problem.gradients import equal_passages, update_seconds
from tightfit.planner.problem.tensor_index import TensorIndex
from tightfit.planner.schema import MEZO, Phase, Plan
from tightfit.runtime.common.errors import InputError


class InvalidSchedule(InputError):  # noqa: N818  named by what it is about, like the rest of the tree
    """A plan that breaks an invariant and must not run; says which invariant, at which instruction, of which tensor."""

    def __init__(self, invariant: str, phase: str, instruction: int, tensor: str, text: str) -> None:
        where = f"{phase} instruction {instruction}" if instruction >= 0 else phase
        super().__init__(f"invalid schedule ({invariant}) at {where}, {tensor}: {text}; plan again from the profile")
        self.invariant = invariant
        self.phase = phase
        self.instruction = instruction
        self.tensor = tensor


class PlanIndex:
    """The plan's declarations, indexed for its replay. Raises InvalidSchedule where they contradict each other."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.device = plan.device
        self.instructions = sum(len(phase.instructions) for phase in (*plan.steps, *plan.beside))
        self.apart = plan.max_grad_norm is not None
        """whether gradients are clipped, so that a schedule of its own updates all trainables"""
        self.two_forwards = plan.optimizer.get("name") == MEZO
        try:
            index = TensorIndex(plan)
        except InputError as error:
            raise InvalidSchedule("form", "plan", -1, "layers", str(error)) from error
        self.tensors, self.inference, self.trainables = index.tensors, index.inference, index.states
        self.layers = {layer: (operators, index.names[layer]) for layer, operators in index.operators.items()}
        """layer -> (its operators, {value of its program: tensor})"""
        self.order = list(self.layers)
        trained = [tensor for tensor in plan.tensors if tensor.kind == "trainable"]
        updating = clipped_seconds if self.apart else update_seconds
        self.update_seconds = {tensor.name: updating(tensor, plan.optimizer) for tensor in trained}
        self.accumulate_seconds = {tensor.name: accumulate_seconds(tensor, plan.optimizer) for tensor in trained}
        """seconds of adding each gradient to its sum, where gradients are clipped"""
        self.passages = {above: (layer, below) for layer, (above, below) in equal_passages(plan).items() if below}
        """gradient of a layer's output -> (layer, gradient of its input), where the two have equal shapes"""

    def makers(self, phase: Phase) -> dict[str, int]:
        """Tensor -> how many operators make it, or add to it, in a phase, without recomputation."""
        result: dict[str, int] = {}
        for layer, (operators, names) in self.layers.items():
            for operator in operators:
                if operator.phase == "inference" or (operator.phase == "backward" and layer in phase.skipped):
                    continue
                for output in filter(None, operator.outputs):
                    result[names[output]] = result.get(names[output], 0) + 1
        return result
