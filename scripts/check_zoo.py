"""Models of transformers over lanes, beside the same models called by hand on each half of the batch.

Every model is tiny, has random weights, and is made three times: one for `data_parallel`, one for an engine
on all of its lanes, one to be called by hand. All three get the same calls in the same order, so that what a
call leaves behind shows in those that follow: without and with hidden states and a cache, in eval mode
without and in train mode with gradients. Compared are outputs, gradients and buffers. By hand, a copy of the
model is called on the second half of the rows, gradients are added, and the buffers are those that the first
half left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import copy
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from machine import origin
from torch import Tensor, nn
from zoo_setups import SETUPS

import asyncdp

SCRIPT = Path(__file__).resolve()
RESULTS = SCRIPT.parent.parent / "docs" / "results"
DEVICES = "cpu*2"
MODELS_PER_PROCESS = 6
SECONDS_PER_PROCESS = 900
CALLS: dict[str, dict[str, bool]] = {
    "plain": {"output_hidden_states": False, "use_cache": False},
    "hidden states": {"output_hidden_states": True, "use_cache": False},
    "cache": {"output_hidden_states": False, "use_cache": True},
    "both": {"output_hidden_states": True, "use_cache": True},
}
COLUMNS = [f"{mode}, {name}" for mode in ("eval", "train") for name in CALLS]
EQUAL, REFUSED, WRONG = "equal", "refused", "wrong"
NOT_OFFERED, NOT_JOINED = "–", "does not fit"
Call = Callable[[dict[str, Any]], Any]


class NotJoinedError(Exception):
    """What the halves returned does not fit together."""


class Found(dict[str, Any]):
    """Tensors and numbers of a call by where they were found."""


class ByHand:
    """A model called on each half of the rows."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, arguments: dict[str, Any]) -> list[Any]:
        """Return what each half gave."""
        self._other = copied(self.model)
        halves = [
            {
                name: value.tensor_split(2)[position] if isinstance(value, Tensor) else value
                for name, value in arguments.items()
            }
            for position in range(2)
        ]
        return [self.model(**halves[0]), self._other(**halves[1])]

    def gradients(self) -> Found:
        """Return the sums over both halves."""
        others = dict(self._other.named_parameters())
        return Found(
            {
                name: add(parameter.grad, others[name].grad)
                for name, parameter in self.model.named_parameters()
            }
        )


def copied(model: nn.Module) -> nn.Module:
    """Copy a model, also one that has kept results with their graph, which torch does not copy."""
    kept = [value for module in model.modules() for value in vars(module).values()]
    memo = {id(each): each.detach().clone() for each in kept if isinstance(each, Tensor) and each.grad_fn}
    return copy.deepcopy(model, memo)


def add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def leaves_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Walk through outputs and through the caches in them."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from leaves_of(each, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for position, each in enumerate(value):
            yield from leaves_of(each, f"{path}[{position}]")
    elif type(value).__module__.startswith("transformers."):
        yield f"{path}'s type", type(value).__name__
        for name, each in vars(value).items():
            if isinstance(each, (Tensor, list, tuple, dict)) or type(each).__module__.startswith(
                "transformers."
            ):
                yield from leaves_of(each, f"{path}.{name}")
    else:
        yield path, value


def joined(halves: list[Any]) -> Found:
    """Concatenate the tensors of the halves.

    Raises:
        NotJoinedError: they do not fit together.
    """
    first, second = (dict(leaves_of(half)) for half in halves)
    if first.keys() != second.keys():
        raise NotJoinedError("the halves differ in structure")
    whole = Found()
    for path, leaf in first.items():
        if not isinstance(leaf, Tensor):
            if leaf != second[path]:
                raise NotJoinedError(f"{path} is {leaf!r} in one half and {second[path]!r} in the other")
            whole[path] = leaf
        elif leaf.dim() == 0 and ".cache" in path:
            whole[path] = leaf  # a counter of the cache, which all rows share
        elif leaf.dim() == 0:
            whole[path] = torch.stack([leaf, second[path]])
        elif leaf.shape[1:] != second[path].shape[1:]:
            raise NotJoinedError(f"{path} is {list(leaf.shape)} and {list(second[path].shape)}")
        else:
            whole[path] = torch.cat([leaf, second[path]])
    return whole


