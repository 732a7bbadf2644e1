from local_attention.training.profile import operator_times

TABLE = """op_type,type_occurrences,execution_frequency(per-step),total_compute_time,avg_time(ms),percent
Add,6,2,3.0,0.5,25
MatMul,12,4,9.0,0.75,75
"""


def test_operator_times_are_those_of_one_step_the_longest_first():
    assert operator_times(TABLE, 3) == [("MatMul", 4.0, 3.0, 0.75), ("Add", 2.0, 1.0, 0.25)]


def test_no_operators_are_an_empty_table():
    assert operator_times(TABLE.splitlines()[0], 3) == []
