"""What is declared of the aggregators is what their classes are and read."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, get_type_hints

import pytest
from small_aggregators import MAP, REQUIRED, draw, supervise

from dragn_cache.aggregators import AGGREGATORS, aggregator_class, create_aggregator
from dragn_cache.aggregators.declared import NoOptions
from dragn_cache.options import REQUIRED as NO_DEFAULT
from dragn_cache.options import declarations
from dragn_cache.training.methods import SUPPLIED, method_declarations, method_facts, method_names

every_aggregator = pytest.mark.parametrize("name", sorted(AGGREGATORS))
# Options that are read only together with others.
TOGETHER: dict[str, dict[str, Any]] = {"dragn": {"order": "permuted", "unit": "L1Agg"}}


@every_aggregator
def test_a_class_has_the_facts_that_are_declared(name: str) -> None:
    method, cls = AGGREGATORS[name], aggregator_class(name)
    assert cls.name == name
    assert cls.needs == method.needs
    assert cls.order_sensitive is method.order_sensitive
    assert cls.has_attention is method.has_attention
    assert cls.embedding_among_features is method.embedding_among_features
    assert cls.options_class is method.options
    if method.options is not NoOptions:
        assert get_type_hints(cls)["options"] is method.options


@every_aggregator
def test_an_objects_options_are_those_given_and_the_defaults(name: str) -> None:
    made = create_aggregator(name, in_shape=MAP, **REQUIRED.get(name, {}))
    for option, declared in declarations(AGGREGATORS[name].options).items():
        expected = REQUIRED.get(name, {}).get(option, declared.default)
        assert getattr(made.options, option) == expected


@every_aggregator
def test_every_declared_option_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the method's own code, in its making, its training or its evaluation."""
    options = AGGREGATORS[name].options
    read: set[str] = set()

    class Watched(options):  # type: ignore[misc,valid-type]
        def __getattribute__(self, attribute: str) -> Any:
            module = sys._getframe(1).f_globals["__name__"]
            if module.startswith("dragn_cache.aggregators") and not module.endswith(".declared"):
                read.add(attribute)
            return super().__getattribute__(attribute)

    monkeypatch.setattr(aggregator_class(name), "options_class", Watched)
    given = REQUIRED.get(name, {}) | TOGETHER.get(name, {})
    made = create_aggregator(name, in_shape=MAP, **given)
    bags = draw(MAP, [5, 1, 7])
    made.train()(bags, supervise(3))
    made.eval()(bags)
    assert read & set(declarations(options)) == set(declarations(options))


@pytest.mark.parametrize("name", method_names())
def test_every_option_has_one_line_of_help_and_a_default(name: str) -> None:
    for option, declared in method_declarations(name).items():
        assert declared.help.endswith("."), option
        assert "\n" not in declared.help
        assert len(declared.help) <= 80, option
        assert declared.default is not NO_DEFAULT
        assert declared.sweep


def test_what_training_supplies_is_no_option_of_a_user() -> None:
    supplied = {
        option: declared
        for method in AGGREGATORS.values()
        for option, declared in declarations(method.options).items()
        if not declared.sweep
    }
    assert set(supplied) == set(SUPPLIED)


def test_methods_are_told_without_loading_torch() -> None:
    code = """
import json, sys
from dragn_cache_cli.app import main
sys.argv = ["dragn-cache", "aggregators", "--json"]
try:
    main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert list(told) == method_names()
    assert told["dtfd"]["needs"] == method_facts("dtfd").needs == "any"
    assert told["dtfd"]["options"] == {
        "groups": 4,
        "distill": "afs",
        "embed": 512,
        "attn_dim": 128,
    }
    assert told["dtfd"]["described"]["distill"]["expected"] == "afs, max or maxmin"
