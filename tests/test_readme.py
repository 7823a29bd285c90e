"""The README's tables are generated; `python tests/test_readme.py --write` renews them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import vlmprune
from test_generate_features import support_table
from test_support import method_support
from vlmprune.eval.bench.scale import scale_table
from vlmprune.eval.bench.select import summary_table
from vlmprune.eval.bench.table import before_after_table, bench_table, shapes_table
from vlmprune.eval.commands.listing import methods_table, models_table
from vlmprune.eval.results.records import read_records
from vlmprune.eval.results.tables import accuracy_table, sweep_table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

RESULTS = ROOT / "eval" / "embedded" / "results"


def sweep_results() -> str:
    """The table of the stored run of `vlmprune sweep`."""
    return sweep_table(read_records(RESULTS / "sweep.jsonl")).markdown()


def accuracies(name: str) -> str:
    """A stored sweep of many methods, one line a method."""
    return accuracy_table(read_records(RESULTS / name)).markdown()


def stored(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def promises() -> str:
    """Stored runs of `vlmprune bench model`, before and after."""
    runs = ("bench_576", "bench_ragged", "bench_tiles")
    tables = [
        before_after_table(stored(f"{run}_before.json"), stored(f"{run}.json")) for run in runs
    ]
    return "\n\n".join(table.markdown() for table in tables)


def accelerators() -> str:
    """Whatever runs on a GPU are stored."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu_*.json"))]
    tables = [before_after_table(None, report).markdown() for report in reports]
    return "\n\n".join(tables) or "No run on an accelerator is stored yet: nothing is claimed."


def select_results() -> str:
    """The short table of the stored run of `vlmprune bench select`."""
    return summary_table(stored("bench_select.json")).markdown()


GENERATED = {
    "results": sweep_results,
    "accuracy": lambda: accuracies("sweep_before_llm.jsonl"),
    "decoder": lambda: accuracies("sweep_decoder.jsonl"),
    "cache": lambda: accuracies("sweep_cache.jsonl"),
    "speed": lambda: bench_table(stored("bench_576.json")).markdown(),
    "promises": promises,
    "accelerators": accelerators,
    "scale": lambda: scale_table(stored("bench_scale.json")).markdown(),
    "shapes": lambda: shapes_table(stored("bench_shapes.json"), "divprune").markdown(),
    "select": select_results,
    "methods": lambda: methods_table().markdown(),
    "models": lambda: models_table().markdown(),
    "support": method_support,
    "features": support_table,
}


def section(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- generated: {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    for name, table in GENERATED.items():
        text = section(name).sub(lambda m, t=table: f"{m[1]}{t().strip()}\n{m[3]}", text)
    return text


@pytest.mark.parametrize("name", GENERATED)
def test_the_table_is_up_to_date(name):
    (found,) = section(name).findall(README.read_text())
    assert found[1].strip() == GENERATED[name]().strip(), (
        "stale: run python tests/test_readme.py --write"
    )


def test_the_added_method_of_the_readme_works(tmp_path, monkeypatch):
    """The example file, put where the README says, is found, listed and runs."""
    import torch
    from kit import zoo
    from vlmprune.prune import methods, registry
    from vlmprune.prune.methods import before_llm

    (code,) = re.findall(r'```python\n("""Norm: .*?)```', README.read_text(), re.DOTALL)
    (tmp_path / "norm.py").write_text(code)
    monkeypatch.setattr(before_llm, "__path__", [*before_llm.__path__, str(tmp_path)])
    methods.shipped.cache_clear()
    try:
        assert "norm" in vlmprune.methods()
        case = zoo.CASES["llava-clip-llama"]
        model = case.model()
        with torch.no_grad(), vlmprune.patch(model, "norm", keep_ratio=0.25, order=1.0) as handle:
            model(**case.inputs())
        assert handle.last.tokens_kept == [case.num_tokens("C") // 4]
    finally:
        registry._classes.pop("norm", None)
        sys.modules.pop(f"{before_llm.__name__}.norm", None)
        methods.shipped.cache_clear()


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert targets
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert not missing


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python tests/test_readme.py --write")
    README.write_text(with_tables(README.read_text()))
