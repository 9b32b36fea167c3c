"""ParamTable: views, ties, shards, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import assert_same_bits
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
    expected_base = base.clone()
    expected = VIEWS[view](base).contiguous().clone()
    seeds, coefs = rng.integers(2), rng.coefs(2)
    call = {"rounding": rounding}
    zk.add_noise_(zk.ParamTable({"w": expected}), seeds, coefs, **call)
    assert zk.fingerprint(zk.ParamTable({"w": VIEWS[view](base)})) == zk.fingerprint(
        zk.ParamTable({"w": VIEWS[view](base).contiguous()})
    )
    zk.add_noise_(zk.ParamTable({"w": VIEWS[view](base)}), seeds, coefs, **call)
    VIEWS[view](expected_base).copy_(expected)
    assert_same_bits(base, expected_base)


def test_out_of_place_between_layouts(server, rng, dtype):
    weights = rng.weights((17, 23), dtype)
    expected = weights.clone()
    zk.add_noise_(zk.ParamTable({"w": expected}), 1, 0.1)
    out = torch.empty((23, 17), dtype=dtype).t()
    zk.add_noise(zk.ParamTable({"w": weights}), zk.ParamTable({"w": out}), 1, 0.1)
    assert_same_bits(out, expected)
    out = torch.empty((17, 23), dtype=dtype)
    wide = weights.t().contiguous().t()
    zk.add_noise(zk.ParamTable({"w": wide}), zk.ParamTable({"w": out}), 1, 0.1)
    assert_same_bits(out, expected)


def test_non_contiguous_among_groups(server, rng):
    base = rng.weights((20, 20), torch.bfloat16)
    flat = rng.weights(100, torch.bfloat16)
    copies = {"a": flat.clone(), "b": base.t().contiguous()}
    groups = {"a": 0, "b": 1}
    coefs = [[0.1], [0.2]]
    zk.add_noise_(zk.ParamTable(copies, groups=groups), 1, coefs)
    zk.add_noise_(zk.ParamTable({"a": flat, "b": base.t()}, groups=groups), 1, coefs)
    assert_same_bits(flat, copies["a"])
    assert_same_bits(base.t(), copies["b"])


def test_tied_weights_change_once_under_the_first_name(server, rng):
    embedding = torch.nn.Embedding(50, 8)
    head = torch.nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    expected = embedding.weight.detach().clone()
    table = zk.ParamTable({"embed.weight": embedding.weight, "head.weight": head.weight})
    assert len(table) == 1
    assert table.aliases == {"head.weight": "embed.weight"}
    assert table.numel == 400
    zk.add_noise_(table, 1, 0.1)
    zk.add_noise_(zk.ParamTable({"embed.weight": expected}), 1, 0.1)
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
    "duplicate": (lambda: zk.ParamTable([("a", X[0]), ("a", X[1])]), ValueError, "given twice"),
    "duplicate after wrappers": (
        lambda: zk.ParamTable({"module.a": X[0], "_orig_mod.a": X[1]}),
        ValueError,
        "given twice",
    ),
    "no tensor": (lambda: zk.ParamTable({"a": [1.0]}), TypeError, "is a list"),
    "float64": (lambda: zk.ParamTable({"a": X.double()}), TypeError, "float64"),
    "int8": (lambda: zk.ParamTable({"a": X.to(torch.int8)}), TypeError, "int8"),
    "sparse": (lambda: zk.ParamTable({"a": X.to_sparse()}), TypeError, "layout"),
    "mixed devices": (lambda: zk.ParamTable({"a": X, "b": META}), ValueError, "cpu.*meta"),
    "expanded": (lambda: zk.ParamTable({"a": X[0].expand(3, 8)}), ValueError, "expanded"),
    "overlapping with itself": (
        lambda: zk.ParamTable({"a": X.as_strided((4, 4), (2, 1))}),
        ValueError,
        "share one memory location",
    ),
    "overlap": (lambda: zk.ParamTable({"a": X[:3], "b": X[2:]}), ValueError, "overlap"),
    "same start, other shape": (
        lambda: zk.ParamTable({"a": X, "b": X.reshape(-1)}),
        ValueError,
        "overlap",
    ),
    "same memory, other dtype": (
        lambda: zk.ParamTable({"a": HALF, "b": HALF.view(torch.bfloat16)}),
        ValueError,
        "overlap",
    ),
    "tied with other group": (
        lambda: zk.ParamTable({"a": X, "b": X}, groups={"b": 1}),
        ValueError,
        "share their storage",
    ),
    "group of unknown": (lambda: zk.ParamTable({"a": X}, {"b": 0}), ValueError, "not in the table"),
    "offset of unknown": (
        lambda: zk.ParamTable({"a": X}, offsets={"b": 0}),
        ValueError,
        "not in the table",
    ),
    "negative group": (lambda: zk.ParamTable({"a": X}, {"a": -1}), ValueError, "group of 'a'"),
    "boolean group": (lambda: zk.ParamTable({"a": X}, {"a": True}), ValueError, "group of 'a'"),
    "negative offset": (
        lambda: zk.ParamTable({"a": X}, offsets={"a": -1}),
        ValueError,
        "offset of 'a'",
    ),
    "beyond the contract": (
        lambda: zk.ParamTable({"a": X}, offsets={"a": (1 << 35) - 63}),
        ValueError,
        "2\\*\\*35",
    ),
    "too few groups": (
        lambda: zk.ParamTable({"a": X}, {"a": 2}, num_groups=2),
        ValueError,
        "group 2 is in use",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


def test_disjoint_views_of_one_storage_are_fine(server, rng):
    base = rng.weights((8, 10), torch.float32)
    expected = {"a": base[:3].clone(), "b": base[3:].clone()}
    zk.add_noise_(zk.ParamTable(expected), 1, 0.1)
    zk.add_noise_(zk.ParamTable({"a": base[:3], "b": base[3:]}), 1, 0.1)
    assert_same_bits(base, torch.cat(list(expected.values())))


@pytest.mark.parametrize("change", ["resized", "moved", "dtype", "freed"])
def test_a_table_that_is_out_of_date_is_refused(change):
    parameter = torch.nn.Parameter(torch.zeros(100))
    table = zk.ParamTable({"w": parameter})
    if change == "resized":
        parameter.data.resize_(200)
        parameter.data = parameter.data[:50]
    elif change == "moved":
        parameter.data = torch.ones(100)
    elif change == "dtype":
        parameter.data = parameter.data.half()
    else:
        parameter.data.untyped_storage().resize_(0)
    before = parameter.detach().clone() if change != "freed" else None
    calls = [
        lambda: zk.add_noise_(table, 1, 0.1),
        lambda: zk.fingerprint(table),
        lambda: zk.add_noise(table, zk.ParamTable({"w": torch.zeros(100)}), 1, 0.1),
        lambda: zk.add_noise(zk.ParamTable({"w": torch.zeros(100)}), table, 1, 0.1),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="make a new table"):
            call()
    assert before is None or torch.equal(parameter, before)


OTHER = {
    "name": lambda: zk.ParamTable({"v": torch.zeros(8)}),
    "shape": lambda: zk.ParamTable({"w": torch.zeros(2, 4)}),
    "dtype": lambda: zk.ParamTable({"w": torch.zeros(8).half()}),
    "group": lambda: zk.ParamTable({"w": torch.zeros(8)}, groups={"w": 1}),
    "offset": lambda: zk.ParamTable({"w": torch.zeros(8)}, offsets={"w": 1}),
    "count": lambda: zk.ParamTable({"w": torch.zeros(8), "v": torch.zeros(8)}),
    "device": lambda: zk.ParamTable({"w": META}),
}


@pytest.mark.parametrize("difference", OTHER)
def test_out_tables_that_differ_are_refused(difference):
    weights = torch.zeros(8)
    out = OTHER[difference]()
    with pytest.raises(ValueError, match="the tables"):
        zk.add_noise(zk.ParamTable({"w": weights}), out, 1, 0.1)
    assert not weights.any()


def test_out_that_overlaps_the_source_is_refused():
    base = torch.zeros(100)
    with pytest.raises(ValueError, match="overlap"):
        zk.add_noise(zk.ParamTable({"w": base[:50]}), zk.ParamTable({"w": base[25:75]}), 1, 0.1)
    crossed = {"a": base[50:], "b": base[:50]}
    straight = {"a": base[:50], "b": base[50:]}
    with pytest.raises(ValueError, match="overlap"):
        zk.add_noise(zk.ParamTable(straight), zk.ParamTable(crossed), 1, 0.1)
    assert not base.any()


def test_out_may_be_the_source(server, rng):
    weights = rng.weights(100, torch.bfloat16)
    expected = weights.clone()
    zk.add_noise_(zk.ParamTable({"w": expected}), 1, 0.1)
    zk.add_noise(zk.ParamTable({"w": weights}), zk.ParamTable({"w": weights}), 1, 0.1)
    assert_same_bits(weights, expected)