def run_backward(found: Found) -> None:
    """Begin at every number with another gradient."""
    tensors = [leaf for leaf in found.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
    if tensors:
        gradients = [torch.linspace(0.5, 1, leaf.numel()).to(leaf).view_as(leaf) for leaf in tensors]
        torch.autograd.backward(tensors, gradients)


def difference(found: Found, expected: Found) -> str:
    """Say how two results differ; nothing if they do not."""
    if found.keys() != expected.keys():
        extra, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
        return f"too many: {extra[:4]}, missing: {missing[:4]}"
    for path, leaf in expected.items():
        if not isinstance(leaf, Tensor) or not isinstance(found[path], Tensor):
            if isinstance(leaf, Tensor) or isinstance(found[path], Tensor) or leaf != found[path]:
                return f"{path} is {shown(found[path])} instead of {shown(leaf)}"
            continue
        # A sum that nearly cancels out is as inexact as its largest part.
        largest = leaf.detach().double().abs().max().nan_to_num(0.0).item() if leaf.numel() else 0.0
        try:
            torch.testing.assert_close(
                found[path], leaf, rtol=1e-4, atol=1e-6 + 1e-4 * largest, equal_nan=True
            )
        except AssertionError as error:
            return f"{path}: {first_line(error)}"
    return ""


def shown(leaf: Any) -> str:
    return f"a tensor {list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


class Zoo:
    """One model, called in three ways.

    Args:
        name: in `SETUPS`.
        runner: the event loop.
    """

    def __init__(self, name: str, runner: asyncio.Runner) -> None:
        setup = SETUPS[name]
        self._runner = runner
        self._setup, self._num_calls = setup, 0
        self.by_hand = ByHand(setup.make(name))
        self.models = {"data_parallel": setup.make(name), "engine": setup.make(name)}
        self._engine = asyncdp.DataParallel(self.models["engine"], DEVICES, num_lanes="all")
        parameters = inspect.signature(self.by_hand.model.forward).parameters
        config = self.by_hand.model.config
        self.num_parameters = sum(each.numel() for each in self.by_hand.model.parameters())
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self._known = {
            option
            for option, known in (
                ("output_hidden_states", takes_any or "output_hidden_states" in parameters),
                ("use_cache", "use_cache" in parameters or (takes_any and hasattr(config, "use_cache"))),
            )
            if known
        }

    def call(self, way: str, arguments: dict[str, Any]) -> Any:
        """Run a model over the lanes, in this context's grad mode."""
        if way == "engine":
            called = self._engine(**arguments)
        else:
            called = asyncdp.data_parallel(self.models[way], (), DEVICES, module_kwargs=arguments)
        return self._runner.run(called, context=contextvars.copy_context())

    def check(self, training: bool, options: dict[str, bool]) -> tuple[str, str]:
        """Call all three and compare."""
        if any(value and option not in self._known for option, value in options.items()):
            return NOT_OFFERED, ""
        arguments: dict[str, Any] = {**self._setup.inputs(self._num_calls)}
        arguments |= {name: value for name, value in options.items() if name in self._known}
        self._num_calls += 1
        for model in (self.by_hand.model, *self.models.values()):
            model.train(training)
            model.zero_grad()
        with torch.set_grad_enabled(training):
            try:
                halves = self.by_hand(arguments)
            except Exception as error:
                return self._check_failure(arguments, error)
            try:
                expected = joined(halves)
            except NotJoinedError as error:
                return self._check_not_joined(arguments, error)
            try:
                run_backward(expected)
            except RuntimeError as error:
                return NOT_OFFERED, f"by hand: backward: {first_line(error)}"
            verdicts = [self._check_way(way, arguments, expected) for way in self.models]
        return max(verdicts, key=lambda verdict: (EQUAL, REFUSED, WRONG).index(verdict[0]))

    def _check_way(self, way: str, arguments: dict[str, Any], expected: Found) -> tuple[str, str]:
        try:
            found = Found(leaves_of(self.call(way, arguments)))
        except asyncdp.errors.AsyncDPError as error:
            return REFUSED, f"{way}: {type(error).__name__}: {first_line(error)}"
        except Exception as error:
            return WRONG, f"{way}: raised {type(error).__name__}: {first_line(error)}"
        try:
            run_backward(found)
        except RuntimeError as error:
            return WRONG, f"{way}: backward raised {type(error).__name__}: {first_line(error)}"
        model = self.models[way]
        gradients = Found({name: each.grad for name, each in model.named_parameters()})
        compared = {
            "": (found, expected),
            "gradient of ": (gradients, self.by_hand.gradients()),
            "buffer ": (Found(model.named_buffers()), Found(self.by_hand.model.named_buffers())),
        }
        for kind, pair in compared.items():
            text = difference(*pair)
            if text:
                return WRONG, f"{way}: {kind}{text}"
        return EQUAL, ""

    def _check_failure(self, arguments: dict[str, Any], error: Exception) -> tuple[str, str]:
        """See that what the model refuses by hand it refuses over lanes."""
        text = f"by hand: {type(error).__name__}: {first_line(error)}"
        for way in self.models:
            try:
                self.call(way, arguments)
            except Exception as raised:
                if type(raised) is type(error):
                    continue
                return WRONG, f"{way}: raised {type(raised).__name__}, {text}"
            return WRONG, f"{way}: raised nothing, {text}"
        return NOT_OFFERED, text

    def _check_not_joined(self, arguments: dict[str, Any], error: Exception) -> tuple[str, str]:
        """See that what does not fit together is refused."""
        for way in self.models:
            try:
                self.call(way, arguments)
            except asyncdp.errors.AsyncDPError:
                continue
            except Exception as raised:
                return WRONG, f"{way}: raised {type(raised).__name__}: {first_line(raised)}, but {error}"
            return WRONG, f"{way}: raised nothing, but {error}"
        return NOT_JOINED, f"by hand: {error}"

    def close(self) -> None:
        """End the engine's lanes."""
        self._runner.run(self._engine.aclose())


def check_model(name: str, runner: asyncio.Runner) -> dict[str, Any]:
    """All calls of one model, the later ones with what the earlier ones left behind."""
    zoo = Zoo(name, runner)
    report: dict[str, Any] = {
        "model": type(zoo.by_hand.model).__name__,
        "inputs": SETUPS[name].kind,
        "num_parameters": zoo.num_parameters,
    }
    for training in (False, True):
        for call, options in CALLS.items():
            verdict, reason = zoo.check(training, options)
            report[f"{'train' if training else 'eval'}, {call}"] = {"verdict": verdict, "reason": reason}
    zoo.close()
    return report


def check_here(names: list[str]) -> None:
    """Check some models in this process, and print a line of JSON for each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the models are tiny, and threads of torch's own would only wait for each other
    transformers.logging.set_verbosity_error()
    with asyncio.Runner() as runner:
        for name in names:
            try:
                report = check_model(name, runner)
            except Exception as error:  # of transformers: another version may want another configuration
                report = {"not_made": f"{type(error).__name__}: {first_line(error)}"}
            print(json.dumps({"name": name, **report}), flush=True)


def check_in_processes(names: list[str]) -> list[dict[str, Any]]:
    """Check all models, a few in each process, so that memory stays small."""
    reports = []
    for start in range(0, len(names), MODELS_PER_PROCESS):
        some = names[start : start + MODELS_PER_PROCESS]
        command = [sys.executable, str(SCRIPT), "--here", *some]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=False, timeout=SECONDS_PER_PROCESS
            )
            lines, ending = done.stdout, f"its process ended with {done.returncode}"
        except subprocess.TimeoutExpired as error:
            lines, ending = (error.stdout or b"").decode(), f"nothing within {SECONDS_PER_PROCESS} s"
        found = {report["name"]: report for report in map(json.loads, lines.splitlines())}
        for name in some:
            reports.append(found.get(name, {"name": name, "not_made": ending}))
            print(name, summary_of(reports[-1]), file=sys.stderr, flush=True)
    return reports


def tree_state() -> bytes:
    """Return what tells one state of the checked tree from another: its commit and all edits beside it."""
    here = SCRIPT.parent
    commands = (["git", "rev-parse", "HEAD"], ["git", "diff", "HEAD", "--", "../asyncdp", "."])
    return b"".join(
        subprocess.run(each, cwd=here, stdout=subprocess.PIPE, check=True).stdout for each in commands
    )


def summary_of(report: dict[str, Any]) -> str:
    if "not_made" in report:
        return str(report["not_made"])
    return " | ".join(report[column]["verdict"] for column in COLUMNS)


def count(reports: list[dict[str, Any]]) -> Counter[str]:
    return Counter(report[column]["verdict"] for report in reports for column in COLUMNS if column in report)


def reasons_of(reports: list[dict[str, Any]], verdict: str) -> list[str]:
    """Every reason once, with the calls that it holds for."""
    calls: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        for column in COLUMNS:
            if column in report and report[column]["verdict"] == verdict and report[column]["reason"]:
                calls.setdefault((report["name"], report[column]["reason"]), []).append(column)
    return [f"- {name} ({'; '.join(columns)}): {reason}" for (name, reason), columns in calls.items()]


def as_table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    reports, counts = result["setups"], result["counts"]
    made = [report for report in reports if "not_made" not in report]
    lines = [
        "# Models of transformers over two lanes",
        "",
        f"`scripts/check_zoo`, commit {result['commit']}, {result['date']}, {result['machine']}, Python "
        f"{result['python']}, torch {result['torch']}, transformers {result['transformers']}.",
        "",
        f"{len(made)} tiny models with random weights through `data_parallel` and an engine, on {DEVICES}: "
        "outputs, gradients (train mode) and buffers beside those of the same model called by hand on each "
        f"half of the rows. Of {sum(counts.values())} calls {counts[EQUAL]} are equal in both ways, "
        f"{counts[REFUSED]} refused, {counts[WRONG]} wrong; of {counts[NOT_JOINED]} the halves do not fit "
        f"together by hand either; {counts[NOT_OFFERED]} the model has no option for, or refuses (–).",
        "",
        f"| setup | model | inputs | {' | '.join(COLUMNS)} |",
        "|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for report in made:
        cells = [
            f"**{verdict}**" if (verdict := report[column]["verdict"]) in (REFUSED, WRONG) else verdict
            for column in COLUMNS
        ]
        lines.append(f"| {report['name']} | {report['model']} | {report['inputs']} | {' | '.join(cells)} |")
    for title, some in (
        ("Wrong", reasons_of(made, WRONG)),
        ("Refused", reasons_of(made, REFUSED)),
        ("Outputs that do not fit together", reasons_of(made, NOT_JOINED)),
        ("What the model itself refuses", reasons_of(made, NOT_OFFERED)),
        (
            "Not made",
            [f"- {report['name']}: {report['not_made']}" for report in reports if "not_made" in report],
        ),
    ):
        if some:
            lines += ["", f"## {title}", "", *some]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check, print, and write the results; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SETUPS, metavar="NAME", help="these setups alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--here", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        check_here(options.here)
        return 0
    before = tree_state()
    reports = check_in_processes(options.only or list(SETUPS))
    if tree_state() != before:
        parser.exit(
            2, "The tree changed while it was checked, so nothing was written. Run this in a clone.\n"
        )
    counts = count(reports)
    result = {**origin(), "transformers": transformers.__version__, "counts": counts, "setups": reports}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "check_zoo.json").write_text(json.dumps(result, indent=1) + "\n")
    text = as_table(result)
    (options.out / "check_zoo.md").write_text(text)
    print(text)
    return 1 if counts[WRONG] or any("not_made" in report for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
