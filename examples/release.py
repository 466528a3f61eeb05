"""Planish in a release pipeline: run a recipe, stop unless the result may be shipped, use what was made.

python examples/release.py [BUNDLE FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines import load, load_recipe, run
from pipelines.runner import outcome


def main(folder: Path) -> int:
    recipe = load_recipe(Path(__file__).with_name("minilm.yaml"), overrides=["latency.budget_s=10.0"])
    bundle = run(recipe, out=folder, overwrite=True)

    # The gate: None where a variant was selected and every required one passed.
    problem = outcome(bundle)
    if problem is not None:
        print(f"not released: {problem}", file=sys.stderr)
        return problem.exit_status

    chosen = bundle.selected()
    assert chosen is not None  # outcome() would have said so
    print(f"{chosen.id} is the variant to ship; its gates:")
    for name, gate in chosen.gates.items():
        print(f"  {name:8} {gate.verdict:12} {gate.reason}")
    for point, figures in chosen.points.items():
        print(f"  {point:8} {figures.p50_ms:.2f} ms, {figures.speedup:.2f} times as fast as eager PyTorch")

    with load(bundle) as model:
        vectors = model(["The museum is closed on Mondays.", "On Mondays, the museum does not open."])
        print(f"cosine similarity {float(vectors[0] @ vectors[1]):.3f}, run by {', '.join(model.opened)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "bundles/release")))
