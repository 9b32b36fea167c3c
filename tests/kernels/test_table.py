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
    base, flat = rng.weights((40, 30), dtype), rng.weights(100, dtype)
    expected, seen, groups = base.clone(), VIEWS[view](base), {"flat": 1}
    table = zk.ParamTable({"w": seen, "flat": flat}, groups=groups)
    copies = {"w": seen.contiguous(), "flat": flat.clone()}
    assert zk.fingerprint(table) == zk.fingerprint(zk.ParamTable(copies))
    call = (rng.integers(2), rng.coefs(2, 2), "gaussian", rounding)
    alone = changed(copies, *call, groups=groups)
    VIEWS[view](expected).copy_(alone["w"])
    zk.add_noise_(table, *call)
    assert_same_bits({"w": base, "flat": flat}, {"w": expected, "flat": alone["flat"]})


def test_out_of_place_between_layouts(server, rng, dtype):
    weights = rng.weights((17, 23), dtype)
    expected = changed({"w": weights}, 1, 0.1)["w"]
    wide, apart = weights.t().contiguous().t(), torch.empty((23, 17), dtype=dtype).t()
    for source, out in ((weights, apart), (wide, torch.empty((17, 23), dtype=dtype))):
        zk.add_noise(zk.ParamTable({"w": source}), zk.ParamTable({"w": out}), 1, 0.1)
        assert_same_bits(out, expected)


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
    "duplicate": ([("a", X[0]), ("a", X[1])], {}, "given twice"),
    "duplicate after wrappers": ({"module.a": X[0], "_orig_mod.a": X[1]}, {}, "given twice"),
    "no tensor": ({"a": [1.0]}, {}, "is a list"),
    "float64": ({"a": X.double()}, {}, "float64"),
    "int8": ({"a": X.to(torch.int8)}, {}, "int8"),
    "sparse": ({"a": X.to_sparse()}, {}, "layout"),
    "mixed devices": ({"a": X, "b": META}, {}, "cpu.*meta"),
    "expanded": ({"a": X[0].expand(3, 8)}, {}, "expanded"),
    "overlaps itself": ({"a": X.as_strided((4, 4), (2, 1))}, {}, "share one memory location"),
    "overlap": ({"a": X[:3], "b": X[2:]}, {}, "overlap"),
    "same start, other shape": ({"a": X, "b": X.reshape(-1)}, {}, "overlap"),
    "same memory, other dtype": ({"a": HALF, "b": HALF.view(torch.bfloat16)}, {}, "overlap"),
    "tied, other group": ({"a": X, "b": X}, {"groups": {"b": 1}}, "share their storage"),
    "group of unknown": ({"a": X}, {"groups": {"b": 0}}, "not in the table"),
    "offset of unknown": ({"a": X}, {"offsets": {"b": 0}}, "not in the table"),
    "negative group": ({"a": X}, {"groups": {"a": -1}}, "group of 'a'"),
    "boolean group": ({"a": X}, {"groups": {"a": True}}, "group of 'a'"),
    "negative offset": ({"a": X}, {"offsets": {"a": -1}}, "offset of 'a'"),
    "beyond the contract": ({"a": X}, {"offsets": {"a": (1 << 35) - 63}}, "2\\*\\*35"),
    "too few groups": ({"a": X}, {"groups": {"a": 2}, "num_groups": 2}, "group 2 is in use"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    tensors, call, message = REFUSED[case]
    error = TypeError if case in ("no tensor", "float64", "int8", "sparse") else ValueError
    with pytest.raises(error, match=message):
        zk.ParamTable(tensors, **call)


def test_disjoint_views_of_one_storage_are_fine(server, rng):
    base = rng.weights((8, 10), torch.float32)
    views = {"a": base[:3], "b": base[3:]}
    expected = changed(views, 1, 0.1)
    zk.add_noise_(zk.ParamTable(views), 1, 0.1)
    assert_same_bits(base, torch.cat(list(expected.values())))


CHANGES = {
    "resized": lambda data: data.resize_(200)[:50],
    "moved": lambda data: torch.ones_like(data),
    "dtype": lambda data: data.half(),
    "freed": None,
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_is_out_of_date_is_refused(change, device):
    parameter, zeros = torch.nn.Parameter(torch.zeros(100, device=device)), torch.zeros(100)
    table, other = zk.ParamTable({"w": parameter}), zk.ParamTable({"w": zeros.to(device)})
    zk.add_noise_(table, 1, 0.1)  # what is kept of it in device memory exists from here on
    if change == "freed":
        parameter.data.untyped_storage().resize_(0)
    else:
        parameter.data = CHANGES[change](parameter.data)
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


BASE = torch.zeros(100)
W = {"w": BASE[:8]}
APART = {
    "name": (W, {"v": torch.zeros(8)}, {}),
    "shape": (W, {"w": torch.zeros(2, 4)}, {}),
    "dtype": (W, {"w": HALF}, {}),
    "group": (W, {"w": torch.zeros(8)}, {"groups": {"w": 1}}),
    "offset": (W, {"w": torch.zeros(8)}, {"offsets": {"w": 1}}),
    "count": (W, {"w": torch.zeros(8), "v": torch.zeros(8)}, {}),
    "device": (W, {"w": META}, {}),
    "overlap": ({"w": BASE[:50]}, {"w": BASE[25:75]}, {}),
    "crossed": ({"a": BASE[:50], "b": BASE[50:]}, {"a": BASE[50:], "b": BASE[:50]}, {}),
}


@pytest.mark.parametrize("case", APART)
def test_out_tables_that_do_not_fit_are_refused(case):
    source, out, call = APART[case]
    said = "overlap" if case in ("overlap", "crossed") else "the tables"
    with pytest.raises(ValueError, match=said):
        zk.add_noise(zk.ParamTable(source), zk.ParamTable(out, **call), 1, 0.1)
    assert not BASE.any()


def test_out_may_be_the_source(server, rng):
    weights = {"w": rng.weights(100, torch.bfloat16)}
    expected = changed(weights, 1, 0.1)
    zk.add_noise(zk.ParamTable(weights), zk.ParamTable(weights), 1, 0.1)
    assert_same_bits(weights, expected)
