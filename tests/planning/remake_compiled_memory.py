"""Asks libtpu again for what `compiled_memory.json` holds: `python -m tests.planning.remake_compiled_memory`.

Run it where the step's memory was changed on purpose, and read the difference.
"""

import json
from pathlib import Path

from maxlm.config import load_config
from maxlm.planning.compile import compile_step, lower_step
from maxlm.planning.topology import parse_topology

CASES = Path(__file__).parent / "compiled_memory.json"


def main() -> None:
    cases = json.loads(CASES.read_text())
    for case in cases:
        config, topology = load_config(case["preset"], case["overrides"]), parse_topology(case["topology"])
        memory = compile_step(lower_step(config, topology)).memory
        before, case["peak_bytes"] = case["peak_bytes"], memory["argument"] + memory["heap"]
        case["argument_bytes"] = memory["argument"]
        print(f"{case['name']}: {before / 2**20:,.0f} MiB before, {case['peak_bytes'] / 2**20:,.0f} now", flush=True)
    CASES.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
