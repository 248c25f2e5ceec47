"""Tasks against a sort by hand, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq.continual import tasks_by_class, tasks_by_key, tasks_by_time


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    keys=st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    data=st.data(),
    held_out=st.sampled_from([0.0, 0.3, 0.9]),
    order=st.sampled_from(["sorted", "given"]),
)
def test_every_row_is_in_one_task_and_tasks_follow_the_key(keys, data, held_out, order):
    num_tasks = data.draw(st.integers(1, len(keys)))
    key = torch.tensor(keys)
    x = torch.arange(len(keys)).double()
    stream = tasks_by_key(x, -x, num_tasks, key=key, held_out=held_out, generator=generator(), order=order)
    assert len(stream) == num_tasks
    all_rows = torch.cat([torch.cat([task.rows, task.test_rows]) for task in stream])
    assert sorted(all_rows.tolist()) == list(range(len(keys)))
    # Python's sort is stable, and numpy's way to cut gives the first parts one row more.
    in_order = sorted(range(len(keys)), key=lambda row: keys[row])
    sizes = [len(keys) // num_tasks + (number < len(keys) % num_tasks) for number in range(num_tasks)]
    for number, task in enumerate(stream):
        expected = in_order[sum(sizes[:number]) : sum(sizes[: number + 1])]
        assert sorted(torch.cat([task.rows, task.test_rows]).tolist()) == sorted(expected)
        assert len(task.test_rows) == min(round(held_out * len(expected)), len(expected) - 1)
        wanted = expected if order == "sorted" else sorted(expected)
        for part in (task.rows.tolist(), task.test_rows.tolist()):
            assert part == [row for row in wanted if row in part]
        for values, sign, rows in ((task.x, 1, task.rows), (task.y, -1, task.rows), (task.x_test, 1, task.test_rows)):
            assert values.tolist() == [sign * row for row in rows.tolist()]
        assert task.y_test.tolist() == [-row for row in task.test_rows.tolist()]


def test_keys_are_columns_norms_functions_or_tensors(dtype):
    x = torch.randn(40, 3, dtype=dtype)
    y = torch.arange(40)
    keys = {
        "column": (1, x[:, 1]),
        "last column": (-1, x[:, 2]),
        "norm": ("norm", x.norm(dim=-1)),
        "function": (lambda x: x.sum(-1), x.sum(-1)),
        "tensor": (x.prod(-1), x.prod(-1)),
    }
    for name, (key, values) in keys.items():
        tasks = tasks_by_key(x, y, 4, key=key)
        assert torch.cat([task.y for task in tasks]).tolist() == values.argsort(stable=True).tolist(), name
        assert tasks[0].x.dtype == dtype


def test_inputs_may_have_no_column_axis_or_many():
    x = torch.tensor([3.0, -1.0, 2.0])
    assert torch.cat([task.x for task in tasks_by_key(x, x, 3)]).tolist() == [-1, 2, 3]
    assert torch.cat([task.x for task in tasks_by_key(x, x, 3, key="norm")]).tolist() == [-1, 2, 3]
    images = torch.rand(6, 4, 4)
    tasks = tasks_by_key(images, torch.arange(6), 2, key="norm")
    assert torch.cat([task.y for task in tasks]).tolist() == images.flatten(1).norm(dim=-1).argsort().tolist()
    with pytest.raises(ValueError, match=r"key: expected a column of x of shape \(6, 4, 4\), got 0"):
        tasks_by_key(images, torch.arange(6), 2)


def test_a_test_set_is_cut_by_the_same_rule():
    x = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
    x_test = torch.tensor([11.5, -5.0, 5.0, 10.0, 99.0])
    tasks = tasks_by_key(x, x, 2, test=(x_test, 2 * x_test))
    assert [task.x_test.tolist() for task in tasks] == [[-5, 5], [10, 11.5, 99]]
    assert [task.y_test.tolist() for task in tasks] == [[-10, 10], [20, 23, 198]]
    assert tasks[1].test_rows.tolist() == [3, 0, 4]
    given_order = tasks_by_key(x, x, 2, test=(x_test, x_test), order="given")
    assert given_order[1].test_rows.tolist() == [0, 3, 4]
    by_tensor = tasks_by_key(x, x, 2, key=-x, test=(x_test, x_test, -x_test))
    assert [task.x_test.tolist() for task in by_tensor] == [[99, 11.5, 10, 5], [-5]]
    with pytest.raises(ValueError, match=r"test: expected \(x_test, y_test, key of the test rows\), got 2 parts"):
        tasks_by_key(x, x, 2, key=-x, test=(x_test, x_test))
    with pytest.raises(ValueError, match="held_out: expected 0 with a test set that is given"):
        tasks_by_key(x, x, 2, held_out=0.5, test=(x_test, x_test))


def test_rows_cut_further_arrays_in_the_same_way():
    x, station = torch.rand(20), torch.arange(20)
    tasks = tasks_by_key(x, x, 3, held_out=0.25, generator=generator())
    for task in tasks:
        torch.testing.assert_close(x[station[task.rows]], task.x)
        torch.testing.assert_close(x[station[task.test_rows]], task.x_test)


def test_held_out_rows_follow_the_generator_and_nothing_is_seeded():
    x = torch.rand(60)
    draws = [tasks_by_key(x, x, 3, held_out=0.5, generator=generator(7))[0].test_rows for _ in range(2)]
    assert torch.equal(*draws)
    before = torch.get_rng_state()
    tasks_by_key(x, x, 3, held_out=0.5, generator=generator(7))
    assert torch.equal(torch.get_rng_state(), before)
    plain = [tasks_by_key(x, x, 3, held_out=0.5)[0].test_rows for _ in range(2)]
    assert not torch.equal(*plain)


def test_a_slice_of_a_stream_is_a_stream():
    x = torch.arange(10.0)
    tasks = tasks_by_key(x, x, 5)
    assert tasks[1:3].names == ("task 2", "task 3")
    assert tasks[-1].x.tolist() == [8, 9]
    assert [task.name for task in reversed(tasks)] == [f"task {n}" for n in (5, 4, 3, 2, 1)]
    with pytest.raises(IndexError):
        tasks[5]


@given(
    times=st.lists(st.floats(-5, 5), min_size=2, max_size=30).filter(lambda times: max(times) > min(times) + 1e-3),
    num_tasks=st.integers(1, 4),
)
def test_equal_intervals_of_time(times, num_tasks):
    t = torch.tensor(times, dtype=torch.float64)
    num_tasks = min(num_tasks, len(times))
    tasks = tasks_by_time(t, t, t, num_tasks, empty="keep")
    edges = torch.linspace(t.min(), t.max(), num_tasks + 1, dtype=torch.float64).tolist()
    for number, task in enumerate(tasks):
        low, high, last = edges[number], edges[number + 1], number == num_tasks - 1
        expected = [value for value in times if low <= value and (value < high or (last and value <= high))]
        assert task.x.tolist() == sorted(expected)


def test_edges_cut_and_empty_intervals_are_named_kept_or_dropped():
    t = torch.tensor([0.5, 2.5, 0.1, 3.0])
    arguments = {"t": t, "x": t, "y": -t, "edges": [0.0, 1.0, 2.0, 3.0]}
    with pytest.raises(ValueError, match="tasks: '1 to 2' of 3 tasks have no data to learn"):
        tasks_by_time(**arguments)
    kept = tasks_by_time(**arguments, empty="keep", held_out=0.5)
    assert [len(task.y) for task in kept] == [1, 0, 1]
    assert [len(task.y_test) for task in kept] == [1, 0, 1]
    dropped = tasks_by_time(**arguments, empty="drop")
    assert dropped.names == ("0 to 1", "2 to 3")
    assert dropped[0].x.tolist() == torch.tensor([0.1, 0.5]).tolist()
    assert tasks_by_time(**arguments, empty="drop", order="given")[0].rows.tolist() == [0, 2]
    tests = tasks_by_time(**arguments, empty="drop", test=(t, t, torch.tensor([0.0, 1.5, 2.0, 2.9])))
    assert [task.test_rows.tolist() for task in tests] == [[0], [2, 3]]
    everything = tasks_by_time(t, t, t, edges=[-math.inf, 1.0, math.inf])
    assert [len(task.y) for task in everything] == [2, 2]


def test_test_rows_beyond_equal_intervals_belong_to_the_ends():
    t = torch.tensor([0.0, 1.0, 2.0, 3.0])
    tasks = tasks_by_time(t, t, t, 2, test=(t, t, torch.tensor([-9.0, 1.0, 2.0, 50.0])))
    assert [task.test_rows.tolist() for task in tasks] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("labels", [torch.int64, torch.float32, torch.float64])
def test_classes_in_the_order_of_the_rows(labels):
    y = torch.tensor([3, 0, 9, 1, 0, 2, 3, 1]).to(labels)
    x = torch.arange(8.0)
    y_test = torch.tensor([2, 9, 1]).to(labels)
    tasks = tasks_by_class(x, y, ((2, 3), (0, 1)), test=(x[:3], y_test))
    assert [task.rows.tolist() for task in tasks] == [[0, 5, 6], [1, 3, 4, 7]]
    assert [task.test_rows.tolist() for task in tasks] == [[0], [2]]
    assert tasks.names == ("2, 3", "0, 1")
    held = tasks_by_class(x, y, ((2, 3), (0, 1)), held_out=0.5, generator=generator())
    assert [(len(task.rows), len(task.test_rows)) for task in held] == [(1, 2), (2, 2)]


X = torch.arange(6.0)
NAN = torch.tensor([0.0, 1.0, math.nan, 3.0, math.nan, 5.0])
BAD = {
    "lengths": (lambda: tasks_by_key(X, X[:5], 2), "y: expected 6 rows, as x has, got 5"),
    "no rows": (lambda: tasks_by_key(X[:0], X[:0], 1), "x: expected at least one row"),
    "scalar": (lambda: tasks_by_key(X[0], X, 1), "x: expected at least one dimension"),
    "more tasks than rows": (lambda: tasks_by_key(X, X, 7), "num_tasks: expected at most one for each of 6 rows"),
    "no tasks": (lambda: tasks_by_key(X, X, 0), "num_tasks: expected at least 1, got 0"),
    "NaN key": (lambda: tasks_by_key(X, X, 2, key=NAN), "key: expected numbers, got NaN in 2 of 6 rows"),
    "key length": (lambda: tasks_by_key(X, X, 2, key=X[:3]), r"key: expected one number for each of 6 rows.*\(3,\)"),
    "key column": (lambda: tasks_by_key(X, X, 2, key=1), r"key: expected a column of x of shape \(6,\), got 1"),
    "key name": (lambda: tasks_by_key(X, X, 2, key="size"), "key: expected a column, 'norm', .* got 'size'"),
    "key shape": (lambda: tasks_by_key(X, X, 2, key=lambda x: x.sum()), r"key: .* got shape \(\)"),
    "order": (lambda: tasks_by_key(X, X, 2, order="random"), "order: expected one of"),
    "fraction": (lambda: tasks_by_key(X, X, 2, held_out=1.0), r"held_out: expected a fraction in \[0, 1\), got 1.0"),
    "negative fraction": (lambda: tasks_by_key(X, X, 2, held_out=-0.5), "held_out: expected a fraction"),
    "NaN time": (lambda: tasks_by_time(NAN, X, X, 2), "t: expected numbers, got NaN in 2 of 6 rows"),
    "neither": (lambda: tasks_by_time(X, X, X), "edges: expected either num_tasks or edges, got none"),
    "both": (lambda: tasks_by_time(X, X, X, 2, edges=[0, 9]), "edges: .* got both"),
    "edges": (lambda: tasks_by_time(X, X, X, edges=[0.0, 3.0, 3.0]), "edges: expected at least two increasing"),
    "NaN edge": (lambda: tasks_by_time(X, X, X, edges=[0.0, math.nan]), "edges: expected at least two increasing"),
    "edges in columns": (
        lambda: tasks_by_time(X, X, X, edges=torch.tensor([[0.0], [9.0]])),
        "edges: expected at least",
    ),
    "edges as text": (lambda: tasks_by_time(X, X, X, edges=["0", "9"]), "edges: expected at least two increasing"),
    "one edge": (lambda: tasks_by_time(X, X, X, edges=[0.0]), "edges: expected at least two increasing"),
    "outside": (lambda: tasks_by_time(X, X, X, edges=[1.0, 4.0]), "t: .* got 0; 2 of 6 rows lie outside"),
    "infinite": (lambda: tasks_by_time(X / 0, X, X, 1), "t: expected numbers, got NaN in 1"),
    "infinite span": (lambda: tasks_by_time((X + 1) / 0, X, X, 1), "t: expected finite times"),
    "empty": (lambda: tasks_by_time(X, X, X, 2, empty="skip"), "empty: expected one of"),
    "gap": (lambda: tasks_by_time(X**4, X, X, 5), "tasks: '125 to 250', .* of 5 tasks have no data"),
    "test parts": (lambda: tasks_by_time(X, X, X, 2, test=(X, X)), "t of the test rows"),
    "test lengths": (lambda: tasks_by_key(X, X, 2, test=(X, X[:2])), "y_test: expected 6 rows, as x_test has"),
    "test kind": (lambda: tasks_by_key(X, X, 2, test=X), "test: expected .* got Tensor"),
    "unknown class": (lambda: tasks_by_class(X, X, ((0, 1), (7,))), "classes: no row of y has class 7; there are 0, 1"),
    "twice": (lambda: tasks_by_class(X, X, ((0, 1), (1, 2))), "classes: expected each class in one task, got class 1"),
    "no class": (lambda: tasks_by_class(X, X, ((0, 1), ())), "classes: expected one class or more for each task"),
    "no classes": (lambda: tasks_by_class(X, X, ()), "classes: expected one class or more"),
    "NaN label": (lambda: tasks_by_class(X, NAN, ((0, 1),)), "y: expected numbers, got NaN in 2 of 6 rows"),
    "labels in columns": (lambda: tasks_by_class(X, X.reshape(6, 1), ((0,),)), r"y: .* got shape \(6, 1\)"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks_by_key([1.0], X, 1), "x: expected a tensor, got list"),
        (lambda: tasks_by_key(X, X, 2.0), "num_tasks: expected an integer"),
        (lambda: tasks_by_key(X, X, 2, key=True), "key: expected a column"),
        (lambda: tasks_by_key(X, X, 2, key=1.5), "key: expected a tensor of real numbers, got float"),
        (lambda: tasks_by_class(X, X, (0, 1)), r"classes: expected .* such as \(\(0,\), \(1,\)\), got \(0, 1\)"),
        (lambda: tasks_by_class(X, X, ("01", "23")), r"classes: expected .* got \('01', '23'\)"),
        (
            lambda: tasks_by_key(X, X, 2, held_out=0.5, generator=0),
            "generator: expected a torch.Generator or None, got 0",
        ),
        (lambda: tasks_by_time(X, X, X, 2, generator=0), "generator: expected a torch.Generator or None, got 0"),
    ],
)
def test_arguments_of_the_wrong_kind(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("edges", [[0.7, 0.85, 1.0], (0.7, 0.85, 1.0)])
def test_edges_that_are_numbers_are_those_of_the_times(edges, dtype):
    """The 0.7 of float32 lies below 0.7, and belongs to the task that begins there nevertheless."""
    t = torch.linspace(0.7, 1.0, 30, dtype=dtype)
    assert t[0] == torch.tensor(0.7, dtype=dtype)
    tasks = tasks_by_time(t, t, t, edges=edges)
    assert [task.rows.tolist() for task in tasks] == [list(range(15)), list(range(15, 30))]


def test_edges_are_rounded_for_each_of_times_and_test_times_and_tensors_are_not():
    t = torch.tensor([0.7, 0.8])
    tasks = tasks_by_time(t, t, t, edges=[0.7, 0.75, 0.8], test=(t, t, torch.tensor([0.7, 0.8], dtype=torch.float64)))
    assert [task.test_rows.tolist() for task in tasks] == [[0], [1]]
    with pytest.raises(ValueError, match=r"t: expected times between the edges 0\.7"):
        tasks_by_time(t, t, t, edges=torch.tensor([0.7, 0.75, 0.9], dtype=torch.float64))


LARGE = 2**60 + torch.tensor([3, 1, 2, 0])  # all one number in float64


def test_large_integers_are_not_rounded():
    """Such as nanoseconds since 1970."""
    x = torch.arange(4.0)
    assert LARGE.double().unique().numel() == 1
    tasks = tasks_by_key(x, x, 2, key=LARGE, test=(x, x, LARGE))
    assert [task.rows.tolist() for task in tasks] == [[3, 1], [2, 0]]
    assert [task.test_rows.tolist() for task in tasks] == [[3, 1], [2, 0]]
    edges = [2**60, 2**60 + 1, 2**60 + 3]
    for cuts in (edges, torch.tensor(edges), [-math.inf, 2**60 + 1, math.inf]):
        tasks = tasks_by_time(LARGE, x, x, edges=cuts, test=(x, x, LARGE))
        assert [task.rows.tolist() for task in tasks] == [[3], [1, 2, 0]]
        assert [task.test_rows.tolist() for task in tasks] == [[3], [1, 2, 0]]
    assert [task.rows.tolist() for task in tasks_by_time(LARGE, x, x, 2)] == [[3, 1], [2, 0]]
    with pytest.raises(ValueError, match=f"t: .* the edges {2**60} and {2**60 + 2}, got {2**60 + 3}; 1 of 4 rows"):
        tasks_by_time(LARGE, x, x, edges=[2**60, 2**60 + 2])
    tasks = tasks_by_class(x, LARGE, ((2**60, 2**60 + 2), (2**60 + 1,)), test=(x, LARGE))
    assert [task.rows.tolist() for task in tasks] == [[2, 3], [1]] == [task.test_rows.tolist() for task in tasks]
    assert tasks.names == (f"{2**60}, {2**60 + 2}", f"{2**60 + 1}")
    with pytest.raises(ValueError, match="key: expected integers below 2\\^63"):
        tasks_by_key(x, x, 2, key=torch.tensor([1, 2, 3, 2**64 - 1], dtype=torch.uint64))


@given(times=st.lists(st.integers(-20, 20), min_size=1, max_size=20), data=st.data())
def test_integers_are_cut_as_the_same_floats_are(times, data):
    t = torch.tensor(times)
    num_tasks = data.draw(st.integers(1, len(times)))
    t_test = torch.tensor(data.draw(st.lists(st.floats(-25, 25), min_size=1, max_size=9)), dtype=torch.float64)
    inner = data.draw(st.lists(st.floats(-19.9, 19.9), max_size=4, unique=True))
    for options in ({"num_tasks": num_tasks}, {"edges": sorted([-21.5, *inner, 20.5])}):
        tests = t_test if "num_tasks" in options else t_test.clamp(-21, 20)
        streams = [
            tasks_by_time(time, t, t, **options, test=(tests, tests, tests), empty="keep") for time in (t, t.double())
        ]
        assert streams[0].names == streams[1].names or "num_tasks" in options
        for one, other in zip(*streams, strict=True):
            assert one.rows.tolist() == other.rows.tolist()
            assert one.test_rows.tolist() == other.test_rows.tolist()
    keyed = [tasks_by_key(t, t, num_tasks, key=key, test=(tests, tests, tests)) for key in (t, t.double())]
    for one, other in zip(*keyed, strict=True):
        assert one.rows.tolist() == other.rows.tolist() and one.test_rows.tolist() == other.test_rows.tolist()


def test_float_classes_of_integer_labels_and_the_other_way_round():
    y = torch.tensor([0, 1, 2])
    tasks = tasks_by_class(y, y, ((0.0,), (torch.tensor(1.0), 2)), test=(y, y.float()))
    assert [task.rows.tolist() for task in tasks] == [[0], [1, 2]] == [task.test_rows.tolist() for task in tasks]
    half = tasks_by_class(y, y / 2, ((0.5,),), test=(y, y))
    assert half[0].rows.tolist() == [1] and half[0].test_rows.tolist() == []


def test_a_time_on_a_cut_begins_the_later_interval_in_either_dtype():
    t = torch.tensor([0, 0, 0, 2, -14, 18])  # cut at 2, where a rounded step falls beyond it
    for times in (t, t.double()):
        tasks = tasks_by_time(times, t, t, num_tasks=6, empty="keep")
        assert [sorted(task.rows.tolist()) for task in tasks] == [[4], [], [0, 1, 2], [3], [], [5]]
