"""ParamTable: views, ties, shards, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import assert_same_bits, changed
from tests.kernels.conftest import not_interpreted

VIEWS = {
    "transposed": lambda x: x.t(),
    "column slice": lambda x: x[:, 3:20],
    "strided rows": lambda x: x[::3],
    "strided both": lambda x: x[::2, ::5],
    "permuted": lambda x: x.reshape(4, 10, 30).permute(2, 0, 1),
    "row slice": lambda x: x[5:9],
    "flat offset": lambda x: x.reshape(-1)[1:],
    "scalar": lambda x: x[2, 3],
    "empty": lambda x: x[:, :0],
}


@not_interpreted("views are copied before a backend sees them")
@pytest.mark.covering(view=VIEWS)
def test_views(server, rng, dtype, rounding, view):
    """A view gives what a contiguous copy of it gives, and nothing outside of it changes."""
    base = rng.weights((40, 30), dtype)
    expected, seen = base.clone(), VIEWS[view](base)
    table, copy = zk.ParamTable({"w": seen}), {"w": seen.contiguous()}
    assert zk.fingerprint(table) == zk.fingerprint(zk.ParamTable(copy))
    call = (rng.integers(2), rng.coefs(2), "gaussian", rounding)
    VIEWS[view](expected).copy_(changed(copy, *call)["w"])
    zk.add_noise_(table, *call)
    assert_same_bits(base, expected)


def test_out_of_place_between_layouts(server, rng, dtype):
    weights = rng.weights((17, 23), dtype)
    expected = changed({"w": weights}, 1, 0.1)["w"]
    wide, apart = weights.t().contiguous().t(), torch.empty((23, 17), dtype=dtype).t()
    for source, out in ((weights, apart), (wide, torch.empty((17, 23), dtype=dtype))):
        zk.add_noise(zk.ParamTable({"w": source}), zk.ParamTable({"w": out}), 1, 0.1)
        assert_same_bits(out, expected)


def test_non_contiguous_among_groups(server, rng):
    base, flat = rng.weights((20, 20), torch.bfloat16), rng.weights(100, torch.bfloat16)
    groups, coefs = {"a": 0, "b": 1}, [[0.1], [0.2]]
    expected = changed({"a": flat, "b": base.t().contiguous()}, 1, coefs, groups=groups)
    zk.add_noise_(zk.ParamTable({"a": flat, "b": base.t()}, groups=groups), 1, coefs)
    assert_same_bits({"a": flat, "b": base.t()}, expected)


def test_tied_weights_change_once_under_the_first_name(server):
    embedding, head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    expected = changed({"embed.weight": embedding.weight.detach()}, 1, 0.1)["embed.weight"]
    table = zk.ParamTable({"embed.weight": embedding.weight, "head.weight": head.weight})
    assert (len(table), table.numel) == (1, 400)
    assert table.aliases == {"head.weight": "embed.weight"}
    zk.add_noise_(table, 1, 0.1)
    assert_same_bits(embedding.weight, expected)


def test_parameters_that_require_grad(server):
    linear = torch.nn.Linear(8, 8)
    before = linear.weight.detach().clone()
    zk.add_noise_(zk.ParamTable(linear.named_parameters()), 1, 0.1)
    assert not torch.equal(linear.weight, before)
    assert linear.weight.requires_grad
    assert linear.weight.grad_fn is None


def test_facts():
    table = zk.ParamTable(
        [("module.a", torch.zeros(3)), ("b", torch.zeros(2, 2, dtype=torch.float16))], {"b": 4}
    )
    assert table.names == ["a", "b"]
    assert (len(table), table.numel, table.nbytes, table.num_groups) == (2, 7, 20, 5)
    assert table.device == torch.device("cpu")
    empty = zk.ParamTable({})
    assert (len(empty), empty.numel, empty.num_groups) == (0, 0, 1)


def test_empty_table(server):
    zk.add_noise_(zk.ParamTable({}), 1, 0.1)
    assert zk.fingerprint(zk.ParamTable({})) == 0


# --- Refused -------------------------------------------------------------------------------------

X = torch.zeros(8, 8)
HALF = torch.zeros(8, dtype=torch.float16)
META = torch.zeros(8, device="meta")
REFUSED = {
    "duplicate": ([("a", X[0]), ("a", X[1])], {}, ValueError, "given twice"),
    "duplicate after wrappers": (
        {"module.a": X[0], "_orig_mod.a": X[1]}, {}, ValueError, "given twice"
    ),
    "no tensor": ({"a": [1.0]}, {}, TypeError, "is a list"),
    "float64": ({"a": X.double()}, {}, TypeError, "float64"),
    "int8": ({"a": X.to(torch.int8)}, {}, TypeError, "int8"),
    "sparse": ({"a": X.to_sparse()}, {}, TypeError, "layout"),
    "mixed devices": ({"a": X, "b": META}, {}, ValueError, "cpu.*meta"),
    "expanded": ({"a": X[0].expand(3, 8)}, {}, ValueError, "expanded"),
    "overlaps itself": (
        {"a": X.as_strided((4, 4), (2, 1))}, {}, ValueError, "share one memory location"
    ),
    "overlap": ({"a": X[:3], "b": X[2:]}, {}, ValueError, "overlap"),
    "same start, other shape": ({"a": X, "b": X.reshape(-1)}, {}, ValueError, "overlap"),
    "same memory, other dtype": (
        {"a": HALF, "b": HALF.view(torch.bfloat16)}, {}, ValueError, "overlap"
    ),
    "tied, other group": (
        {"a": X, "b": X}, {"groups": {"b": 1}}, ValueError, "share their storage"
    ),
    "group of unknown": ({"a": X}, {"groups": {"b": 0}}, ValueError, "not in the table"),
    "offset of unknown": ({"a": X}, {"offsets": {"b": 0}}, ValueError, "not in the table"),
    "negative group": ({"a": X}, {"groups": {"a": -1}}, ValueError, "group of 'a'"),
    "boolean group": ({"a": X}, {"groups": {"a": True}}, ValueError, "group of 'a'"),
    "negative offset": ({"a": X}, {"offsets": {"a": -1}}, ValueError, "offset of 'a'"),
    "beyond the contract": (
        {"a": X}, {"offsets": {"a": (1 << 35) - 63}}, ValueError, "2\\*\\*35"
    ),
    "too few groups": (
        {"a": X}, {"groups": {"a": 2}, "num_groups": 2}, ValueError, "group 2 is in use"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    tensors, call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        zk.ParamTable(tensors, **call)


def test_disjoint_views_of_one_storage_are_fine(server, rng):
    base = rng.weights((8, 10), torch.float32)
    views = {"a": base[:3], "b": base[3:]}
    expected = changed(views, 1, 0.1)
    zk.add_noise_(zk.ParamTable(views), 1, 0.1)
    assert_same_bits(base, torch.cat(list(expected.values())))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("change", ["resized", "moved", "dtype", "freed"])
def test_a_table_that_is_out_of_date_is_refused(change, device):
    parameter, zeros = torch.nn.Parameter(torch.zeros(100, device=device)), torch.zeros(100)
    table, other = zk.ParamTable({"w": parameter}), zk.ParamTable({"w": zeros.to(device)})
    zk.add_noise_(table, 1, 0.1)  # what is kept of it in device memory exists from here on
    if change == "resized":
        parameter.data.resize_(200)
        parameter.data = parameter.data[:50]
    elif change == "moved":
        parameter.data = torch.ones(100, device=device)
    elif change == "dtype":
        parameter.data = parameter.data.half()
    else:
        parameter.data.untyped_storage().resize_(0)
    before = parameter.detach().clone() if change != "freed" else None
    for call in (
        lambda: zk.add_noise_(table, 1, 0.1),
        lambda: zk.fingerprint(table),
        lambda: zk.add_noise(table, other, 1, 0.1),
        lambda: zk.add_noise(other, table, 1, 0.1),
    ):
        with pytest.raises(RuntimeError, match="make a new table"):
            call()
    assert before is None or torch.equal(parameter, before)


EIGHT = torch.zeros(8)
OTHER = {
    "name": ({"v": EIGHT}, {}),
    "shape": ({"w": torch.zeros(2, 4)}, {}),
    "dtype": ({"w": HALF}, {}),
    "group": ({"w": EIGHT}, {"groups": {"w": 1}}),
    "offset": ({"w": EIGHT}, {"offsets": {"w": 1}}),
    "count": ({"w": EIGHT, "v": torch.zeros(8)}, {}),
    "device": ({"w": META}, {}),
}


@pytest.mark.parametrize("difference", OTHER)
def test_out_tables_that_differ_are_refused(difference):
    tensors, call = OTHER[difference]
    weights = torch.zeros(8)
    with pytest.raises(ValueError, match="the tables"):
        zk.add_noise(zk.ParamTable({"w": weights}), zk.ParamTable(tensors, **call), 1, 0.1)
    assert not weights.any()


def test_out_that_overlaps_the_source_is_refused():
    base = torch.zeros(100)
    first, second = base[:50], base[50:]
    for source, out in (
        ({"w": first}, {"w": base[25:75]}),
        ({"a": first, "b": second}, {"a": second, "b": first}),
    ):
        with pytest.raises(ValueError, match="overlap"):
            zk.add_noise(zk.ParamTable(source), zk.ParamTable(out), 1, 0.1)
    assert not base.any()


def test_out_may_be_the_source(server, rng):
    weights = {"w": rng.weights(100, torch.bfloat16)}
    expected = changed(weights, 1, 0.1)
    zk.add_noise(zk.ParamTable(weights), zk.ParamTable(weights), 1, 0.1)
    assert_same_bits(weights, expected)
