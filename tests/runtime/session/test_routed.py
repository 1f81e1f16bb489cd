"""Which reads of experts' matrices a job may leave out."""

from __future__ import annotations

import pytest
from reference import MIXTURE
from tiny_plans import decoder_profile

from tightfit.planner.plan import plan
from tightfit.planner.problem.tensor_index import TensorIndex
from tightfit.planner.schema import Plan
from tightfit.runtime.engine.training.job import EXPERTS_AT
from tightfit.runtime.engine.training.routing import WIDTH
from tightfit.runtime.session.job_compiler import _number_tensors, _routed


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Nothing stays between steps."""
    made = decoder_profile(tmp_path_factory.mktemp("mixture"), config=MIXTURE, batch=2, seq=24, matrix_rows=48)
    return plan(made, 1 << 30, policy="mebp")


def entries(made: Plan) -> list[int]:
    index = TensorIndex(made)
    return _routed(made, index, _number_tensors(made, index)[0])


@pytest.mark.slow
def test_each_matrix_of_an_expert_is_told_with_its_expert(streamed: Plan) -> None:
    weights = [tensor.name for tensor in streamed.tensors if tensor.kind == "weight"]
    told = entries(streamed)
    found = {weights[told[start]]: told[start + 1 : start + 3] for start in range(0, len(told), WIDTH)}
    experts = [name for name in weights if ".experts." in name]
    assert len(experts) == 2 * MIXTURE["num_experts"] * 2  # of two matrices, in two layers
    assert found.keys() == set(experts)
    assert found["model.layers.2.mlp.experts.gate_up_proj[96:144]"] == [2, 1]
    assert found["model.layers.2.mlp.experts.down_proj[320:384]"] == [5, 1]


@pytest.mark.parametrize("part", ["some columns", "another order"])
def test_nothing_is_left_out_where_the_chosen_experts_are_a_part_of_a_tensor(streamed: Plan, part: str) -> None:
    """Their numbers do not lie one after the other from the start of it."""
    other = streamed.model_copy(deep=True)
    for program in other.programs:
        for operator in program.operators:
            if operator.target in EXPERTS_AT:
                operand = operator.args[EXPERTS_AT[operator.target][0]]["operand"]
                if part == "some columns":
                    operand["size"] = [operand["size"][0], 1]
                else:
                    operand["stride"] = [1, operand["size"][0]]
    assert entries(streamed)
    assert entries(other) == []
