"""The reference's share of the time that a comparison takes.

    python -m benchmarks.compare_share MODEL EXPORT.onnx [RUNTIME]

Runs `python -m verify compare` (8 prompts, 64 tokens, with the cache and without) as a process of its own. Two
shares of its wall time: the reference's own (its passes and the judging), and that of everything but the candidate's
runs, which counts the start, the fingerprints and the opening of the session as the reference's too.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.peers import machine

TOKENS = 64


def main(model: Path, export: Path, runtime: str = "ort-cpu", tokens: int = TOKENS) -> None:
    """Prints the seconds and both shares."""
    with tempfile.TemporaryDirectory(prefix="share-") as temporary:
        report = Path(temporary) / "report.json"
        command = [sys.executable, "-m", "verify", "compare", str(model), str(export), "--runtime", runtime]
        began = time.perf_counter()
        done = subprocess.run(
            [*command, "--max-new-tokens", str(tokens), "--json", str(report)], capture_output=True, text=True
        )
        wall = time.perf_counter() - began
        if not report.is_file():
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
        cells = json.loads(report.read_text(encoding="utf-8"))["cells"]
    if any(cell["seconds"] is None for cell in cells):
        raise SystemExit(f"{' '.join(command)}: expected a verdict in every cell\n{done.stdout}")
    candidate, reference = (sum(cell["seconds"][side] for cell in cells) for side in ("candidate", "reference"))
    print(machine())
    print(f"{runtime}, {tokens} tokens a prompt, cache {' and '.join(cell['cache'] for cell in cells)}")
    print(f"wall {wall:.1f} s: candidate {candidate:.1f} s, reference {reference:.1f} s")
    print(f"ratio {reference / wall:.2f} of the wall time is the reference's")
    print(f"ratio {(wall - candidate) / wall:.2f} of the wall time is not the candidate's")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
