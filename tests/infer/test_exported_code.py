"""Python inside an exported program: what a crafted .pt2 may smuggle in, and what real ones hold."""

from __future__ import annotations

import io
import json
import warnings
import zipfile

import pytest
import torch
from torch import nn
from torch.export import Dim

from asyncdp.errors import ModelLoadError
from asyncdp.infer.model.exported import load_exported
from asyncdp.infer.model.exported_code import find_code, find_code_in_keys

AUTO = Dim.AUTO


class Formulas(nn.Module):
    """Shapes that depend on shapes in all the ways that torch can save."""

    def forward(self, x):
        n = x.shape[0]
        return (
            *(x.new_zeros(size) for size in (n**2, n // 2, n % 5 + 1, max(n, 7), min(n, 7))),
            x * (n / 3) * (n**0.5),
            x.reshape(-1, 2),
        )


class FromData(nn.Module):
    """Shapes that depend on the data, checked with a text that has quotes in it."""

    def forward(self, x):
        n = x[0, 0].item()
        torch._check(n >= 2, lambda: "must not be 'one' or \"two\"")
        torch._check(n < 100)
        return x.new_zeros(n), (x > 0).nonzero(), torch.einsum("bi,bj->bij", x.float(), x.float())


class Branches(nn.Module):
    """A subgraph for either outcome."""

    def forward(self, x):
        return torch.cond(x.shape[0] > 4, lambda x: x + 1, lambda x: x - 1, (x,))


class Nested(nn.Module):
    """Nested and named inputs, a constant text, layers with odd names, guards, and nested outputs."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"a-b": nn.Linear(6, 6), "c d/e": nn.ReLU()})
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x, pair, *, scale=2.0, mode="mean"):
        half = x[: x.shape[0] // 2] * scale if x.shape[0] % 2 == 0 and mode == "mean" else x
        y = self.parts["c d/e"](self.parts["a-b"](half)) + self.shift
        pooled = nn.functional.max_pool1d(pair["t"], 3, stride=2)
        return {"y": y, "b c": [pooled, (pair["u"][0].reshape(-1, 2),)], 3: x}


def saved(module, args, kwargs=None, shapes=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
        file = io.BytesIO()
        torch.export.save(program, file)
    return file.getvalue()


PAIR = {"t": torch.ones(8, 4, 20), "u": [torch.ones(8, 6)]}
REAL = {
    "formulas": lambda: saved(Formulas(), (torch.ones(20, 4),), shapes=({0: AUTO},)),
    "data": lambda: saved(FromData(), (torch.full((4, 3), 5),), shapes=({0: AUTO},)),
    "branches": lambda: saved(Branches(), (torch.ones(6, 3),), shapes=({0: AUTO},)),
    "nested": lambda: saved(
        Nested(),
        (torch.ones(8, 6), PAIR),
        {"scale": 3.0, "mode": "mean"},
        {"x": {0: AUTO}, "pair": {"t": {0: AUTO, 2: AUTO}, "u": [{0: AUTO}]}, "scale": None, "mode": None},
    ),
    "derived": lambda: saved(Formulas(), (torch.ones(20, 4),), shapes=({0: 2 * Dim("half", min=4, max=64)},)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REAL)
def test_what_torch_writes_is_loaded(tmp_path, name):
    """No formula, guard, name or text of a real program is taken for code."""
    (tmp_path / "real.pt2").write_bytes(REAL[name]())
    assert isinstance(load_exported(tmp_path / "real.pt2", allow_pickle=False), nn.Module)


@pytest.fixture(scope="module")
def nested():
    """A saved program that has formulas, guards, names and texts of all kinds."""
    return REAL["nested"]()


def crafted(data, path, change):
    """Write an archive like `data`, in whose program `change` has replaced something."""
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            member = source.read(name)
            if "/models/" in name and name.endswith(".json"):
                program = json.loads(member)
                change(program)
                member = json.dumps(program).encode()
            target.writestr(name, member)
    return path


def replaced(key, *texts):
    """Replace every text under a key by others."""

    def change(value):
        if isinstance(value, dict):
            for name, entry in value.items():
                if name == key:
                    value[name] = list(texts) if isinstance(entry, list) else texts[0]
                else:
                    change(entry)
        elif isinstance(value, list):
            for entry in value:
                change(entry)

    return change


TOUCH = "__import__('pathlib').Path('pwned').touch()"
TREE = '[1, {"type": "builtins.dict", "context": "[CONTEXT]", "children_spec": []}]'

CRAFTED = {
    "formula": replaced("expr_str", TOUCH),
    "formula in a text": replaced("expr_str", f'Max("{TOUCH}", Integer(1))'),
    "formula after a comment": replaced("expr_str", f"Integer(1)\n{TOUCH}"),
    "attribute in a formula": replaced("expr_str", "Integer(1).__class__"),
    "guard": replaced("guards_code", f"{TOUCH} is None"),
    "guard of a torch function": replaced("guards_code", "torch.load(L['x'])"),
    "guard of an import": replaced("guards_code", "math.__loader__.load_module('antigravity') is None"),
    "guard that leaves its text": replaced("guards_code", f"L['x\" + str({TOUCH}) + \"']"),
    "argument": replaced("forward_arg_names", "x", f"pair: {TOUCH}", "scale", "mode"),
    "constant input": replaced("as_string", f"' == str({TOUCH}) or '"),
    "node": replaced("name", f"x = {TOUCH}"),
    "parameter": replaced("parameter_name", f'a") or {TOUCH} or ("'),
    "key of inputs": replaced("in_spec", TREE.replace("[CONTEXT]", "[\\\"a':print(1),'b\\\"]")),
    "import by inputs": replaced(
        "in_spec", '[1, {"type": "collections.defaultdict", "context": {"default_factory_module": "this"}}]'
    ),
    "import by an enumeration": replaced(
        "out_spec",
        '[1, {"type": "builtins.dict", "context": "[{\\"__enum__\\": true, \\"fqn\\": \\"this:a\\"}]"}]',
    ),
    "operator that writes a file": replaced("target", "torch.ops.aten.save.default"),
    "operator that maps a file": replaced("target", "torch.ops.aten.from_file.default"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_programs_are_refused(work, nested, name):
    """Python in the place of a formula, a guard or a name is refused before torch sees it."""
    path = crafted(nested, work / "crafted.pt2", CRAFTED[name])
    with pytest.raises(ModelLoadError, match=r"holds .*could run Python .*--allow-unsafe-pickle"):
        load_exported(path, allow_pickle=False)
    assert not (work / "pwned").exists()


def test_operators_as_arguments_are_operators():
    """A node may name an operator as an argument, but no other function of torch or below it."""
    node = {"nodes": [{"inputs": [{"arg": {"as_operator": "torch.ops.aten.add.Tensor"}}]}]}
    assert find_code(node) is None
    for name in ("torch.os.system", "torch.ops.load_library", "torch.ops.aten.save.default", "math.sin"):
        assert find_code({"nodes": [{"inputs": [{"arg": {"as_operator": name}}]}]}) == name


def test_texts_in_nodes_are_free():
    """Messages of assertions and stack traces hold quotes; torch quotes them itself, or never runs them."""
    text = "File \"a.py\", line 3: u0 >= 2 isn't true; 'no'"
    node = {"metadata": {"stack_trace": text}, "inputs": [{"name": "msg", "arg": {"as_string": text}}]}
    assert find_code({"graph": {"nodes": [node]}}) is None
    assert find_code({"graph": {"inputs": [{"as_string": text}]}}) == text


def test_keys_of_example_inputs():
    """Guards name the keys of the example inputs, so a key must not leave its quotes."""
    assert find_code_in_keys(((torch.ones(1), {"a b": [1], 3: {"x": 2}}), {})) is None
    assert find_code_in_keys((({"a": [{"it's": 1}]},), {})) == repr("it's")
    assert find_code_in_keys(((), {"d": {("x",): 1}})) == repr(("x",))


def test_two_members_of_one_name(work, nested):
    """Torch finds members whatever their case, so another one than was checked might be loaded."""
    path = work / "twice.pt2"
    with zipfile.ZipFile(io.BytesIO(nested)) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
            if name.endswith("model.json"):
                target.writestr(name.replace("model.json", "Model.json"), b"{}")
    with pytest.raises(ModelLoadError, match="two members have the same name"):
        load_exported(path, allow_pickle=False)
